"""Published checkpoints go in tensor by tensor, and come out whole: packed, carried or kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import SMALL, make_model, read, write_ids
from torch import Tensor

import mixbits
from mixbits.errors import UsageError
from mixbits.formats.pack import unpack
from mixbits.formats.reference import dequantize
from mixbits.model.layout import find_linears, weight_of
from mixbits.quantize import main
from mixbits.runtime.linear import PackedLinear
from mixbits.source import source as source_module
from mixbits.source.source import Source, open_source

if not (Path(__file__).parents[2] / "benchmarks").is_dir():
    pytest.skip("installed without its benchmarks", allow_module_level=True)
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

import published
import published_integers as integers
from makers import PLAIN, QUANTIZED, Maker
from published import Published

from benchmarks.tools.tiny_models import picture_inputs


def in_fp8(found: Published) -> Published:
    """The same model with its second layer's MLP in FP8 blocks, as Qwen3.5-FP8 is published."""
    plain = dict(found.plain)
    for path in found.folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [n for n in tensors if ".language_model.layers.1.mlp." in n]:
            parts, plain[name] = published.fp8_blocks(tensors.pop(name).float())
            tensors |= {name.removesuffix("weight") + key: value for key, value in parts.items()}
        save_file(tensors, path, metadata={"format": "pt"})
    index = found.folder / "model.safetensors.index.json"
    places = {
        name: path.name for path in found.folder.glob("*.safetensors") for name in load_file(path)
    }
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = read(found.folder / "config.json") | {"quantization_config": published.FP8}
    (found.folder / "config.json").write_text(json.dumps(config))
    return replace(found, plain=plain)


