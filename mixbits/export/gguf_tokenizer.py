"""The vocabulary of a GGUF, from tokenizer.json: as far as llama.cpp cuts text the same way.

llama.cpp has two tokenizers that models of ours use. "llama" is SentencePiece's: text begins with a
space, spaces are "▁", unknown characters are bytes, and the pair whose token scores highest is
merged first; scores here are the negated ranks of the merges, so that the order is the same.
"gpt2" is byte-level BPE with merges, after a regular expression has cut the text: llama.cpp knows
some expressions by name, and has no way to be told another.

A vocabulary has one token for each row of the embedding, as llama.cpp wants it: ids that
tokenizer.json leaves free are filled with `[PADn]`, marked as unused. Merges, special tokens and
templates are those of `gguf.SpecialVocab`, which `gguf_special` makes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError, first_line
from ..progress import say
from .gguf_special import read_json, special_vocab

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's token types
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
# Other forms of a tokenizer: a folder with one of these has not simply none.
_OTHERS = ("tokenizer*", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "tekken.json")


@dataclass
class Vocabulary:
    """What is written; `model` is "llama" or "gpt2", or "no_vocab" where there is no tokenizer."""

    model: str
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    cut: str | None = None
    add_space_prefix: bool | None = None
    special: Any = None  # gguf.SpecialVocab: merges, special tokens, chat templates


def _parts(value: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The members of a Sequence, or the one thing that stands in its place."""
    if value is None:
        return []
    return list(value[key]) if value["type"] == "Sequence" else [value]


def _space_prefix(data: dict[str, Any]) -> bool | None:
    """Whether a space goes before the text; None if this is not SentencePiece's way with spaces."""
    normal = _parts(data.get("normalizer"), "normalizers")
    before = _parts(data.get("pre_tokenizer"), "pretokenizers")
    if not normal and [p["type"] for p in before] == ["Metaspace"]:
        return bool(before[0].get("prepend_scheme", "always") != "never")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Prepend", "prepend": "▁"}
    if before or normal not in ([replaces], [prefix, replaces]):
        return None
    return len(normal) == 2


