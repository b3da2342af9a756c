"""Token sequences to measure with, and others to judge by.

A dataset is a text file, a jsonl file (field `text`), a file of token ids (.npy, or .json with a
list or a list of lists), or the name of a Hugging Face dataset. Its text is tokenized without
special tokens, as one stream, and cut into sequences of `seqlen` tokens. The first `nsamples`
sequences calibrate; the next ones are held out, so the two never share a token.

Every sequence begins with the *prefix*: what the tokenizer puts before a text, such as a BOS, for
a model that has never seen text without it may be useless there. The prefix counts in `seqlen`,
and whatever of it a sequence's own tokens begin with (ids that hold it, or texts of chat templates)
is dropped, so that it is there once. What the tokenizer puts after a text is left out: text is cut
anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from .early import check_dataset
from .formats import UsageError, first_line

CHARS_PER_TOKEN = 16  # more text than this per wanted token is not read at first


@dataclass(frozen=True)
class Sequences:
    """`ids` int64 [sequences, seqlen], where they came from, and what each of them begins with."""

    ids: Tensor
    source: str
    prefix: tuple[int, ...] = ()

    @classmethod
    def none(cls, seqlen: int, prefix: tuple[int, ...] = ()) -> Sequences:
        return cls(torch.empty(0, seqlen, dtype=torch.int64), "nothing", prefix)

    def __getitem__(self, rows: slice) -> Sequences:
        return Sequences(self.ids[rows].clone(), self.source, self.prefix)

    @property
    def judged_from(self) -> int:
        """The first position whose prediction is judged: that of the first token of the text.

        The prefix's last token predicts it. What is predicted before that are tokens of the prefix,
        which no model is asked for.
        """
        return max(len(self.prefix) - 1, 0)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a report or a scores file records."""
        count, length = self.ids.shape
        return {
            "source": self.source,
            "nsamples": count,
            "seqlen": length,
            "prefix": list(self.prefix),
            "sha256": self.sha256,
        }


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def prefix_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that a tokenizer puts before a text; none without a tokenizer.

    They are asked for, not looked up: a tokenizer that knows a BOS need not put it anywhere.
    """
    if tokenizer is None:
        return ()
    texts = "The sum of all", "a = 1", "Zwei"
    for text in texts:
        plain, whole = (_ids(tokenizer, text, special) for special in (False, True))
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])
    # Special tokens change how the text is split: what all texts begin with is no text.
    wholes = [_ids(tokenizer, text, True) for text in texts]
    same = [len(set(column)) == 1 for column in zip(*wholes, strict=False)]
    return tuple(wholes[0][: [*same, False].index(False)])


def begin(ids: Tensor, prefix: tuple[int, ...]) -> Tensor:
    """Token ids int64 [tokens] of a text, with the prefix before it, once."""
    count = next((i for i, token in enumerate(ids.tolist()) if token not in prefix), len(ids))
    return torch.cat([torch.tensor(prefix, dtype=torch.int64), ids[count:]])


def _jsonl_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError
            # A number of too many digits is a ValueError, too many brackets are a RecursionError.
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UsageError(
                    f"every line of a jsonl dataset must be an object with a field 'text': "
                    f"got {line[:60]!r} ({path}, line {number})"
                ) from None
            yield _whole_characters(text)


def _whole_characters(text: str) -> str:
    """JSON may hold half of a surrogate pair, which is no character: U+FFFD takes its place."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
            text = row["text"]
            if text is None:  # as a text that was removed
                continue
            if not isinstance(text, str):
                raise UsageError(
                    f"column 'text' of dataset {name!r} must hold text: "
                    f"got {type(text).__name__}; {advice}"
                )
            yield _whole_characters(text)
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
    except (ValueError, OSError, TypeError, EOFError, MemoryError, RecursionError, BadZipFile) as e:
        raise UsageError(f"cannot read token ids ({path}): {first_line(e)}") from None
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
    return torch.tensor(_ids(tokenizer, text, False), dtype=torch.int64)


def read_tokens(source: str, tokenizer: Any, count: int) -> Tensor:
    """About the first `count` token ids (or more) of a dataset; fewer if it has no more."""
    check_dataset(source)
    path = Path(source)
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


def cut(
    stream: Tensor,
    seqlen: int,
    source: str,
    vocab_size: int,
    prefix: tuple[int, ...] = (),
    most: int | None = None,
) -> Sequences:
    """A stream of ids [tokens] as (at `most` so many) sequences of `seqlen`, each with `prefix`.

    What is left over is dropped. Raises UsageError for ids outside the model's vocabulary, and
    where the prefix leaves no room for text.
    """
    ends = [*prefix, *([int(stream.min()), int(stream.max())] if len(stream) else [])]
    if ends and not 0 <= min(ends) <= max(ends) < vocab_size:
        raise UsageError(
            f"token ids must be in 0..{vocab_size - 1}, the model's vocabulary: got "
            f"{min(ends)}..{max(ends)} ({source}); is it another model's tokenizer?"
        )
    length = seqlen - len(prefix)
    if length < 1:
        raise UsageError(
            f"--seqlen must be above {len(prefix)}, the tokens that the tokenizer puts before a "
            f"text: got {seqlen}"
        )
    own = stream.numpy()
    in_prefix = np.isin(own, prefix)
    rows: list[Any] = []
    at = 0
    while most is None or len(rows) < most:
        while at < len(own) and in_prefix[at]:
            at += 1
        if at + length > len(own):
            break
        rows.append(own[at : at + length])
        at += length
    texts = torch.from_numpy(np.array(rows, np.int64).reshape(-1, length))
    before = torch.tensor(prefix, dtype=torch.int64).expand(len(texts), -1)
    return Sequences(torch.cat([before, texts], 1), source, prefix)


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
    return pool[:nsamples], pool[nsamples : nsamples + held_out]


def read_sequences(
    source: str, tokenizer: Any, vocab_size: int, count: int, seqlen: int, prefix: tuple[int, ...]
) -> Sequences:
    """The first `count` sequences of a dataset; fewer if it has no more."""
    wanted = count * seqlen
    while True:
        stream = read_tokens(source, tokenizer, wanted)
        pool = cut(stream, seqlen, source, vocab_size, prefix, count)
        if len(pool.ids) == count or len(stream) < wanted:
            return pool
        wanted *= 2  # tokens were dropped: the text holds its own prefixes


def load_sequences(
    source: str,
    tokenizer: Any,
    vocab_size: int,
    nsamples: int,
    held_out: int,
    seqlen: int,
    bos: bool = True,
) -> tuple[Sequences, Sequences]:
    """Calibration and held-out sequences of one dataset; without the prefix if not `bos`."""
    prefix = prefix_tokens(tokenizer) if bos else ()
    count = nsamples + held_out
    return split(
        read_sequences(source, tokenizer, vocab_size, count, seqlen, prefix), nsamples, held_out
    )
