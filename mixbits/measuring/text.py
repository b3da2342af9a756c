"""Token sequences to measure with, and others to judge by.

A dataset is a text file, a jsonl file (field `text`), a file of token ids (.npy, or .json with a
list or a list of lists), or the name of a Hugging Face dataset (`mixbits.measuring.hub_data`).
Rows may hold conversations in the place of texts (`mixbits.measuring.chats`). Its text is
tokenized without special tokens, as one stream, and cut into sequences of `seqlen` tokens. The
first `nsamples` sequences calibrate; the next ones are held out, so the two never share a token.
Of several datasets sequences are taken in turn, one of each, so that any first n are a mix.

Every sequence begins with the *prefix*: what the tokenizer puts before a text, such as a BOS, for
a model that has never seen text without it may be useless there. The prefix counts in `seqlen`,
and whatever of it a sequence's own tokens begin with (ids that hold it, or texts of chat templates)
is dropped, so that it is there once. What the tokenizer puts after a text is left out: text is cut
anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError, plain_errors
from ..files.io import last_part, read_json
from .chats import Rendered, row_text
from .hub_data import JSONL, HubData, check_dataset

CHARS_PER_TOKEN = 16  # more text than this per wanted token is not read at first
_LINE = 1 << 26  # characters of a line of jsonl: a text has fewer
_MOST_ID = (1 << 31) - 1
_IDS_BYTES = 256 << 20  # of ids in JSON, which take 20 times as much in memory


@dataclass(frozen=True)
class Sequences:
    """`ids` int64 [sequences, seqlen], where they came from, and what each of them begins with.

    `datasets` is how many they were taken from, in turn; `source` then names all of them.
    """

    ids: Tensor
    source: str
    prefix: tuple[int, ...] = ()
    datasets: int = 1

    @classmethod
    def none(cls, seqlen: int, prefix: tuple[int, ...] = ()) -> Sequences:
        return cls(torch.empty(0, seqlen, dtype=torch.int64), "nothing", prefix)

    def __getitem__(self, rows: slice) -> Sequences:
        return replace(self, ids=self.ids[rows].clone())

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
            "source": last_part(self.source),
            **({"datasets": self.datasets} if self.datasets > 1 else {}),
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


def _jsonl_texts(path: Path, tokenizer: Any) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        number = 0
        while line := lines.readline(_LINE):
            number += 1
            if not line.strip():
                continue
            try:
                if len(line) == _LINE:
                    raise ValueError
                text = row_text(json.loads(line), tokenizer, f"{path}, line {number}")
                if text is None:
                    raise TypeError
            except UsageError:
                raise
            # A number of too many digits is a ValueError, too many brackets are a RecursionError.
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UsageError(
                    f"every line of a jsonl dataset must be an object with a field 'text', or "
                    f"'messages' or 'conversations' that hold one: got {line[:60]!r} "
                    f"({path}, line {number})"
                ) from error
            yield text


def _whole_characters(text: str) -> str:
    """JSON may hold half of a surrogate pair, which is no character: U+FFFD takes its place."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _token_ids(path: Path, count: int) -> Tensor:
    """The first `count` ids of an .npy file; nothing else of it is read."""
    what = f"cannot read token ids ({path})"
    with plain_errors(what):  # of the file, its header (which is Python), or a zip in its place
        # Mapped: numpy then compares what the header claims with what is there, before it is made.
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{what}: must be one array")
    if array.size and array.dtype.kind not in "iu":
        raise UsageError(f"token ids must be integers: got {array.dtype!s:.60} ({path})")
    ids = np.array(array.reshape(-1)[:count])
    if len(ids) and (ids.min() < 0 or ids.max() > _MOST_ID):
        raise UsageError(
            f"token ids must be in 0..{_MOST_ID}: got {ids.min()}..{ids.max()} ({path})"
        )
    return torch.from_numpy(ids.astype(np.int64))


