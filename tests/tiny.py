"""Tiny models with random weights, one per kind, and token ids: enough to run every stage.

Sizes are awkward on purpose: no group size divides 172 or 48, and heads share keys and values.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

transformers.utils.logging.disable_progress_bar()

VOCAB = 130
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_MOE = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}
# kind -> (transformers' model type, what differs from _COMMON)
_KINDS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),  # biases on q, k, v
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "gemma": ("gemma", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "num_experts": 4, "decoder_sparse_step": 1}),
    "mixtral": ("mixtral", {**_MOE, "intermediate_size": 48, "num_local_experts": 4}),
}
KINDS = tuple(_KINDS)
SMALL = ["--nsamples", "4", "--seqlen", "32", "--eval-nsamples", "4", "--gate", "0"]  # little text
SMALL += ["--schemes", "MXFP4,MXFP8"]  # which round activations as well
MOE_KINDS = ("qwen3_moe", "mixtral")


def make_model(
    folder: Path, kind: str = "llama", *, seed: int = 0, scale: float = 3.0, **overrides: object
) -> Path:
    """Save a model of `kind` in bfloat16 and return `folder`; `overrides` go to its config.

    The same arguments give the same bytes. Weights are `scale` times larger than at usual
    initialisation, so that logits are far from uniform and rounding shows.
    """
    model_type, differences = _KINDS[kind]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **differences, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape) * 0.02 * scale)
    model.save_pretrained(folder)
    return folder


def add_tokenizer(folder: Path) -> Path:
    """Give a model a tokenizer of one token per byte (ASCII only); returns `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<s>": 0, "</s>": 1}
    vocab |= {chr(i): i + 2 for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder


def write_ids(path: Path, count: int = 4096, vocab_size: int = VOCAB, seed: int = 0) -> Path:
    """Write `count` pseudo-random token ids (uniform, always the same) as .npy; returns `path`."""
    ids = np.random.Generator(np.random.PCG64(seed)).integers(0, vocab_size, count)
    np.save(path, ids.astype(np.int32))
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "mixbits.quantize", *map(str, words)]
