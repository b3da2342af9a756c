"""Token sequences to measure with, and others to judge by.

A dataset is a text file, a jsonl file (field `text`), a file of token ids (.npy, or .json with a
list or a list of lists), or the name of a Hugging Face dataset. Its text is tokenized without
special tokens, as one stream, and cut into sequences of `seqlen` tokens. The first `nsamples`
sequences calibrate; the next ones are held out, so the two never share a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .formats import UsageError, first_line

CHARS_PER_TOKEN = 16  # more text than this per wanted token is not read at first


@dataclass(frozen=True)
class Sequences:
    """`ids` int64 [sequences, seqlen], where they came from, and the hash of the ids."""

    ids: Tensor
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a report or a scores file records."""
        count, length = self.ids.shape
        return {"source": self.source, "nsamples": count, "seqlen": length, "sha256": self.sha256}


def _jsonl_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UsageError(
                    f"every line of a jsonl dataset must be an object with a field 'text': "
                    f"got {line[:60]!r} ({path}, line {number})"
                ) from None
            yield text


def _hub_texts(name: str) -> Iterator[str]:
    advice = "pass a text, jsonl, .npy or .json file as --dataset instead"
    try:
        from datasets import load_dataset

        rows: Iterable[dict[str, Any]] = load_dataset(name, split="train", streaming=True)
        for row in rows:
            if "text" not in row:
                raise UsageError(
                    f"dataset {name!r} has no column 'text' but {sorted(row)}: {advice}"
                )
            yield str(row["text"])
    except UsageError:
        raise
    except Exception as error:  # the hub client raises dozens of kinds
        raise UsageError(
            f"{name!r} is no file, and no dataset of that name could be fetched "
            f"({first_line(error)}): {advice}"
        ) from None


def _token_ids(path: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list):
                raise TypeError(f"must be a list, or a list of lists: got {type(rows).__name__}")
            nested = bool(rows) and isinstance(rows[0], list)
            array = np.array([i for row in rows for i in row] if nested else rows)
        if not isinstance(array, np.ndarray):
            raise TypeError("must be one array")
    except (ValueError, OSError, TypeError, EOFError) as error:
        raise UsageError(f"cannot read token ids ({path}): {error}") from None
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise UsageError(f"token ids must be integers: got {array.dtype} ({path})")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def _texts(source: str) -> Iterator[str]:
    path = Path(source)
    if not path.is_file():
        yield from _hub_texts(source)
        return
    try:
        if path.suffix == ".jsonl":
            yield from _jsonl_texts(path)
        else:
            with path.open(encoding="utf-8") as file:
                while chunk := file.read(1 << 20):
                    yield chunk
    except UnicodeDecodeError as error:
        raise UsageError(f"a text dataset must be UTF-8: {error} ({path})") from None


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids int64 [tokens] of `text`, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def read_tokens(source: str, tokenizer: Any, count: int) -> Tensor:
    """About the first `count` token ids (or more) of a dataset; fewer if it has no more."""
    path = Path(source)
    looks_like_file = path.suffix in {".txt", ".jsonl", ".json", ".npy"} or path.is_dir()
    if looks_like_file and not path.is_file():
        raise UsageError(f"--dataset must be a file or a dataset name: {source} is no file")
    if path.suffix in {".npy", ".json"}:
        return _token_ids(path)
    if tokenizer is None:
        raise UsageError("the model has no tokenizer: --dataset must be a .npy or .json of ids")
    separator = "\n\n" if path.suffix != ".txt" and not path.is_file() else ""
    if path.suffix == ".jsonl":
        separator = "\n\n"
    limit, text, texts = count * CHARS_PER_TOKEN, "", _texts(source)
    for piece in texts:
        text += separator + piece if text else piece
        if len(text) >= limit:
            ids = tokenize(tokenizer, text)
            if len(ids) >= count:
                return ids
            limit *= 2
    return tokenize(tokenizer, text)


def cut(stream: Tensor, seqlen: int, source: str, vocab_size: int) -> Sequences:
    """A stream of ids [tokens] as sequences of `seqlen`; what is left over is dropped.

    Raises UsageError for ids outside the model's vocabulary.
    """
    if len(stream) and not 0 <= int(stream.min()) <= int(stream.max()) < vocab_size:
        raise UsageError(
            f"token ids must be in 0..{vocab_size - 1}, the model's vocabulary: got "
            f"{int(stream.min())}..{int(stream.max())} ({source}); is it another model's tokenizer?"
        )
    rows = len(stream) // seqlen
    return Sequences(stream[: rows * seqlen].reshape(rows, seqlen), source)


def split(pool: Sequences, nsamples: int, held_out: int) -> tuple[Sequences, Sequences]:
    """The first `nsamples` sequences, and the next `held_out`. Raises UsageError if too few."""
    have, seqlen = pool.ids.shape
    if have < nsamples + held_out:
        what = f"{nsamples} for calibration" if nsamples else ""
        what += (" and " if what and held_out else "") + (
            f"{held_out} held out" if held_out else ""
        )
        raise UsageError(
            f"need {nsamples + held_out} sequences of {seqlen} tokens ({what}): got {have} from "
            f"{pool.source}; give more text, or lower --nsamples, --eval-nsamples or --seqlen"
        )
    first = Sequences(pool.ids[:nsamples].clone(), pool.source)
    return first, Sequences(pool.ids[nsamples : nsamples + held_out].clone(), pool.source)


def load_sequences(
    source: str, tokenizer: Any, vocab_size: int, nsamples: int, held_out: int, seqlen: int
) -> tuple[Sequences, Sequences]:
    """Calibration and held-out sequences of one dataset."""
    stream = read_tokens(source, tokenizer, (nsamples + held_out) * seqlen)
    return split(cut(stream, seqlen, source, vocab_size), nsamples, held_out)