def _listed_ids(path: Path) -> Tensor:
    """Of a JSON file with a list of ids, or a list of lists."""
    try:
        rows = read_json(path, _IDS_BYTES)
    except UsageError as error:
        raise UsageError(f"cannot read token ids: {error}") from error
    nested = isinstance(rows, list) and bool(rows) and isinstance(rows[0], list)
    lists = rows if nested else [rows]
    if not all(isinstance(row, list) for row in lists):
        got = next(type(row).__name__ for row in lists if not isinstance(row, list))
        raise UsageError(
            f"cannot read token ids, which must be a list, or a list of lists: got {got} ({path})"
        )
    wrong = (i for row in lists for i in row if type(i) is not int or not 0 <= i <= _MOST_ID)
    if (first := next(wrong, 0)) != 0:
        raise UsageError(
            f"token ids must be integers in 0..{_MOST_ID}: got {reprlib.repr(first)} ({path})"
        )
    return torch.tensor([i for row in lists for i in row], dtype=torch.int64)


def _texts(source: str, tokenizer: Any) -> Iterator[str]:
    path = Path(source)
    if not os.path.isfile(source):
        yield from HubData.parse(source).texts(tokenizer)
        return
    try:
        if path.suffix.lower() in JSONL:
            yield from _jsonl_texts(path, tokenizer)
        else:
            with path.open(encoding="utf-8-sig") as file:
                while chunk := file.read(1 << 20):
                    if "\0" in chunk:
                        raise UsageError(f"a text dataset must be text: got NUL bytes ({path})")
                    yield chunk
    except UnicodeDecodeError as error:
        raise UsageError(f"a text dataset must be UTF-8: {error} ({path})") from error


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids int64 [tokens] of `text`, without special tokens."""
    return torch.tensor(_ids(tokenizer, text, False), dtype=torch.int64)


def read_tokens(source: str, tokenizer: Any, count: int) -> Tensor:
    """About the first `count` token ids (or more) of a dataset; fewer if it has no more."""
    check_dataset(source)
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _token_ids(path, count)
    if suffix == ".json":
        return _listed_ids(path)
    if tokenizer is None:
        raise UsageError("the model has no tokenizer: --dataset must be a .npy or .json of ids")
    separator = "" if os.path.isfile(source) and suffix not in JSONL else "\n\n"
    limit, text, texts = count * CHARS_PER_TOKEN, "", _texts(source, tokenizer)
    for piece in texts:
        apart = separator if text and not isinstance(piece, Rendered) else ""
        text += apart + _whole_characters(piece)
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


def in_turn(count: int, number: int, datasets: int) -> int:
    """How many of `count` sequences, taken from `datasets` in turn, come from dataset `number`."""
    return len(range(number, count, datasets))


def listed(names: list[str]) -> str:
    """Names in a sentence: `a`, `a and b`, `a, b and c`."""
    return " and ".join([part for part in (", ".join(names[:-1]), *names[-1:]) if part])


def _mixed(pools: list[Sequences]) -> Sequences:
    """Sequences of several pools, which have what `in_turn` says, in turn."""
    if len(pools) == 1:
        return pools[0]
    total, several = sum(len(pool.ids) for pool in pools), len(pools)
    ids = torch.empty(total, pools[0].ids.shape[1], dtype=torch.int64)
    for number, pool in enumerate(pools):
        ids[number::several] = pool.ids
    source = listed([last_part(pool.source) for pool in pools])
    return Sequences(ids, source, pools[0].prefix, several)


def split(pools: list[Sequences], nsamples: int, held_out: int) -> tuple[Sequences, Sequences]:
    """The first `nsamples` sequences, and the next `held_out`, of one pool or of several in turn.

    Raises UsageError that names the first pool that has too few.
    """
    total, whole = nsamples + held_out, []
    for number, pool in enumerate(pools):
        have, seqlen = pool.ids.shape
        need = in_turn(total, number, len(pools))
        if have < need:
            what = f"{nsamples} for calibration" if nsamples else ""
            what += (" and " if what and held_out else "") + (
                f"{held_out} held out" if held_out else ""
            )
            what += f", of {len(pools)} datasets in turn" if len(pools) > 1 else ""
            raise UsageError(
                f"need {need} sequences of {seqlen} tokens ({what}): got {have} from "
                f"{pool.source}; give more text, or lower --nsamples, --eval-nsamples or --seqlen"
            )
        whole.append(pool[:need])
    mixed = _mixed(whole)
    return mixed[:nsamples], mixed[nsamples:]


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
    pool = read_sequences(source, tokenizer, vocab_size, count, seqlen, prefix)
    return split([pool], nsamples, held_out)