def _cut_name(data: dict[str, Any]) -> str | None:
    """llama.cpp's name for the expression that cuts text before byte-level BPE."""
    before = _parts(data.get("pre_tokenizer"), "pretokenizers")
    kinds = [p["type"] for p in before]
    if kinds == ["ByteLevel"] and before[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not before[1].get("use_regex", True):
        return _CUTS.get(before[0]["pattern"].get("Regex", ""))
    return None


def _checked_ids(path: Path, data: dict[str, Any], rows: int) -> dict[str, int]:
    """Token -> id, the added ones among them: one token for each id, one id for each token.

    Ids are checked before anything is as long as the largest of them. Those of added tokens are
    another matter for `tokenizers`, which counts on from the vocabulary: both must agree.
    """
    from tokenizers import Tokenizer

    added = [(token["content"], token["id"]) for token in data.get("added_tokens") or []]
    ids: dict[str, int] = {}
    owners: dict[int, str] = {}
    for token, number in [*data["model"]["vocab"].items(), *added]:
        if type(number) is not int or not 0 <= number < rows:
            raise UsageError(
                f"every token must have a row of the embedding, which has {rows}: tokenizer.json "
                f"gives {_shown(token)} the id {_shown(number)}"
            )
        if ids.setdefault(token, number) != number:
            raise UsageError(
                f"a token must have one id: tokenizer.json gives {_shown(token)} both "
                f"{ids[token]} and {number}"
            )
        if owners.setdefault(number, token) != token:
            raise UsageError(
                f"an id must have one token: tokenizer.json gives {number} to both "
                f"{_shown(owners[number])} and {_shown(token)}"
            )
    read = Tokenizer.from_file(str(path)).get_vocab()
    if read != ids:
        token = min(set(read.items()) ^ set(ids.items()))[0]
        raise UsageError(
            f"a token must have the id by which the tokenizer knows it: tokenizer.json gives "
            f"{_shown(token)} the id {ids.get(token)}, the tokenizers library {read.get(token)}"
        )
    return ids


def _shown(value: Any) -> str:
    """A token, or what stands in its place, in a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _tokens(
    data: dict[str, Any], ids: Mapping[str, int], rows: int, kind: Callable[[str], int]
) -> Vocabulary:
    """Tokens by id; ids that nothing has are marked as unused, as llama.cpp's converter does."""
    full = [(f"[PAD{i}]", _UNUSED) for i in range(rows)]
    for token, number in ids.items():
        full[number] = token, kind(token)
    for token in data.get("added_tokens") or []:
        added = _CONTROL if token.get("special") else _USER
        own = full[token["id"]][1]
        full[token["id"]] = token["content"], own if own in (_UNKNOWN, _BYTE) else added
    return Vocabulary("", [token for token, _ in full], [number for _, number in full])


def _sentencepiece(
    data: dict[str, Any], ids: Mapping[str, int], rows: int, prefix: bool
) -> Vocabulary:
    def kind(token: str) -> int:
        if token == data["model"].get("unk_token"):
            return _UNKNOWN
        return _BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else _NORMAL

    found = _tokens(data, ids, rows, kind)
    found.model, found.add_space_prefix = "llama", prefix
    return found


def _byte_level(data: dict[str, Any], ids: Mapping[str, int], rows: int, cut: str) -> Vocabulary:
    found = _tokens(data, ids, rows, lambda token: _NORMAL)
    found.model, found.cut = "gpt2", cut
    return found


def _convert(data: dict[str, Any], ids: Mapping[str, int], rows: int, lossy: bool) -> Vocabulary:
    prefix = _space_prefix(data)
    if data["model"].get("byte_fallback") and prefix is not None:
        return _sentencepiece(data, ids, rows, prefix)
    parts = _parts(data.get("pre_tokenizer"), "pretokenizers")
    if not parts or parts[-1]["type"] != "ByteLevel":
        raise UsageError("llama.cpp has no tokenizer that is made like the one in tokenizer.json")
    cut = _cut_name(data)
    if cut is None and not lossy:
        raise UsageError(
            "llama.cpp has no name for the expression by which tokenizer.json cuts text: "
            "--lossy takes GPT-2's"
        )
    if cut is None:
        say("text is cut by GPT-2's expression, not by the tokenizer's own: tokens may differ")
    return _byte_level(data, ids, rows, cut or "gpt-2")


def _read(folder: Path, rows: int, lossy: bool) -> Vocabulary:
    data = read_json(folder / "tokenizer.json")
    kind = data["model"]["type"]
    if kind != "BPE":
        raise UsageError(f"llama.cpp needs a BPE or SentencePiece tokenizer: got {_shown(kind)}")
    ids = _checked_ids(folder / "tokenizer.json", data, rows)
    found = _convert(data, ids, rows, lossy)
    found.special = special_vocab(folder, data, ids, rows, lossy)
    if found.model == "llama":  # the only one whose merges are told by scores
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(found.special.merges):
            ranks.setdefault(pair.replace(" ", "", 1), rank)
        found.scores = [-float(ranks.get(token, 0)) for token in found.tokens]
        found.special.merges, found.special.load_merges = [], False
    return found


# What JSON of another shape than a tokenizer's comes to where it is looked through.
_MALFORMED = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def read_vocabulary(folder: Path, rows: int, lossy: bool) -> Vocabulary:
    """The vocabulary of a model folder, whose embedding has `rows`.

    Raises UsageError for a tokenizer that llama.cpp has not, that does not fit the embedding, or
    that cannot be read.
    """
    if not (folder / "tokenizer.json").is_file():
        if any(True for pattern in _OTHERS for _ in folder.glob(pattern)):
            raise UsageError(
                f"--format gguf reads tokenizer.json only: {folder} has none (transformers' "
                "AutoTokenizer writes one with save_pretrained)"
            )
        return Vocabulary("no_vocab")
    try:
        return _read(folder, rows, lossy)
    except UsageError:
        raise
    except BaseException as error:  # of a foreign file: gguf looks no further; tokenizers panics
        # What is written in Rust raises Exception itself, or panics.
        is_rust = type(error) is Exception or type(error).__name__ == "PanicException"
        if not (isinstance(error, _MALFORMED) or is_rust):
            raise
        what = f"{type(error).__name__}: {_shown(first_line(error))}"
        raise UsageError(f"cannot read the tokenizer in {folder} ({what})") from error


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write it with a gguf.GGUFWriter."""
    writer.add_tokenizer_model(vocabulary.model)
    if not vocabulary.tokens:
        return
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.cut is not None:
        writer.add_tokenizer_pre(vocabulary.cut)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    vocabulary.special.add_to_gguf(writer, quiet=True)
    names = writer.kv_data[0].get("tokenizer.chat_templates")
    if names is not None:
        names.value.sort()  # it comes from a set: in another order in every process
