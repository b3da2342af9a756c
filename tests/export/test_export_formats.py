"""Each format that compressed-tensors has beside MXFP4, MXFP8 and integers of 4 and 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exported import export, fake_model, loaded, logits, packed
from tiny import read
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from mixbits.errors import UsageError
from mixbits.export import auto_round, compressed_tensors, gguf
from mixbits.export.__main__ import main
from mixbits.formats import reference
from mixbits.formats.pack import Packed, pack
from mixbits.formats.schemes import parse_scheme
from mixbits.runtime.fake import fake_quantize_model
from mixbits.source.source import open_source

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

ROWS, COLUMNS = 33, 256
LAYOUTS = {
    "NVFP4A16": "nvfp4-pack-quantized",
    "NVFP4xMXFP8": "nvfp4-pack-quantized",
    "MXFP4xMXFP8": "mxfp4-pack-quantized",
    "MXFP8xMXFP4": "mxfp8-quantized",
    "MXFP6A16": "mxfp6-pack-quantized",
    "MXFP6xMXFP8": "mxfp6-pack-quantized",
    "FP8": "float-quantized",
    "FP8A16": "naive-quantized",
    "FP8xINT8": "float-quantized",
    "W2A16": "pack-quantized",
    "W3A16": "pack-quantized",
    "W3A16G32ASYM": "pack-quantized",
    "W5A16G64": "pack-quantized",
    "W5A16ASYM": "pack-quantized",
    "W6A16": "pack-quantized",
    "W6A16G64ASYM": "pack-quantized",
    "W4xFP8": "pack-quantized",
    "W8G32xMXFP8": "pack-quantized",
    "W4xINT8": "int-quantized",
    "W8G64xINT8": "int-quantized",
    "W3G32ASYMxINT8": "int-quantized",
}


def weight(fmt: Any) -> tuple[Packed, Tensor]:
    """A weight with rows of one sign, of zeros, of one outlier and of all sizes; and its value."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    x[0], x[1], x[2] = x[0].abs(), -x[1].abs(), 0
    x[3, 7] = 1e4
    x *= torch.logspace(-6, 3, ROWS, 2)[:, None]
    quantized = reference.quantize(x, fmt)
    return pack(quantized, fmt), reference.dequantize(quantized, fmt)


@pytest.mark.parametrize("name", LAYOUTS)
def test_compressed_tensors_reads_the_same_values(name: str) -> None:
    scheme = parse_scheme(name, act_scale_mode="even")
    stored, value = weight(scheme.weight)
    made = compressed_tensors.tensors(stored, scheme, COLUMNS)
    said = compressed_tensors.shapes(scheme, ROWS, COLUMNS, torch.float16)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in made.items()} == said
    group = compressed_tensors.quantization_config({"a": scheme}, [])["config_groups"]["group_0"]
    assert group["format"] == LAYOUTS[name]
    there = QuantizationScheme(**group)
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    inputs = scheme.activation
    packed_as_for_vllm = not scheme.format.is_float and inputs is not None and inputs.is_float
    assert compressor.can_compress(nn.Linear, there) != packed_as_for_vllm
    if made["weight_scale"].dtype == torch.float16:
        made["weight_scale"] = made["weight_scale"].float()  # or it rounds products to float16
    plain = compressor.decompress(made, there)["weight"]
    assert plain.dtype == (torch.float32 if scheme.format.scale[:5] == "float" else torch.bfloat16)
    assert torch.equal(plain, value.to(plain.dtype))


@pytest.mark.parametrize(
    "schemes",
    [
        "NVFP4A16,MXFP6A16,MXFP6xMXFP8,BF16",
        "MXFP4xMXFP8,NVFP4xMXFP8,MXFP8xMXFP4,NVFP4xMXFP4",
        "W2A16G32,W3A16G32,W5A16G32,W6A16G32",
        "W4G32xMXFP8,MXFP6xMXFP4,W6G32xMXFP4",
    ],
)
def test_transformers_computes_the_same(tmp_path: Path, schemes: str) -> None:
    source, assignment, folder = packed(tmp_path, schemes)
    model = loaded(export(folder, "compressed-tensors"))
    assert torch.equal(logits(model), logits(fake_model(source, assignment)))


@pytest.mark.parametrize(
    "schemes",
    [
        "FP8,FP8A16,BF16",
        "W4G32xINT8,W8G32xINT8,W4G32xFP8",
        "FP8xINT8,FP8xMXFP8,W6G32xINT8,W3G32xFP8",
    ],
)
def test_in_float32_it_rounds_whole_rows_as_we_do(tmp_path: Path, schemes: str) -> None:
    source, assignment, folder = packed(tmp_path, schemes)
    model = loaded(export(folder, "compressed-tensors"), torch.float32)
    wide = source.load().float()
    fake_quantize_model(wide, assignment)
    assert torch.equal(logits(model), logits(wide))


