"""Outputs to be replaced, and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixbits.files.atomic import (
    atomic_folder,
)


def ours(folder: Path, text: str = "old") -> Path:
    with atomic_folder(folder) as partial:
        (partial / "plan.json").write_text(text)
        (partial / "sub").mkdir()
        (partial / "sub" / "code.py").write_text("pass")
    return folder


def replace(out: Path, text: str = "new", **options: Any) -> None:
    with atomic_folder(out, overwrite=True, **options) as folder:
        (folder / "plan.json").write_text(text)


def said(out: Path) -> str:
    return (out / "plan.json").read_text()
