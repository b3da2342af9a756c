"""Reads the bundled task's questions from the file beside this one, without any network."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset, DatasetDict

_QUESTIONS = Path(__file__).resolve().parent / "stdlib_next_line.jsonl"


def load(**_: object) -> DatasetDict:
    """The questions as a dataset; lm-eval passes the task's metadata, which is not needed."""
    lines = _QUESTIONS.read_text(encoding="utf-8").split("\n")
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in lines if line]))
