"""Texts of data sets on the Hugging Face hub, by what `--dataset` calls them.

    NeelNanda/pile-10k                                          split train, column text
    Salesforce/wikitext:config=wikitext-2-raw-v1:split=test
    allenai/c4:config=en
    HuggingFaceH4/ultrachat_200k:split=train_sft                conversations of its `messages`

`config` and `split` are those of `datasets.load_dataset`. Rows are streamed, as far as needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, plain_errors
from ..files.io import check_file, is_text
from .chats import row_text

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:(config|split|column)=\S+)*", re.ASCII)
_ADVICE = (
    "NAME:config=C:split=S:column=K says which part of a data set; or pass a text, jsonl, .npy or "
    ".json file"
)


@dataclass(frozen=True)
class HubData:
    """A data set, and which part of it."""

    name: str
    config: str | None = None
    split: str = "train"
    column: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubData:
        """Of `NAME[:config=C][:split=S][:column=K]`. Raises UsageError for other settings."""
        name, *parts = text.split(":")
        settings: dict[str, str] = {}
        for part in parts:
            key, _, value = part.partition("=")
            if key not in ("config", "split", "column") or not value or key in settings:
                raise UsageError(
                    f"what follows a data set's name must be config=, split= or column=, once "
                    f"each: got {part!r} ({text})"
                )
            settings[key] = value
        return cls(name, **settings)

    def texts(self, tokenizer: Any) -> Iterator[str]:
        """Text of its rows; rows whose text is missing are left out. Raises UsageError."""
        for number, row in enumerate(self._rows()):
            text = self._text(row, tokenizer, number)
            if text is not None:
                yield text

    def _rows(self) -> Iterator[dict[str, Any]]:
        def sentence(why: str) -> str:
            return (
                f"{self.name!r} is no file, and no dataset of that name could be fetched "
                f"({why}): {_ADVICE}"
            )

        config = [] if self.config is None else [self.config]
        with plain_errors(sentence):
            from datasets import load_dataset

            found = load_dataset(self.name, *config, split=self.split, streaming=True)
            rows: Iterator[dict[str, Any]] = iter(found)
        while True:  # no `yield` in the block: what becomes of a row is not the hub's
            with plain_errors(sentence):
                row = next(rows, None)
            if row is None:
                return
            yield row

    def _text(self, row: dict[str, Any], tokenizer: Any, number: int) -> str | None:
        try:
            return row_text(row, tokenizer, f"{self.name}, row {number}", self.column)
        except KeyError as error:
            raise UsageError(
                f"dataset {self.name!r} has no column {self.column or 'text'!r} but "
                f"{sorted(row)}: {_ADVICE}"
            ) from error
        except TypeError as error:
            raise UsageError(
                f"column '{error}' of dataset {self.name!r} must hold text: "
                f"got {type(row[str(error)]).__name__}; {_ADVICE}"
            ) from error


JSONL = (".jsonl", ".ndjson")
_READ = {".txt", ".json", ".npy", *JSONL}

# Data, but none that is read here: as text they would be noise.
_OTHERS = {".csv", ".tsv", ".parquet", ".arrow", ".feather", ".orc", ".npz", ".pt", ".pth", ".bin"}
_OTHERS |= {".pkl", ".pickle", ".safetensors", ".gguf", ".h5", ".hdf5", ".tfrecord", ".msgpack"}
_OTHERS |= {".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".rar", ".lz4", ".sqlite"}
_OTHERS |= {".db", ".xls", ".xlsx", ".pdf", ".doc", ".docx", ".odt", ".epub"}


def is_dataset_name(text: str) -> bool:
    """Whether a text is the name of a file, or may be one of the hub: what no text to read is."""
    has_suffix = len(text) < 1000 and "\n" not in text and Path(text).suffix.lower() in _READ
    return has_suffix or os.path.isfile(text) or bool(_HUB_NAME.fullmatch(text))


def check_datasets(option: str, sources: Sequence[str]) -> None:
    """`check_dataset` for all of an option. Raises UsageError also for one that is there twice."""
    known: dict[Any, str] = {}
    for source in sources:
        check_dataset(source)
        key = dataset_key(source)
        if key in known:
            raise UsageError(
                f"{option} must name each dataset once: got {known[key]}, and {source} again"
            )
        known[key] = source


def dataset_key(source: str) -> Any:
    """What two names of one dataset have in common: the file, or what they ask the hub for."""
    return os.path.realpath(source) if os.path.exists(source) else HubData.parse(source)


def check_dataset(source: str) -> None:
    """Raises UsageError for what is there and no file of a kind that is read, and for odd names."""
    if not is_text(source):
        raise UsageError(f"--dataset must have a name in UTF-8: got {source!r:.160}")
    if "," in source.partition(":")[0] and not os.path.exists(source):
        raise UsageError(
            f"--dataset must be a file or a dataset name: {source} is no file; several are given "
            "one by one (--dataset A --dataset B)"
        )
    path = Path(source)
    suffix = path.suffix.lower()
    looks_like_file = suffix in _READ | _OTHERS
    exists = os.path.exists(source)  # False for a name that is too long, where Path raises
    if os.path.isdir(source) or (looks_like_file and not exists):
        raise UsageError(f"--dataset must be a file or a dataset name: {source} is no file")
    if exists:
        check_file(path)
        if path.stat().st_size == 0 and suffix not in {".npy", ".json"}:
            raise UsageError(f"--dataset must hold text: {source} is empty")
        if suffix in _OTHERS:
            raise UsageError(
                f"--dataset must be a text, jsonl, .npy or .json file: {source} is {suffix}, which "
                "is not read"
            )
