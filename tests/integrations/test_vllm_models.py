"""Whole tiny models inside vLLM, on CPU tensors: packed ones, and those exported for it.

Runs where vllm can be imported: see `test_vllm`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import export, fake_model, packed
from safetensors.torch import load_file
from torch import Tensor
from vllm_shapes import ATTENTION, FUSED, HIDDEN, MLP, slabs

from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Recipe, parse_scheme

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
pytest.importorskip("vllm", reason="vllm is not installed")

from vllm.config import VllmConfig, set_current_vllm_config

from mixbits.integrations import vllm as plugin


@pytest.fixture
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's own groups of processes, of one."""
    from vllm import distributed

    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # there is none
    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{tmp_path}/group", 0, "gloo")
        distributed.initialize_model_parallel(1, 1)
        yield
        distributed.destroy_model_parallel()
        distributed.destroy_distributed_environment()


def load_in_vllm(folder: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    engine = EngineArgs(
        model=str(folder), dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True
    ).create_engine_config()
    with set_current_vllm_config(engine):
        return get_model(vllm_config=engine)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_vllm_loads_a_whole_model(tmp_path: Path, one_process: None, kind: str) -> None:
    plugin.register()
    eight = parse_scheme("MXFP8A16")
    recipes: dict[str, Recipe] = {f"{ATTENTION}.{n}": slabs() for n in ("q_proj", "k_proj")}
    recipes |= {f"{MLP}.down_proj": Recipe(((eight, 160),), rotated=True)}
    source, assignment, folder = packed(tmp_path, "MXFP4A16,MXFP8A16,BF16", kind, recipes=recipes)
    model = load_in_vllm(folder)
    fake, x = fake_model(source, assignment), torch.randn(5, HIDDEN).bfloat16()
    with torch.no_grad():
        for ours, theirs in zip(fake.model.layers, model.model.layers, strict=True):
            qkv = [ours.self_attn.get_submodule(name)(x) for name in FUSED["qkv_proj"]]
            gate_up = [ours.mlp.get_submodule(name)(x) for name in FUSED["gate_up_proj"]]
            y = gate_up[0]
            for got, wanted in (
                (theirs.self_attn.qkv_proj(x)[0], torch.cat(qkv, -1)),
                (theirs.mlp.gate_up_proj(x)[0], torch.cat(gate_up, -1)),
                (theirs.mlp.down_proj(y)[0], ours.mlp.down_proj(y)),
            ):
                # One unit in the last place of bfloat16, of sums in another order.
                assert (got - wanted).abs().max() <= 2**-7 * wanted.abs().max()
        assert torch.equal(model.compute_logits(x), fake.lm_head(x))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_vllm_loads_a_whole_model_with_experts(
    tmp_path: Path, one_process: None, kind: str
) -> None:
    plugin.register()
    sizes = {"moe_intermediate_size": 64, "intermediate_size": 64, "norm_topk_prob": True}
    schemes = "MXFP4A16,MXFP8A16,BF16,W4A16G32,W8A16G32"
    source, assignment, folder = packed(tmp_path, schemes, kind, **sizes)
    model = load_in_vllm(folder)
    fake, x = fake_model(source, assignment), torch.randn(9, HIDDEN).bfloat16()
    with torch.no_grad():
        for ours, theirs in zip(fake.model.layers, model.model.layers, strict=True):
            moe = theirs.mlp if kind == "qwen3_moe" else theirs.block_sparse_moe
            logits, weights, choices = ours.mlp.gate(x)
            assert torch.equal(moe.gate(x)[0], logits)
            found = moe.experts.router.select_experts(hidden_states=x, router_logits=logits)
            assert torch.equal(found[1].sort().values, choices.sort().values.int())
            got = moe.experts.routed_experts.forward_modular(x, *found)
            wanted = ours.mlp.experts(x, choices, weights)
            # Some units in the last place of bfloat16: it has weights of tokens in float32.
            assert (got - wanted).abs().max() <= 2**-6 * wanted.abs().max()


def experts_of(folder: Path, kind: str) -> dict[str, Tensor]:
    """What vLLM's own layer for the experts of the first block is filled with."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model

    engine = EngineArgs(
        model=str(folder), dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True
    ).create_engine_config()
    with set_current_vllm_config(engine):
        model = initialize_model(vllm_config=engine, model_config=engine.model_config)
        layer = model.model.layers[0]
        experts = (layer.mlp if kind == "qwen3_moe" else layer.block_sparse_moe).experts
        for empty in experts.parameters():
            empty.data.fill_(0x55)
        DefaultModelLoader(engine.load_config).load_weights(model, engine.model_config)
    return {name: p.data for name, p in experts.routed_experts.named_parameters()}


SMALL = {"moe_intermediate_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_vllm_reads_experts_of_compressed_tensors(
    tmp_path: Path, one_process: None, kind: str
) -> None:
    """Its kernels for them want a GPU."""
    recipes: dict[str, Recipe] = {
        f"{MLP}.experts.{e}.{p}": parse_recipe("MXFP4A16")
        for e in range(4)
        for p in ("gate_proj", "up_proj", "down_proj")
    }
    *_, folder = packed(tmp_path, "BF16", kind, recipes=recipes, **SMALL)
    found = experts_of(export(folder, "compressed-tensors"), kind)
    tensors = load_file(folder / "model.safetensors")
    for part in ("packed", "scale"):
        gates, ups, downs = (
            torch.stack([tensors[f"{MLP}.experts.{e}.{p}.weight_{part}"] for e in range(4)])
            for p in ("gate_proj", "up_proj", "down_proj")
        )
        assert torch.equal(found[f"w13_weight_{part}"], torch.cat([gates, ups], 1))
        assert torch.equal(found[f"w2_weight_{part}"], downs)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_vllm_reads_experts_that_are_left_alone(
    tmp_path: Path, one_process: None, kind: str
) -> None:
    plugin.register()
    recipes: dict[str, Recipe] = {f"{ATTENTION}.q_proj": parse_recipe("MXFP4A16")}
    source, _, folder = packed(tmp_path, "BF16", kind, recipes=recipes, **SMALL)
    found, wanted = experts_of(folder, kind), source.load().model.layers[0].mlp.experts
    assert torch.equal(found["w13_weight"], wanted.gate_up_proj)
    assert torch.equal(found["w2_weight"], wanted.down_proj)
