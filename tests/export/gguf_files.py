"""What tests read of a GGUF, and a vocabulary for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf", reason="gguf is not installed")


def stored(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings, and the type of every tensor, of a GGUF."""
    reader = gguf.GGUFReader(path)
    settings = {key: field.contents() for key, field in reader.fields.items()}
    return settings, {t.name: t.tensor_type.name for t in reader.tensors}


def add_vocabulary_of_bytes(folder: Path) -> None:
    """transformers reads no GGUF without a vocabulary."""
    data = sentencepiece()
    bytes_ = {f"<0x{i:02X}>": i + 9 for i in range(128) if i != 0x41}
    data["model"]["vocab"] |= {token: i for i, token in enumerate(bytes_, 9)}
    write(folder, {"tokenizer.json": {"version": "1.0", **data}})


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}


def around(*parts: str, **ids: list[int]) -> dict[str, Any]:
    """A post-processor that makes `parts` of a text, which is "A" among them."""
    kinds = [{"Sequence" if part == "A" else "SpecialToken": part} for part in parts]
    special = {"<s>": [0], "</s>": [1], "<unk>": [2], **ids}
    return {
        "type": "TemplateProcessing",
        "single": [{k: {"id": v, "type_id": 0} for k, v in kind.items()} for kind in kinds],
        "pair": [{"Sequence": {"id": i, "type_id": 0}} for i in "AB"],
        "special_tokens": {t: {"id": t, "ids": i, "tokens": [t]} for t, i in special.items()},
    }


def added(number: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


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
    return {**data, "pre_tokenizer": None, "post_processor": around("<s>", "A"), **changes}


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
