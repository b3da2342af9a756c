"""Experts keep their values in other engines: in stacks of a GGUF, one by one elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import IDS, export, fake_model, loaded, logits, packed
from safetensors.torch import load_file
from tiny import MOE_KINDS, read
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoRoundConfig

from mixbits.export.__main__ import main
from mixbits.formats import reference
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Recipe
from mixbits.model.experts import EXPERT_PROJECTIONS
from mixbits.model.families import FAMILIES
from mixbits.model.layout import find_linears, weight_of
from mixbits.source.source import Source

SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "moe_intermediate_size": 64},
    "mixtral": {"intermediate_size": 64},
}
STORED = {  # what checkpoints call them
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
}


def experts(*layers: str | Sequence[str]) -> dict[str, Recipe]:
    """Recipes of all experts: for each layer one scheme, or those of gate, up and down."""
    recipes: dict[str, Recipe] = {}
    for layer, names in enumerate(layers):
        schemes = [names] * 3 if isinstance(names, str) else names
        for name, scheme in zip(EXPERT_PROJECTIONS, schemes, strict=True):
            parsed = parse_recipe(scheme, act_scale_mode="even")
            recipes |= {f"model.layers.{layer}.mlp.experts.{e}.{name}": parsed for e in range(4)}
    return recipes


def spread_routers(folder: Path) -> None:
    """Tokens are far from choosing other experts, or 8-bit inputs would make some of them do so."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gate.weight"):
                parameter.mul_(8)
    model.save_pretrained(folder)


def model(tmp_path: Path, kind: str, schemes: str, recipes: dict[str, Recipe], **more: Any) -> Any:
    layers = max(int(name.split(".")[2]) for name in recipes) + 1
    sizes = {**SIZES[kind], "num_hidden_layers": layers, **more}
    return packed(tmp_path, schemes, kind, recipes=recipes, change=spread_routers, **sizes)


def rounded(source: Source, assignment: dict[str, Recipe]) -> dict[str, Tensor]:
    """Every expert's weight as it should be, float32."""
    plain, found = source.load(), {}
    for info in find_linears(plain):
        scheme = assignment[info.name].scheme
        if info.is_expert:
            assert scheme is not None
            weight = weight_of(plain, info).detach().float()
            fmt = scheme.weight
            found[info.name] = weight if fmt is None else reference.fake_quantize(weight, fmt)
    return found


# --- GGUF ----------------------------------------------------------------------------------------

STACKS = (
    ("MXFP4A16", "W8A16", "W4A16G32"),
    ("W2A16G64", "BF16", "MXFP4A16"),
    ("BF16", "BF16", "BF16"),
)
TYPES = (("MXFP4", "Q8_0", "Q4_0"), ("Q4_0", None, "MXFP4"), (None, None, None))


