"""A GGUF holds the packed weights as they are; llama.cpp and transformers read the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import IDS, export, fake_model, logits, packed
from transformers import AutoModelForCausalLM

from mixbits import reference
from mixbits.export.__main__ import main
from mixbits.export.gguf import _TYPES, blocks, rotary_order
from mixbits.export.gguf_tokenizer import Vocabulary, read_vocabulary
from mixbits.formats import Format, UsageError
from mixbits.pack import pack

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
    kind = gguf.GGMLQuantizationType[_TYPES[fmt.element]]
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


def stored(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings, and the type of every tensor, of a GGUF."""
    reader = gguf.GGUFReader(path)
    settings = {key: field.contents() for key, field in reader.fields.items()}
    return settings, {t.name: t.tensor_type.name for t in reader.tensors}


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


# --- tokenizers ----------------------------------------------------------------------------------

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


def added(number: int, content: str, special: bool = True) -> dict[str, Any]:
    return {"id": number, "content": content, "special": special}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    vocab = ["<s>", "</s>", "<unk>", "<0x41>", "▁", "a", "b", "ab", "▁ab"]
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "byte_fallback": True,
        "vocab": {token: i for i, token in enumerate(vocab)},
        "merges": [["a", "b"], ["▁", "ab"]],
    }
    data = {"model": model, "added_tokens": [added(0, "<s>"), added(1, "</s>"), added(2, "<unk>")]}
    data |= {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}}
    return {**data, "pre_tokenizer": None, "post_processor": BOS_FIRST, **changes}


def add_vocabulary_of_bytes(folder: Path) -> None:
    """transformers reads no GGUF without a vocabulary."""
    data = sentencepiece()
    bytes_ = {f"<0x{i:02X}>": i + 9 for i in range(128) if i != 0x41}
    data["model"]["vocab"] |= {token: i for i, token in enumerate(bytes_, 9)}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", **data}))


class Config:
    vocab_size = 12
    bos_token_id = 0
    eos_token_id = [1]  # noqa: RUF012


def vocabulary(tmp_path: Path, data: Any, lossy: bool = False) -> Vocabulary:
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    return read_vocabulary(tmp_path, Config(), lossy)


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    found = vocabulary(tmp_path, sentencepiece())
    assert found.chat_template == "{{ x }}"
    assert found.model == "llama" and found.merges is None
    assert found.tokens[6:] == ["b", "ab", "▁ab", "[PAD9]", "[PAD10]", "[PAD11]"]
    assert found.types == [3, 3, 2, 6, 1, 1, 1, 1, 1, 5, 5, 5]
    assert found.scores is not None and found.scores[7] > found.scores[8]  # merged first
    assert found.flags == {"add_space_prefix": True, "add_bos_token": True, "add_eos_token": False}
    assert found.ids == {"bos": 0, "eos": 1}


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({"normalizer": REPLACE}, False),
        ({"normalizer": None, "pre_tokenizer": METASPACE}, True),
        ({"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": "never"}}, False),
    ],
)
def test_the_space_before_a_text(tmp_path: Path, changes: dict[str, Any], prefix: bool) -> None:
    assert vocabulary(tmp_path, sentencepiece(**changes)).flags["add_space_prefix"] is prefix


def byte_level(before: Any) -> dict[str, Any]:
    vocab = {"a": 0, "b": 1, "ab": 2}
    model = {"type": "BPE", "vocab": vocab, "merges": ["a b"]}
    extra = [added(3, "<|end|>"), added(4, "<tool>", special=False)]
    data = {"model": model, "added_tokens": extra, "normalizer": None}
    return {**data, "pre_tokenizer": before, "post_processor": None}


BYTES = {"type": "ByteLevel", "use_regex": False}


def split(expression: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": expression}}
    return {"type": "Sequence", "pretokenizers": [cut, BYTES]}


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    gpt2 = vocabulary(tmp_path, byte_level({"type": "ByteLevel", "use_regex": True}))
    assert (gpt2.model, gpt2.cut, gpt2.merges) == ("gpt2", "gpt-2", ["a b"])
    assert gpt2.types[:6] == [1, 1, 1, 3, 4, 5] and gpt2.flags["add_bos_token"] is False
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert vocabulary(tmp_path, byte_level(split(llama3))).cut == "llama-bpe"
    qwen2 = llama3.replace("{1,3}", "")
    assert vocabulary(tmp_path, byte_level(split(qwen2))).cut == "qwen2"


def test_tokenizers_that_llama_cpp_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="no name for the expression"):
        vocabulary(tmp_path, byte_level(split(r"\w+|.")))
    assert vocabulary(tmp_path, byte_level(split(r"\w+|.")), lossy=True).cut == "gpt-2"
    assert "tokens may differ" in capsys.readouterr().out
    with pytest.raises(UsageError, match="WordLevel"):
        vocabulary(tmp_path, {**sentencepiece(), "model": {"type": "WordLevel"}})
    with pytest.raises(UsageError, match="made like"):
        vocabulary(tmp_path, sentencepiece(normalizer={"type": "NFKC"}))
    with pytest.raises(UsageError, match="cannot read"):
        vocabulary(tmp_path, {"model": {"type": "BPE"}})
    (tmp_path / "tokenizer.json").unlink()
    assert read_vocabulary(tmp_path, Config(), False).model == "no_vocab"
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UsageError, match=r"tokenizer\.json only"):
        read_vocabulary(tmp_path, Config(), False)


TEXT = (Path(__file__).parent / "tiny.py").read_text(encoding="utf-8").replace("<", "(")
HARD = "It's 12345 o'clock,  DON'T\n\n\tÜnïcode 你好 🙂 x=1;  \r\n end "
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(cut: str) -> Any:
    """A tokenizer of each kind, trained on a little text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    if cut == "llama":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        pieces = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        words = [f"▁{word}" for word in TEXT.split()]  # merges do not cross spaces
        tokenizer.train_from_iterator(words, pieces)
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    expression = {"llama-bpe": QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"), "qwen2": QWEN2}.get(cut)
    split = [] if expression is None else [pre_tokenizers.Split(Regex(expression), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=bytes_, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.mark.parametrize("cut", ["llama", "gpt-2", "llama-bpe", "qwen2"])
def test_llama_cpp_cuts_text_the_same_way(tmp_path: Path, cut: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokenizer = trained(cut)
    *_, folder = packed(tmp_path, "MXFP4A16", vocab_size=tokenizer.get_vocab_size(), head=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    path = export(folder, "gguf") / "model.gguf"
    assert stored(path)[0].get("tokenizer.ggml.pre", "llama") == cut
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in [HARD, *TEXT.splitlines()]:
        if text:
            tokens = model.tokenize(text.encode(), add_bos=False, special=False)
            assert tokens == tokenizer.encode(text, add_special_tokens=False).ids, text
    model.close()
