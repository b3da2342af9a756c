"""A GGUF holds the packed weights as they are; llama.cpp and transformers read the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import IDS, export, fake_model, logits, packed
from gguf_files import add_vocabulary_of_bytes, stored
from transformers import AutoModelForCausalLM

from mixbits.export.__main__ import main
from mixbits.export.gguf import _TYPES, blocks, rotary_order
from mixbits.formats import reference
from mixbits.formats.pack import pack
from mixbits.formats.schemes import Format

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
EXACT = "MXFP4A16,W8A16,W4A16G32,BF16,W2A16G64"
FP4 = Format("e2m1", 32)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "fmt",
    [Format("e2m1", 32), *(Format(f"int{b}", g) for b in (2, 4, 8) for g in (32, 64, 128))],
    ids=str,
)
def test_blocks_are_the_same_values(fmt: Format) -> None:
    x = torch.randn(7, 160, generator=torch.Generator().manual_seed(0))  # short groups of 64, 128
    x[1] = 0.0
    quantized = reference.quantize(x, fmt)
    made = blocks(pack(quantized, fmt), fmt, 160).numpy()
    kind = gguf.GGMLQuantizationType[_TYPES[fmt.element, fmt.scale]]
    values = torch.from_numpy(gguf.quants.dequantize(made, kind))
    assert torch.equal(values, reference.dequantize(quantized, fmt))


def test_golden_block() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).view(1, 32)
    codes[0, 0] = 5
    made = blocks(pack(reference.Quantized(codes, torch.tensor([[130]]).byte()), FP4), FP4, 32)
    assert bytes(made[0].tolist()) == bytes.fromhex("82 05 11223344556677 8899aabbccddeeff")


def test_rows_of_a_head_take_turns() -> None:
    assert rotary_order(8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert rotary_order(6, 6).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(tmp_path: Path, kind: str) -> None:
    tied = kind == "qwen3"
    size = {"head_dim": 128} if tied else {}  # it knows no other for a Qwen3
    source, assignment, folder = packed(tmp_path, EXACT, kind=kind, head=not tied, **size)
    add_vocabulary_of_bytes(folder)
    out = export(folder, "gguf")
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    expected = fake_model(source, assignment).float()
    assert (logits(model) - logits(expected)).abs().max() < 1e-4  # rotary tables of its own


@pytest.mark.parametrize(
    ("kind", "changes"), [("llama", {"rope_parameters": LLAMA3}), ("qwen2", {}), ("qwen3", {})]
)
def test_llama_cpp_reads_it(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    source, assignment, folder = packed(tmp_path, EXACT, kind=kind, **changes)
    out = export(folder, "gguf")
    plain = logits(source.load().float())
    expected = logits(fake_model(source, assignment).float())
    assert (plain - expected).norm() > 0.2 * plain.norm()
    model = llama_cpp.Llama(str(out / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
    for row, wanted in zip(IDS, expected, strict=True):
        model.reset()
        model.eval(row.tolist())
        got = torch.from_numpy(model.scores[: len(row)])
        # It rounds activations to 8 bits; what 2- and 4-bit weights do is far more.
        assert (got - wanted).norm() < 0.05 * wanted.norm()
    model.close()


def test_types_and_settings(tmp_path: Path) -> None:
    *_, folder = packed(tmp_path, EXACT, rope_parameters=LLAMA3)
    settings, types = stored(export(folder, "gguf") / "model.gguf")
    assert settings["general.architecture"] == "llama"
    assert settings["llama.attention.head_count_kv"] == 2
    assert types["blk.0.attn_q.weight"] == "MXFP4"
    assert types["blk.0.attn_k.weight"] == "Q8_0"
    assert types["blk.0.attn_v.weight"] == types["blk.0.ffn_gate.weight"] == "Q4_0"
    assert types["blk.0.attn_output.weight"] == types["token_embd.weight"] == "BF16"
    assert types["output_norm.weight"] == types["rope_freqs.weight"] == "F32"
    assert len([t for t in types if t.startswith("blk.")]) == 2 * (7 + 2)
    assert types["output.weight"] == "Q4_0"


def test_activations_are_said_to_be_another_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for schemes, said in (("MXFP4A16", False), ("MXFP4", True)):
        (tmp_path / schemes).mkdir()
        export(packed(tmp_path / schemes, schemes, head=False)[2], "gguf")
        assert ("rounds activations to 8 bits" in capsys.readouterr().out) == said


def test_mxfp8_is_lossy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *_, folder = packed(tmp_path, "MXFP4A16,MXFP8A16", head=False)
    argv = [str(folder), "--format", "gguf", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "it holds whole groups of MXFP4" in capsys.readouterr().err
    assert main([*argv, "--lossy"]) == 0
    report = json.loads((tmp_path / "out" / "mixbits-export.json").read_text())
    assert len(report["relative_errors"]) == 7
    assert all(0 < loss < 0.01 for loss in report["relative_errors"].values())
    types = stored(tmp_path / "out" / "model.gguf")[1]
    assert types["blk.0.attn_q.weight"] == "MXFP4" and types["blk.0.attn_k.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("gemma", {}, "got gemma"),
        ("mistral", {}, "sliding windows"),
        ("llama", {"hidden_act": "gelu"}, "silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
    ],
)
def test_models_that_llama_cpp_runs_otherwise(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    overrides: dict[str, Any],
    message: str,
) -> None:
    *_, folder = packed(tmp_path, "MXFP4A16", kind=kind, head=False, **overrides)
    assert main([str(folder), "--format", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