@pytest.mark.parametrize(
    ("kind", "dtype", "plain"), [("qwen3_moe", "bfloat16", "BF16"), ("mixtral", "float16", "F16")]
)
def test_a_gguf_has_stacks(tmp_path: Path, kind: str, dtype: str, plain: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    source, assignment, folder = model(tmp_path, kind, "MXFP4A16,W8A16", experts(*STACKS))
    path = export(folder, "gguf", "--dtype", dtype) / "model.gguf"
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    weights = rounded(source, assignment)
    for layer, types in enumerate(TYPES):
        assert tensors[f"blk.{layer}.ffn_gate_inp.weight"].tensor_type.name == "F32"
        for name, kind_there in zip(EXPERT_PROJECTIONS, types, strict=True):
            found = tensors[f"blk.{layer}.ffn_{name.removesuffix('_proj')}_exps.weight"]
            assert found.tensor_type.name == (kind_there or plain)
            values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
            for expert, value in enumerate(values.float()):
                wanted = weights[f"model.layers.{layer}.mlp.experts.{expert}.{name}"]
                if kind_there is None:
                    wanted = wanted.to(getattr(torch, dtype)).float()
                assert torch.equal(value, wanted)


@pytest.mark.parametrize("kind", MOE_KINDS)
def test_llama_cpp_runs_experts(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    source, assignment, folder = model(tmp_path, kind, "MXFP4A16,W8A16", experts(*STACKS))
    path = export(folder, "gguf") / "model.gguf"
    plain = logits(source.load().float())
    expected = logits(fake_model(source, assignment).float())
    assert (plain - expected).norm() > 0.2 * plain.norm()
    there = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    for row, wanted in zip(IDS, expected, strict=True):
        there.reset()
        there.eval(row.tolist())
        got = torch.from_numpy(there.scores[: len(row)])
        # It rounds activations to 8 bits, by which a token may even choose another expert.
        near = (got - wanted).norm(dim=-1) < 0.05 * wanted.norm(dim=-1)
        assert near.float().mean() > 0.9
    there.close()


def test_a_stack_has_one_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    stack = "model.layers.0.mlp.experts"
    one = {
        f"{stack}.2.up_proj": parse_recipe("W8A16G32"),
        f"{stack}.1.down_proj": parse_recipe("BF16"),
    }
    *_, folder = model(tmp_path, "qwen3_moe", "BF16", experts("MXFP4A16") | one)
    argv = [str(folder), "--format", "gguf", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "gguf cannot hold 7 of 11 linears" in error
    assert f"{stack}.up_proj takes one scheme for all experts, not MXFP4A16, W8A16G32" in error
    assert f"{stack}.down_proj takes one scheme for all experts, not BF16, MXFP4A16" in error
    assert main([*argv, "--lossy"]) == 0
    types = {
        t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    }
    kinds = [types[f"blk.0.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")]
    assert kinds == ["MXFP4", "Q8_0", "BF16"]
    losses = read(tmp_path / "out" / "mixbits-export.json")["relative_errors"]
    assert losses.pop(f"{stack}.0.up_proj") > 0
    assert len(losses) == 5  # the other two as Q8_0, and three in 16 bits, without a loss
    assert [losses[f"{stack}.{e}.down_proj"] for e in (0, 2, 3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"mlp_only_layers": [1]}, "experts in every layer"),
    ],
)
def test_experts_that_llama_cpp_runs_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    recipes = experts("MXFP4A16")
    *_, folder = model(tmp_path, "qwen3_moe", "BF16", recipes, num_hidden_layers=2, **changes)
    assert main([str(folder), "--format", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


# --- compressed-tensors --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MOE_KINDS)
def test_compressed_tensors_has_them_one_by_one(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    recipes = experts("MXFP4A16", "W4A16G32", "MXFP8", "W8A16G64ASYM")
    source, assignment, folder = model(tmp_path, kind, "MXFP4A16,BF16", recipes)
    out = export(folder, "compressed-tensors", "--dtype", "float16")
    stored = load_file(out / "model.safetensors")
    config = read(out / "config.json")["quantization_config"]
    module, *leaves = STORED[kind]
    names = dict(zip(EXPERT_PROJECTIONS, leaves, strict=True))
    for name, wanted in rounded(source, assignment).items():
        before, expert, leaf = re.split(r"\.(\d)\.(?=\w+$)", name)
        there = f"{before.replace('mlp.experts', module)}.{expert}.{names[leaf]}"
        tensors = {k.rpartition(".")[2]: v for k, v in stored.items() if k.startswith(f"{there}.")}
        (group,) = (
            group
            for group in config["config_groups"].values()
            if any(re.match(t.removeprefix("re:"), there) for t in group["targets"])
        )
        plain = BaseCompressor.get_value_from_registry(group["format"]).decompress(
            tensors, QuantizationScheme(**group)
        )["weight"]
        assert torch.equal(plain, wanted.to(plain.dtype))
    router = f"model.layers.0.{module.partition('.')[0]}.gate"
    assert f"{router}.weight" in stored and router in config["ignore"]


@pytest.mark.parametrize("kind", MOE_KINDS)
def test_transformers_dequantizes_experts(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    recipes = experts("MXFP4A16", "BF16", "MXFP4A16")  # a layer is left alone, in stacks
    source, assignment, folder = model(tmp_path, kind, "MXFP4A16,MXFP8A16,BF16", recipes)
    there, info = AutoModelForCausalLM.from_pretrained(
        export(folder, "compressed-tensors"),
        dtype="auto",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values())
    logits(there)  # it decompresses in the first step
    expected = logits(fake_model(source, assignment).float())
    # In float32: products in another order, such as of 16-bit numbers, make some choose others.
    assert (logits(torch.nn.Module.float(there)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("scheme", "dtype"), [("W3A16G32", "bfloat16"), ("FP8", "float32")])
def test_transformers_reads_experts_of_other_formats(
    tmp_path: Path, scheme: str, dtype: str
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    source, assignment, folder = model(tmp_path, "mixtral", "BF16", experts(scheme))
    there = loaded(export(folder, "compressed-tensors"), getattr(torch, dtype))
    weights, found = rounded(source, assignment), find_linears(there)
    for info in found:
        if info.is_expert:
            value = weights[info.name].to(getattr(torch, dtype))
            assert torch.equal(weight_of(there, info).detach(), value)
    assert sum(info.is_expert for info in found) == 12


@pytest.mark.parametrize("schemes", [("W4A16G32", "W8A16G32"), ("W8A16G32", "W4A16G32")])
def test_transformers_refuses_experts_of_several_schemes(
    tmp_path: Path, schemes: tuple[str, str]
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    wide = {"hidden_size": 128, "moe_intermediate_size": 128}  # more than two groups in a row
    *_, folder = model(tmp_path, "qwen3_moe", "W4A16G32", experts(*schemes), **wide)
    out = export(folder, "compressed-tensors", "--dtype", "float16")
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(out, dtype="auto")


def test_what_becomes_of_activations_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for scheme, said in (("MXFP4A16", False), ("MXFP4", True)):
        (tmp_path / scheme).mkdir()
        *_, folder = model(tmp_path / scheme, "mixtral", "MXFP4", experts(scheme))
        export(folder, "compressed-tensors")
        assert ("does not round their activations" in capsys.readouterr().out) == said


def test_other_experts_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, folder = model(tmp_path, "mixtral", "BF16", experts("MXFP4"))
    monkeypatch.delitem(FAMILIES, "mixtral")
    for name in ("compressed-tensors", "auto-round"):
        argv = [str(folder), "--format", name, "--out", str(tmp_path / name), "--lossy"]
        assert main(argv) == 2
        assert "experts are exported of qwen3_moe only: got mixtral" in capsys.readouterr().err


# --- auto-round ----------------------------------------------------------------------------------


@pytest.fixture
def conversions() -> Iterator[None]:
    """auto-round's loader takes transformers' merging of experts away, for good."""
    from transformers import conversion_mapping

    get_mapping = conversion_mapping.get_checkpoint_conversion_mapping
    saved = {kind: get_mapping(kind) for kind in MOE_KINDS}
    yield
    for kind, mapping in saved.items():
        conversion_mapping.register_checkpoint_conversion_mapping(kind, mapping, overwrite=True)


@pytest.mark.parametrize("kind", MOE_KINDS)
@pytest.mark.parametrize("schemes", ["MXFP4,MXFP8,BF16,MXFP4", "W4A16G32,W8A16G32,BF16,W2A16G32"])
def test_auto_round_makes_linears_of_experts(
    tmp_path: Path, conversions: None, kind: str, schemes: str
) -> None:
    pytest.importorskip("auto_round", reason="auto-round is not installed")
    alone = experts("MXFP4", "BF16")  # in the second layer they all are
    recipes = {name: recipe for name, recipe in alone.items() if not recipe.packed}
    sizes = {**SIZES[kind], "num_hidden_layers": 2}
    source, assignment, folder = packed(tmp_path, schemes, kind, "floor", recipes=recipes, **sizes)
    expected, weights = logits(fake_model(source, assignment)), rounded(source, assignment)
    out = export(folder, "auto-round")
    options = {} if "MX" in schemes else {"quantization_config": AutoRoundConfig(backend="torch")}
    there, info = AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", output_loading_info=True, **options
    )
    assert not any(info.values())
    for name, weight in weights.items():
        # Integers are multiplied in float16: one rounding of each value.
        halves = assignment[name].packed and "MX" not in schemes
        x = torch.eye(weight.shape[1], dtype=torch.float16 if halves else there.dtype)
        with torch.no_grad():
            values = there.get_submodule(name)(x).t()
        assert torch.equal(values.to(x.dtype), weight.to(x.dtype))
    if "MX" in schemes:  # its integers want another dtype than what is left alone
        # Sums of bfloat16 in another order make other codes of activations.
        assert (logits(there) - expected).norm() < 0.2 * expected.norm()
