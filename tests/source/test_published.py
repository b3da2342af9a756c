"""The makers of published layouts, each read by code that is not theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import published
import published_integers as integers
import pytest
import torch
from makers import PLAIN, QUANTIZED, Maker
from published import BLOCK
from published_integers import COMPRESSED
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.tools.tiny_models import SEEING, picture_inputs, text_ids


@pytest.mark.parametrize("maker", {**QUANTIZED, **PLAIN})
def test_every_stored_tensor_is_told_of(maker: str, tmp_path: Path) -> None:
    """Each stored tensor is a plain weight, or part of one; values are finite, and no two equal."""
    if maker in COMPRESSED or maker == "kimi_k2":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    found = {**QUANTIZED, **PLAIN}[maker](tmp_path)
    parts = {part for encoded in found.encoded.values() for part in encoded}
    stored = found.stored
    static = {name for name in stored if name.endswith(".input_scale")}
    assert set(stored) == (set(found.plain) - set(found.encoded)) | parts | static
    assert bool(found.encoded) == (maker in QUANTIZED)
    for name, value in found.plain.items():
        assert value.isfinite().all()
        if name in found.encoded:
            assert value.dtype == torch.float32
            assert value.unique().numel() > 8
        else:
            assert torch.equal(value, stored[name])


@pytest.mark.parametrize("maker", ["deepseek_v3", "deepseek_v31", "qwen3_fp8"])
def test_fp8_blocks(maker: str, tmp_path: Path) -> None:
    """Block by block; and by transformers, whose blocks are those only where none is cut off."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    found = QUANTIZED[maker](tmp_path)
    stored, read = found.stored, 0
    for name in found.encoded:
        codes, scale = stored[name], stored[f"{name}_scale_inv"]
        assert codes.dtype == torch.float8_e4m3fn
        assert scale.shape == tuple(-(-size // BLOCK) for size in codes.shape)
        for i, rows in enumerate(codes.float().split(BLOCK)):
            for j, block in enumerate(rows.split(BLOCK, dim=1)):
                here = found.plain[name][i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
                assert torch.equal(block * scale[i, j].float(), here)
        if all(size <= BLOCK or size % BLOCK == 0 for size in codes.shape):
            theirs = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
            assert torch.equal(theirs, found.plain[name])
            read += 1
    assert read
    scales = torch.cat([stored[f"{name}_scale_inv"].float().flatten() for name in found.encoded])
    assert bool((scales.log2() % 1 == 0).all()) == (maker == "deepseek_v31")


def test_deepseek_v3_has_what_its_class_does_not_take(tmp_path: Path) -> None:
    found = published.deepseek_v3(tmp_path)
    layers = {name.split(".")[2] for name in found.extra}
    ends = {name.split(".", 3)[3] for name in found.extra}
    assert len(layers) == 1
    assert {"eh_proj.weight", "enorm.weight", "shared_head.head.weight"} <= ends
    assert "mlp.experts.3.down_proj.weight_scale_inv" in ends
    bias = [
        n for n in found.plain if n.endswith("e_score_correction_bias") and n not in found.extra
    ]
    assert bias
    for name in bias:
        value = found.plain[name]
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float())  # so that rounding shows


def test_gpt_oss_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import Mxfp4Config
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    found = published.gpt_oss(tmp_path)
    stored = found.stored
    for name, (blocks, scales) in found.encoded.items():
        theirs = convert_moe_packed_tensors(stored[blocks], stored[scales], dtype=torch.float32)
        assert torch.equal(theirs, found.plain[name])
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    own = model.state_dict()
    for name, value in found.plain.items():
        assert torch.equal(own[name], value.to(own[name].dtype)), name


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import CompressedTensorsConfig

    found = integers.compressed(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    own = model.state_dict()
    for weight in found.encoded:
        # Codes times scales of 16 bits are exact in float32: rounded once, both ways.
        assert torch.equal(own[weight].float(), found.plain[weight].bfloat16().float()), weight


def test_kimi_k2_has_experts_in_int4_only(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    found = integers.kimi_k2(tmp_path)
    stored = found.stored
    assert found.encoded
    assert all(".mlp.experts." in name for name in found.encoded)
    for name in found.encoded:
        prefix = name.removesuffix("weight")
        words, scale = stored[f"{prefix}weight_packed"], stored[f"{prefix}weight_scale"]
        rows, columns = stored[f"{prefix}weight_shape"].tolist()
        assert (words.dtype, scale.dtype) == (torch.int32, torch.bfloat16)
        assert scale.shape == (rows, columns // 32)
        codes = torch.stack([(words >> shift & 15) - 8 for shift in range(0, 32, 4)], -1)
        values = codes.flatten(-2)[:, :columns].float()
        each = scale.float().repeat_interleave(32, 1)
        assert torch.equal(values * each, found.plain[name])


def bits_of(words: Tensor, bits: int, index: int) -> Tensor:
    """The `index`-th number of `bits` in a row of int32 words [words, ...]: slow, and plain."""
    word, place = divmod(index * bits, 32)
    return (words[word].long() & 0xFFFFFFFF) >> place & (2**bits - 1)


GPTQ = [
    {"bits": 4},
    {"bits": 4, "sym": False},
    {"bits": 4, "group_size": -1},
    {"bits": 4, "group_size": 32, "desc_act": True},
    {"bits": 4, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"},
    {"bits": 8, "checkpoint_format": "gptq_v2"},
    {"bits": 8, "sym": False},
    {"bits": 2, "group_size": 64},
    {"bits": 2, "sym": False, "group_size": 32},
]


@pytest.mark.parametrize("options", GPTQ, ids=str)
def test_gptq_word_by_word(options: dict[str, Any], tmp_path: Path) -> None:
    found = integers.gptq(tmp_path, "qwen2", **options)
    bits, stored = options["bits"], found.stored
    minus_one = options.get("checkpoint_format", "gptq") == "gptq"
    for name in list(found.encoded)[:3]:
        words, zeros, scales, groups = (stored[part] for part in found.encoded[name])
        for column in range(0, len(groups), 13):
            group = int(groups[column])
            codes = bits_of(words, bits, column)
            each = [int(bits_of(zeros[group], bits, row)) for row in range(len(codes))]
            zero = torch.tensor(each) + minus_one
            expected = (codes - zero).float() * scales[group].float()
            assert torch.equal(expected, found.plain[name][:, column])
    ordered = all(torch.equal(stored[p], stored[p].sort()[0]) for p in stored if "g_idx" in p)
    assert ordered != options.get("desc_act", False)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "sym"), [(2, True), (4, True), (4, False), (8, False)])
def test_gptq_as_auto_round_reads_it(
    bits: int, sym: bool, checkpoint_format: str, tmp_path: Path
) -> None:
    pytest.importorskip("auto_round", reason="auto-round is not installed")
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    found = integers.gptq(tmp_path, bits=bits, sym=sym, checkpoint_format=checkpoint_format)
    reader = qlinear_torch_zp if checkpoint_format == "gptq" else qlinear_torch
    name = next(iter(found.encoded))
    weight = found.plain[name]
    rows, columns = weight.shape
    linear = reader.QuantLinear(bits, 128, columns, rows, bias=False)
    for leaf in ("qweight", "qzeros", "scales"):
        setattr(linear, leaf, found.stored[name.removesuffix("weight") + leaf])
    # Its product is in float16, as its weight: codes times scales, rounded once.
    assert torch.equal(linear(torch.eye(columns).half()).T, weight.half())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("group_size", [128, 64])
def test_awq_as_auto_round_reads_it(kind: str, group_size: int, tmp_path: Path) -> None:
    pytest.importorskip("auto_round", reason="auto-round is not installed")
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    found = integers.awq(tmp_path, kind, group_size)
    stored = found.stored
    for name, parts in found.encoded.items():
        words, zeros, scales = (stored[part] for part in parts)
        theirs = dequantize_gemm(words, zeros, scales, 4, group_size)
        assert torch.equal(theirs.T, found.plain[name].half())


SIGHTED: dict[str, Maker] = PLAIN | {
    kind: lambda folder, kind=kind: published.seeing(folder, kind)
    for kind in SEEING
    if kind not in PLAIN
}


@torch.no_grad()
@pytest.mark.parametrize("kind", SIGHTED)
def test_models_that_see(kind: str, tmp_path: Path) -> None:
    """All tensors but an MTP block's are taken; another picture gives other logits."""
    found = SIGHTED[kind](tmp_path)
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    taken = [value for name, value in found.plain.items() if not name.startswith("mtp.")]
    own = {id(p): p for p in model.parameters()}.values()
    assert sum(p.numel() for p in own) == sum(v.numel() for v in taken)
    inputs = picture_inputs(model.config)
    logits = model(**inputs).logits
    other = model(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits
    assert logits.isfinite().all()
    assert (logits - other).abs().max() > 0.01
    assert model(input_ids=text_ids()).logits.isfinite().all()
    assert (tmp_path / "preprocessor_config.json").is_file()


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        integers.gptq(tmp_path / name, desc_act=True)
        files.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