GPTQ: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2},
    "8 bits": {"bits": 8, "sym": False},
    "zero points": {"sym": False},
    "in order of activations": {"desc_act": True, "group_size": 32},
    "one group": {"group_size": -1},
    "version 2": {"checkpoint_format": "gptq_v2", "sym": False},
}
MAKERS: dict[str, Maker] = {
    **QUANTIZED,
    **PLAIN,
    **{f"gptq, {k}": lambda f, k=k: integers.gptq(f, **GPTQ[k]) for k in GPTQ},
    "awq, groups of 32": lambda f: integers.awq(f, group_size=32),
    "qwen3_5_fp8": lambda f: in_fp8(published.qwen3_5(f)),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_every_tensor_is_the_model_s_or_carried(maker: str, tmp_path: Path) -> None:
    found = MAKERS[maker](tmp_path)
    weights = open_source(str(tmp_path)).weights
    members = {id(g): g for g in weights.groups.values()}.values()
    taken = [one for group in members for _, one in group.members]
    parts = [part for one in [*taken, *weights.carried] for part in one.parts]
    static = [name for name in found.stored if name.endswith("input_scale")]  # of activations
    assert sorted([*parts, *static]) == sorted(found.stored)
    for one in taken:
        torch.testing.assert_close(
            one.plain(weights.files.read).double(),
            found.plain[one.name].double(),
            rtol=1e-6,
            atol=0,
        )


def quantized(folder: Path, maker: str, schemes: str, bits: str, *more: str) -> Published:
    """Makes `folder`/model and quantizes it to `folder`/out."""
    found = MAKERS[maker](folder / "model")
    ids = str(write_ids(folder / "ids.npy", vocab_size=100))
    budget = ["--schemes", schemes, "--avg-bits", bits, "--rounding", "rtn"]
    options = ["--dataset", ids, *SMALL, *budget, "--out", str(folder / "out"), *more]
    assert main([str(folder / "model"), *options]) == 0
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def same_bits(a: Tensor, b: Tensor) -> bool:
    views = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and torch.equal(*views)


def twin(source: Source, packed: Any) -> Any:
    """The plain model with the packed one's weights in the place of its own, in float32."""
    model: Any = source.load().float()
    modules = dict(packed.named_modules())
    for info in find_linears(model):
        one = modules.get(info.name)
        if isinstance(one, PackedLinear):
            weight_of(model, info).copy_(one.weight)
    return model


@torch.no_grad()
def gap(packed: Any, plain: Any, **inputs: Tensor) -> float:
    got, wanted = (m(**inputs).logits.float() for m in (packed, plain))
    return float((got - wanted).norm() / wanted.norm())


IDS = torch.arange(48).reshape(2, 24) * 7 % 100
# Float32 sums of some hundred products, in another order.
CLOSE = 1e-5


@pytest.mark.parametrize(
    ("maker", "schemes", "bits"),
    [
        ("deepseek_v3", "MXFP4A16,MXFP8A16", "6"),
        ("gpt_oss", "W4A16,W8A16G32", "6"),
        ("kimi_k2", "W4A16,W8A16", "6"),
        ("qwen3_5", "W4A16G32,W8A16G32", "6"),
        ("gemma3", "MXFP4A16,MXFP8A16", "6"),
        ("awq", "W2A16,W8A16", "5"),
        ("gptq, zero points", "W2A16,W8A16", "5"),
    ],
)
def test_a_published_folder_is_quantized(
    maker: str, schemes: str, bits: str, tmp_path: Path
) -> None:
    found = quantized(tmp_path, maker, schemes, bits)
    out, source = stored(tmp_path / "out"), open_source(str(tmp_path / "model"))
    report = read(tmp_path / "out" / "report.json")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert on_disk == report["bytes_after"] == report["reached"]["predicted_bytes"]
    before = found.stored
    for one in source.weights.carried:
        assert all(same_bits(out[part], before[part]) for part in one.parts)
    packed = mixbits.load(tmp_path / "out", dtype=torch.float32)
    names = {n for n, m in packed.named_modules() if isinstance(m, PackedLinear)}
    split = {name.rsplit(".", 2)[0] for name in names}
    for name, group in source.weights.groups.items():  # what is left is what it was
        owner = name.rpartition(".")[0]
        if owner not in names and owner not in split:
            assert source.weights.is_stored_plain(name)
            assert same_bits(out[name], source.weights.tensor(name)), group
    plain = twin(source, packed)
    assert type(packed) is type(plain)
    assert gap(packed, plain, input_ids=IDS) < CLOSE
    assert packed.generate(IDS[:1, :6], max_new_tokens=3, do_sample=False).shape == (1, 9)
    kind = transformers.AutoModelForCausalLM  # of a model that sees, its text part
    assert (
        gap(kind.from_pretrained(tmp_path / "out", dtype=torch.float32), plain, input_ids=IDS)
        < CLOSE
    )


@pytest.mark.parametrize("maker", ["qwen3_5", "gemma3", "qwen2_5_vl", "llava", "mistral3"])
def test_a_picture_is_seen_as_before(
    maker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAKERS, "qwen2_5_vl", lambda f: published.seeing(f, "qwen2_5_vl"))
    monkeypatch.setitem(MAKERS, "llava", lambda f: published.seeing(f, "llava"))
    monkeypatch.setitem(MAKERS, "mistral3", lambda f: published.seeing(f, "mistral3"))
    quantized(tmp_path, maker, "W4A16G32,W8A16G32", "6")
    kind = transformers.AutoModelForImageTextToText
    packed = kind.from_pretrained(tmp_path / "out", dtype=torch.float32)
    source = open_source(str(tmp_path / "model"))
    plain, inputs = twin(source, packed), picture_inputs(source.config)
    assert gap(packed, plain, input_ids=IDS) < CLOSE
    assert gap(packed, plain, **inputs) < CLOSE
    dark = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    assert gap(packed, plain, **dark) < CLOSE
    seen, unseen = packed(**inputs).logits, packed(**dark).logits
    assert not torch.allclose(seen, unseen)  # or the picture would not matter
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        one, other = (tmp_path / f / name for f in ("model", "out"))
        assert one.read_bytes() == other.read_bytes()


def test_experts_of_gpt_oss_keep_their_codes(tmp_path: Path) -> None:
    found = quantized(tmp_path, "gpt_oss", "MXFP4,MXFP8", "5", "--gate", "0")
    out, before = stored(tmp_path / "out"), found.stored
    module = "model.layers.1.mlp.experts"
    blocks, scales = (before[f"{module}.gate_up_proj_{what}"] for what in ("blocks", "scales"))
    for expert in range(len(blocks)):
        for first, projection in enumerate(("gate_proj", "up_proj")):
            name = f"{module}.{expert}.{projection}"
            assert torch.equal(out[f"{name}.weight_packed"], blocks[expert, first::2].flatten(1))
            assert torch.equal(out[f"{name}.weight_scale"], scales[expert, first::2])
            bias = before[f"{module}.gate_up_proj_bias"][expert, first::2]
            assert same_bits(out[f"{name}.bias"], bias)
    assert read(tmp_path / "out" / "report.json")["kept"] == 24
    plan = read(tmp_path / "out" / "plan.json")["units"]
    assert {u["scheme"] for u in plan if "experts" in u["unit"]} == {"MXFP4A16"}


@pytest.mark.parametrize(
    ("maker", "schemes", "bits", "kept"),
    [
        ("deepseek_v31", "MXFP4A16,W8A16", "8.25", "MXFP8A16"),  # blocks scaled by powers of two
        ("awq", "W2A16,W8A16", "5", "W4A16ASYM"),
        ("gptq", "W2A16,W8A16", "5", "W4A16"),
        ("W4A16-asym", "W2A16,W8A16", "5", "W4A16ASYM"),
        ("MXFP8A16", "W4A16,W8A16", "8.25", "MXFP8A16"),
    ],
)
def test_a_format_of_ours_is_not_rounded_twice(
    maker: str, schemes: str, bits: str, kept: str, tmp_path: Path
) -> None:
    """Whatever rounds: the values are those of the source exactly, also where 16 bits lose some.

    Nor are they rotated, which would make other codes of them.
    """
    rotate = ("--rotate", "all" if maker in ("gptq", "MXFP8A16") else "none")
    found = quantized(tmp_path, maker, schemes, bits, "--rounding", "gptq", *rotate)
    packed = mixbits.load(tmp_path / "out")
    linears = [m for m in packed.named_modules() if isinstance(m[1], PackedLinear)]
    assert {m.recipe.name for _, m in linears} == {kept}
    for name, linear in linears:
        if (value := found.plain.get(f"{name}.weight")) is not None:  # others are experts
            torch.testing.assert_close(linear.weight, value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["W3A16", "W6A16-asym", "W8A16"])
def test_integers_of_any_bits_are_kept(name: str, tmp_path: Path) -> None:
    found = integers.compressed(tmp_path, name)
    weights = open_source(str(tmp_path)).weights
    for weight in found.encoded:
        kept = weights.kept(weight.removesuffix(".weight"), False)
        assert kept is not None and kept.format.element == f"int{name[1]}"
        value = found.plain[weight]
        codes = unpack(kept.packed, kept.format, value.shape[1])
        assert torch.equal(dequantize(codes, kept.format), value)


def test_what_the_plan_leaves_stays_quantized(tmp_path: Path) -> None:
    """--ignore of a quantized source's linears: their bytes, not 16 bits, and the same logits."""
    ignore = ["--ignore", "*.self_attn.*", "--ignore", "*.experts.*"]
    found = quantized(tmp_path, "deepseek_v3", "MXFP4A16,MXFP8A16", "6", *ignore, "--allow-partial")
    out, before = stored(tmp_path / "out"), found.stored
    name = "model.layers.1.self_attn.o_proj.weight"
    experts = [n for n in before if ".experts." in n]
    for part in (name, f"{name}_scale_inv", *experts):
        assert same_bits(out[part], before[part])
    packed = mixbits.load(tmp_path / "out", dtype=torch.float32)
    plain = twin(open_source(str(tmp_path / "model")), packed)
    assert gap(packed, plain, input_ids=IDS) < CLOSE
    mixbits.load(tmp_path / "out").save_pretrained(tmp_path / "again")
    again = stored(tmp_path / "again")
    assert again.keys() == out.keys()
    assert all(same_bits(again[n], out[n]) for n in out)
    mixbits.load(tmp_path / "again")


def test_fake_models_keep_what_is_not_rounded(tmp_path: Path) -> None:
    found = quantized(tmp_path, "deepseek_v3", "MXFP4,MXFP8", "5", "--fake")
    out, before = stored(tmp_path / "out"), found.stored
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert same_bits(out[bias], before[bias])
    carried = {n for n in found.extra if not n.endswith("_scale_inv")}  # made plain, as the others
    assert carried <= set(out)
    fake = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert fake(IDS).logits.isfinite().all()


def test_weights_are_made_plain_beside_the_output_and_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.qwen3_fp8(tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    source.scratch = tmp_path
    monkeypatch.setattr(source_module, "SCRATCH_SHARD", 10_000)
    model = source.load()
    (folder,) = filter(Path.is_dir, tmp_path.glob(".mixbits-scratch-*"))
    assert len(list(folder.glob("*.safetensors"))) > 3
    again = source.load()  # from the same folder
    assert list(filter(Path.is_dir, tmp_path.glob(".mixbits-scratch-*"))) == [folder]
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    del source
    assert not folder.exists()
    left = tmp_path / ".mixbits-scratch-999999999-x"  # by a process that was killed
    left.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    source = open_source(str(tmp_path / "model"))
    source.scratch = tmp_path / "not" / "yet"
    with pytest.raises(UsageError, match=f"{tmp_path} has 1,000 bytes free: .* are needed"):
        source.load()
    assert not left.exists()


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return apply


def _said(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = read(folder / "config.json")
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return apply


Q = "model.layers.0.self_attn.q_proj"
BAD: dict[str, tuple[Callable[[Path], Any], Callable[[Path], None], str]] = {
    "no scale": (published.qwen3_fp8, _tensors(lambda t: t.pop(f"{Q}.weight_scale_inv")), "float8"),
    "other blocks": (published.qwen3_fp8, _said(weight_block_size=[64, 64]), "must be"),
    "no zero points": (integers.awq, _tensors(lambda t: t.pop(f"{Q}.qzeros")), "is missing"),
    "another version": (integers.awq, _said(version="gemv"), "version gemm: got 4, gemv"),
    "another format": (integers.gptq, _said(checkpoint_format="marlin"), "got 'marlin'"),
    "other groups": (integers.gptq, _said(group_size=64), "in groups of 64 must have"),
    "another method": (integers.gptq, _said(quant_method="hqq"), "stored by hqq cannot be read"),
    "no such scheme": (
        lambda f: integers.compressed(f, "W4A16"),
        _said(config_groups={"group_0": {"targets": ["Linear"], "weights": {"num_bits": "x"}}}),
        "compressed-tensors",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_made_plain_is_refused_by_name(case: str, tmp_path: Path) -> None:
    maker, change, said = BAD[case]
    maker(tmp_path)
    change(tmp_path)
    with pytest.raises(UsageError, match=said):
        _ = open_source(str(tmp_path)).weights


def test_codes_that_nothing_explains_are_refused(tmp_path: Path) -> None:
    integers.gptq(tmp_path)
    config = read(tmp_path / "config.json")
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {f"{Q}.weight": torch.ones(128, 128, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="is stored as int8"):
        _ = open_source(str(tmp_path)).weights


def test_weights_left_quantized_may_not_be_edited(tmp_path: Path) -> None:
    quantized(tmp_path, "qwen3_5_fp8", "W4A16G32,W8A16G32", "6", "--ignore", "*.layers.1.mlp.*")
    packed = mixbits.load(tmp_path / "out")
    part = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(part(IDS).logits, packed(IDS).logits)
    packed.save_pretrained(tmp_path / "again")
    again, out = stored(tmp_path / "again"), stored(tmp_path / "out")
    assert again.keys() == out.keys() and all(same_bits(again[n], out[n]) for n in out)
    mixbits.load(tmp_path / "again")
    packed.model.language_model.layers[1].mlp.down_proj.weight.data.mul_(2)
    with pytest.raises(UsageError, match="was changed, and cannot be saved"):
        packed.save_pretrained(tmp_path / "edited")


def test_carried_names_rename_nothing_when_saved(tmp_path: Path) -> None:
    """A name of the source's makes transformers turn the others back into such names."""
    make_model(tmp_path / "model", "mixtral")
    path = tmp_path / "model" / "model.safetensors"
    extra = {"model.layers.2.block_sparse_moe.experts.0.w1.weight": torch.randn(8, 4)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    ids = ["--dataset", str(write_ids(tmp_path / "ids.npy")), *SMALL, "--avg-bits", "6"]
    assert main([str(tmp_path / "model"), *ids, "--out", str(tmp_path / "out")]) == 0
    mixbits.load(tmp_path / "out").save_pretrained(tmp_path / "again")
    out, again = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert again.keys() == out.keys() and extra.keys() <= out.keys()
    assert all(same_bits(again[n], out[n]) for n in out)
    mixbits.load(tmp_path / "again")


def test_some_experts_may_be_ignored(tmp_path: Path) -> None:
    quantized(tmp_path, "gpt_oss", "W4A16G32,W8A16G32", "6", "--ignore", "*.experts.1.down_proj")
    out, source = stored(tmp_path / "out"), open_source(str(tmp_path / "model"))
    report = read(tmp_path / "out" / "report.json")
    assert report["bytes_after"] == report["reached"]["predicted_bytes"]
    assert out["model.layers.0.mlp.experts.1.down_proj.weight_plain"].dtype == torch.bfloat16
    packed = mixbits.load(tmp_path / "out", dtype=torch.float32)
    assert gap(packed, twin(source, packed), input_ids=IDS) < CLOSE


@pytest.mark.parametrize("ignored", ["*.experts.1.down_proj", "*.self_attn.*"])
def test_finer_parts_of_experts_keep_their_bits(ignored: str, tmp_path: Path) -> None:
    """Biases of packed experts, and experts that are left among them, in float32."""
    published.gpt_oss(tmp_path / "model")
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        for name in [n for n in tensors if n.endswith("_bias")]:
            tensors[name] = torch.randn(tensors[name].shape)
        save_file(tensors, path, metadata={"format": "pt"})
    before = stored(tmp_path / "model")
    ids = ["--dataset", str(write_ids(tmp_path / "ids.npy", vocab_size=100)), *SMALL]
    options = ["--avg-bits", "6", "--ignore", ignored, "--out", str(tmp_path / "out")]
    assert main([str(tmp_path / "model"), *ids, *options]) == 0
    out, module = stored(tmp_path / "out"), "model.layers.1.mlp.experts"
    first, second = (before[f"{module}.{n}_proj_bias"] for n in ("gate_up", "down"))
    assert same_bits(out[f"{module}.2.up_proj.bias"], first[2, 1::2])
    assert same_bits(out[f"{module}.1.down_proj.bias"], second[1])
    assert mixbits.load(tmp_path / "out")(IDS).logits.isfinite().all()
    mixbits.load(tmp_path / "out").save_pretrained(tmp_path / "again")
    mixbits.load(tmp_path / "again")


def test_folders_beside_the_weights_come_along(tmp_path: Path) -> None:
    MAKERS["gptq"](tmp_path / "model")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "model" / "additional_chat_templates" / "tool.jinja").write_text("x")
    ids = ["--dataset", str(write_ids(tmp_path / "ids.npy", vocab_size=100)), *SMALL]
    assert (
        main([str(tmp_path / "model"), *ids, "--avg-bits", "6", "--out", str(tmp_path / "out")])
        == 0
    )
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "x"


def test_the_command_says_it_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    integers.gptq(tmp_path / "model")
    _said(group_size=64)(tmp_path / "model")
    dataset = ["--dataset", str(write_ids(tmp_path / "ids.npy")), "--out", str(tmp_path / "out")]
    assert main([str(tmp_path / "model"), "--avg-bits", "5", *dataset]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(tmp_path / "model"), "--avg-bits", "5", *dataset, "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_bytes_before_are_those_that_are_read(tmp_path: Path) -> None:
    integers.gptq(tmp_path)
    source = open_source(str(tmp_path))
    shutil.copyfile(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")
    assert source.weight_files() == [tmp_path / "model.safetensors"]
    index = {"weight_map": {"a": "../a.safetensors"}}
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="must lie beside the index"):
        source.weight_files()
