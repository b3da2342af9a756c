"""The vocabulary of a GGUF, from tokenizer.json: as far as llama.cpp cuts text the same way.

llama.cpp has two tokenizers that models of ours use. "llama" is SentencePiece's: text begins with a
space, spaces are "▁", unknown characters are bytes, and the pair whose token scores highest is
merged first; scores here are the negated ranks of the merges, so that the order is the same.
"gpt2" is byte-level BPE with merges, after a regular expression has cut the text: llama.cpp knows
some expressions by name, and has no way to be told another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..formats import UsageError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's token types
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


@dataclass
class Vocabulary:
    """What is written; `model` is "llama" or "gpt2", or "no_vocab" where there is no tokenizer."""

    model: str
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    merges: list[str] | None = None
    cut: str | None = None
    flags: dict[str, bool] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = None


def _parts(value: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The members of a Sequence, or the one thing that stands in its place."""
    if value is None:
        return []
    return list(value[key]) if value["type"] == "Sequence" else [value]


def _space_prefix(data: dict[str, Any]) -> bool | None:
    """Whether a space goes before the text; None if this is not SentencePiece's way with spaces."""
    normal = _parts(data["normalizer"], "normalizers")
    before = _parts(data["pre_tokenizer"], "pretokenizers")
    if not normal and [p["type"] for p in before] == ["Metaspace"]:
        return bool(before[0].get("prepend_scheme", "always") != "never")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Prepend", "prepend": "▁"}
    if before or normal not in ([replaces], [prefix, replaces]):
        return None
    return len(normal) == 2


def _cut_name(data: dict[str, Any]) -> str | None:
    """llama.cpp's name for the expression that cuts text before byte-level BPE."""
    before = _parts(data["pre_tokenizer"], "pretokenizers")
    kinds = [p["type"] for p in before]
    if kinds == ["ByteLevel"] and before[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not before[1].get("use_regex", True):
        return _CUTS.get(before[0]["pattern"].get("Regex", ""))
    return None


def _merge_pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(first, second) for first, second in pairs]


def _tokens(data: dict[str, Any], size: int, kind: Callable[[str], int]) -> Vocabulary:
    """Tokens by id, the added ones among them; ids that nothing has are marked as unused."""
    by_id = {i: (token, kind(token)) for token, i in data["model"]["vocab"].items()}
    for token in data["added_tokens"]:
        own = by_id.get(token["id"], ("", _NORMAL))[1]
        added = _CONTROL if token["special"] else _USER
        by_id[token["id"]] = (token["content"], own if own == _UNKNOWN else added)
    full = [by_id.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(max(size, max(by_id) + 1))]
    return Vocabulary("", [token for token, _ in full], [number for _, number in full])


def _sentencepiece(data: dict[str, Any], size: int, prefix: bool) -> Vocabulary:
    model = data["model"]

    def kind(token: str) -> int:
        if token == model.get("unk_token"):
            return _UNKNOWN
        return _BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else _NORMAL

    found = _tokens(data, size, kind)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_merge_pairs(model)):
        ranks.setdefault("".join(pair), rank)
    found.model = "llama"
    found.scores = [-float(ranks.get(token, 0)) for token in found.tokens]
    found.flags["add_space_prefix"] = prefix
    return found


def _byte_level(data: dict[str, Any], size: int, cut: str) -> Vocabulary:
    found = _tokens(data, size, lambda token: _NORMAL)
    found.model, found.cut = "gpt2", cut
    found.merges = [" ".join(pair) for pair in _merge_pairs(data["model"])]
    return found


def _special_ends(data: dict[str, Any]) -> dict[str, bool]:
    """Whether a token is put before, and after, every text."""
    parts = _parts(data["post_processor"], "processors")
    single: list[Any] = next((p["single"] for p in parts if p["type"] == "TemplateProcessing"), [])
    ends = [single[i] for i in (0, -1)] if single else [{}, {}]
    first, last = ("SpecialToken" in end for end in ends)
    return {"add_bos_token": first, "add_eos_token": last}


def _convert(data: dict[str, Any], size: int, lossy: bool) -> Vocabulary:
    model = data["model"]
    if model["type"] != "BPE":
        raise UsageError(f"llama.cpp needs a BPE or SentencePiece tokenizer: got {model['type']}")
    prefix = _space_prefix(data)
    if model.get("byte_fallback") and prefix is not None:
        return _sentencepiece(data, size, prefix)
    parts = _parts(data["pre_tokenizer"], "pretokenizers")
    if not parts or parts[-1]["type"] != "ByteLevel":
        raise UsageError("llama.cpp has no tokenizer that is made like the one in tokenizer.json")
    cut = _cut_name(data)
    if cut is None and not lossy:
        raise UsageError(
            "llama.cpp has no name for the expression by which tokenizer.json cuts text: "
            "--lossy takes GPT-2's"
        )
    if cut is None:
        print("text is cut by GPT-2's expression, not by the tokenizer's own: tokens may differ")
    return _byte_level(data, size, cut or "gpt-2")


def read_vocabulary(folder: Path, config: Any, lossy: bool) -> Vocabulary:
    """The vocabulary of a model folder.

    Raises UsageError for a tokenizer that llama.cpp has not.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        if any(folder.glob("tokenizer*")) or any(folder.glob("*.model")):
            raise UsageError(f"--format gguf reads tokenizer.json only: {folder} has none")
        return Vocabulary("no_vocab")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = _convert(data, config.vocab_size, lossy)
        found.flags |= _special_ends(data)
        found.chat_template = _chat_template(folder)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cannot read {path}: {error!r}") from None
    for name in ("bos", "eos"):
        number = getattr(config, f"{name}_token_id", None)
        number = number[0] if isinstance(number, list) else number
        if number is not None:
            found.ids[name] = number
    return found


def _chat_template(folder: Path) -> str | None:
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = json.loads(config.read_text("utf-8")).get("chat_template") if config.is_file() else 0
    return template if isinstance(template, str) else None


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write it with a gguf.GGUFWriter."""
    writer.add_tokenizer_model(vocabulary.model)
    if not vocabulary.tokens:
        return
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.cut is not None:
        writer.add_tokenizer_pre(vocabulary.cut)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
    for name, value in vocabulary.flags.items():
        getattr(writer, f"add_{name}")(value)
    for name, number in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