def test_activations_that_it_rounds_otherwise_stay_in_16_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights keep codes and scales; what the loaders make of the folder is said."""
    source, assignment, folder = packed(tmp_path, "NVFP4,FP8xMXINT8", head=False)
    argv = [str(folder), "--format", "compressed-tensors", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "which needs, for a linear's inputs, a scale that was measured beforehand" in error
    assert "is FP8xMXINT8;" in error and error.count("\n") == 1
    assert main([*argv, "--lossy"]) == 0
    printed = capsys.readouterr().out
    assert "14 packed linears, 14 of them converted" in printed
    assert "every weight stands for the same number as before" in printed
    assert "load it with dtype=torch.float32 for the same numbers" in printed
    assert "vLLM does not run NVFP4A16 as they are" in printed
    report = read(tmp_path / "out" / "mixbits-export.json")
    assert {one["scheme"] for one in report["linears"].values()} == {"NVFP4A16", "FP8A16"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A model for transformers, in the format `compressed-tensors`" in card
    assert "vllm serve" not in card
    weights = fake_model(source, assignment).state_dict()
    model = loaded(tmp_path / "out")
    logits(model)  # it decompresses in the first step
    for name, recipe in assignment.items():
        if recipe.name == "NVFP4":
            value = weights[f"{name}.weight_fake"].bfloat16()
            assert torch.equal(model.get_submodule(name).weight, value)


def test_one_format_is_never_written_as_another_of_the_same_element() -> None:
    for name in ("NVFP4A16", "MXINT8A16"):
        scheme = parse_scheme(name)
        with pytest.raises(UsageError, match=f"{name} is not known to auto-round"):
            auto_round.quantization_config({"a": scheme}, [], "model.layers", "auto_round")
        assert (scheme.format.element, scheme.format.scale) not in gguf._TYPES
    with pytest.raises(KeyError):
        compressed_tensors.layout(parse_scheme("MXINT8A16"))


def in_float16(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)


def test_zero_points_beside_rounded_inputs_are_read(tmp_path: Path) -> None:
    """Of integers that are not packed its own loader takes them; float16 holds their scales."""
    source, assignment, folder = packed(
        tmp_path, "W4G32ASYMxINT8,W3G32ASYMxINT8,W8G32ASYMxINT8", change=in_float16
    )
    out = export(folder, "compressed-tensors", "--dtype", "float16")
    model = loaded(out, torch.float32)
    wide = source.load().float()
    fake_quantize_model(wide, assignment)
    assert torch.equal(logits(model), logits(wide))


def test_packed_zero_points_are_read_where_it_dequantizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layout without weights, which transformers fills otherwise, has none that are packed."""
    source, assignment, folder = packed(tmp_path, "W5A16G32ASYM", head=False, change=in_float16)
    out = export(folder, "compressed-tensors", "--dtype", "float16")
    assert "CompressedTensorsConfig(dequantize=True), and fails without" in capsys.readouterr().out
    how = CompressedTensorsConfig(dequantize=True)
    model = loaded(out, torch.float32, quantization_config=how)
    expected = fake_model(source, assignment).state_dict()
    for name in assignment:
        theirs, ours = model.get_submodule(name).weight, expected[f"{name}.weight_fake"]
        # It dequantizes with fewer digits than float32 has.
        torch.testing.assert_close(theirs, ours.float(), rtol=2.0**-7, atol=0)


def test_an_exported_folder_can_be_quantized_again(tmp_path: Path) -> None:
    """A source is read in its own dtype, by compressed-tensors itself."""
    schemes = "NVFP4A16,MXFP6A16,FP8,W3A16G32,W4G32xINT8,W6A16G32,MXFP4xMXFP8"
    source, assignment, folder = packed(tmp_path, schemes)
    again = open_source(str(export(folder, "compressed-tensors"))).weights
    expected = fake_model(source, assignment).state_dict()
    for name, recipe in assignment.items():
        value = expected[f"{name}.weight_fake"].bfloat16()
        assert torch.equal(again.tensor(f"{name}.weight"), value), recipe.name


def test_integers_lose_activations_and_digits_of_scales(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the menu for a CPU plans: other loaders take its weights."""
    _, _, folder = packed(tmp_path, "W3G32xMXINT8,W4G32ASYMxMXINT8", head=False)
    argv = [str(folder), "--format", "compressed-tensors", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.endswith("--target compressed-tensors plans in what it holds\n")
    assert main([*argv, "--lossy"]) == 0
    assert "14 packed linears, 14 of them converted" in capsys.readouterr().out
    report = read(tmp_path / "out" / "mixbits-export.json")
    found = {one["scheme"] for one in report["linears"].values()}
    assert found == {"W3A16G32", "W4A16G32ASYM"}
    errors = report["relative_errors"].values()  # of scales in bfloat16, which has 8 digits
    assert errors and all(0 < error < 2.0**-8 for error in errors)
