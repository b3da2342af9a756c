"""Small files: read with one sentence for whatever is wrong, and written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
from pathlib import Path
from typing import Any

from .formats import UsageError, first_line

_SNAPSHOT = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+$")


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


def last_part(name: str) -> str:
    """What a report calls a model or a text: of a path on this machine the last part only."""
    try:
        local = Path(name).is_absolute() or Path(name).exists()
    except (OSError, ValueError):  # too long for a path, or none at all
        return name
    return hub_name(Path(name)) or Path(os.path.abspath(name)).name if local else name


def hub_name(folder: Path) -> str | None:
    """What the hub calls a folder of its cache; None of any other."""
    found = _SNAPSHOT.search(os.path.abspath(folder))
    return f"{found[1]}/{found[2]}" if found else None


def without_folders(command: str) -> str:
    """A command line as it was typed, but of absolute paths the last part only.

    What a --prompt says is no path.
    """
    words = shlex.split(command)
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.rpartition("=")
        is_path = value.startswith("/") and (not option or option.startswith("--"))
        if is_path and "--prompt" not in (before, option):
            word = option + equals + (Path(value).name or value)
        shown.append(word)
    return shlex.join(shown)


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
