"""Sizes and names of the tiny models that vLLM's layers are tested with, and a recipe in slabs."""

from __future__ import annotations

import torch

from mixbits.formats.schemes import Recipe, parse_scheme

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 64, 4, 2, 16, 256, 160
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def slabs(rotated: bool = False) -> Recipe:
    order = tuple(torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(0)).tolist())
    parts = (parse_scheme("MXFP8A16"), 32), (parse_scheme("MXFP4A16"), 32)
    return Recipe(parts, order, rotated)
