"""Small files: read with one sentence for whatever is wrong, and written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from .formats import UsageError, first_line


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(encoded(text))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def encoded(text: str) -> bytes:
    """UTF-8; of what that cannot hold, as names of files may have, an escape (which JSON reads)."""
    return text.encode("utf-8", "backslashreplace")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, too long a number, too deep
        raise UsageError(f"{path} is not JSON: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold a JSON object: got {type(data).__name__}")
    return data
