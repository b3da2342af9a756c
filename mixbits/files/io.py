"""Small files: read with one sentence for whatever is wrong, and written whole or not at all.

What is read may be another's: damaged, endless, or made to do harm. So nothing is opened that is no
regular file of a sane size, and JSON must say one thing: no key twice, no half of a surrogate pair,
which could not be written again, and no more depth than code that walks it can take.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import UsageError, first_line

_SNAPSHOT = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+$")
CONFIG_BYTES = 64 << 20  # an index of 10^5 tensors takes 10 MB; configurations take kilobytes
DATA_BYTES = 4 << 30  # scores of 10^12 weights, in slabs of 32 columns, take 1 or 2 GB
_DEPTH = 100  # ours and transformers' JSON needs 10

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


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


def check_file(path: Path, most: int | None = None) -> None:
    """Raise UsageError unless a path is a regular file (links followed) of at most `most` bytes.

    It is not opened: to open a pipe waits for whoever writes, and a device may have no end.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise UsageError(f"cannot read {path}: {_why(error)}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise UsageError(f"{path} must be a regular file: got {kind}")
    if most is not None and found.st_size > most:
        raise UsageError(
            f"{path} must have at most {most:,} bytes for what it is: got {found.st_size:,}"
        )


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises UsageError."""
    check_file(path, most)
    try:
        if path.stat().st_size == 0:  # nothing, or what the kernel makes up while it is read
            return b""
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {_why(error)}") from error
    if len(data) > most:  # it grows
        raise UsageError(f"{path} must have at most {most:,} bytes for what it is: got more")
    return data


def read_json(path: Path, most: int = CONFIG_BYTES) -> Any:
    """The value in a JSON file, in UTF-8 with or without a byte order mark. Raises UsageError."""
    data = read_bytes(path, most)
    try:
        text = data.decode("utf-8-sig")
        _check_depth(text)
        value = json.loads(text, object_pairs_hook=_unique)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # a whole pair is a character, a half is none
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"cannot read {path}, which holds half of a surrogate pair: that is no character"
        ) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, too long a number, too deep
        raise UsageError(f"cannot read {path}, which is not JSON: {first_line(error)}") from error
    return value


def read_object(path: Path, most: int = CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError."""
    data = read_json(path, most)
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold a JSON object: got {type(data).__name__}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:60]!r} is there twice in one object")
    return found


def _check_depth(text: str) -> None:
    """Raise ValueError for JSON that is nested deeper than whoever walks it can take.

    Of the text, brackets alone are looked at, and pairs taken away from the inside: all of it in
    native code, for files have gigabytes.
    """
    left = re.sub(r'"[^"\\]*(?:\\.[^"\\]*)*"|[^][{}"]+', "", text, flags=re.DOTALL)
    for _ in range(_DEPTH):
        before = len(left)
        left = left.replace("[]", "").replace("{}", "")
        if len(left) == before:  # nothing is left, or what is no JSON
            return
    if left:
        raise ValueError(f"it is nested in more than {_DEPTH} levels")


def is_text(name: str) -> bool:
    """Whether a name can be written in UTF-8: those of files may hold any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_plain_name(name: str) -> bool:
    """Whether the name of a tensor, or of a module, can stand in a sentence."""
    return name.isprintable() and len(name) <= 1000


def lies_within(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, is in a folder, or in the blobs of its hub snapshot."""
    try:
        target, inside = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    blobs = inside.parent.parent / "blobs"
    is_snapshot = inside.parent.name == "snapshots"
    return target.is_relative_to(inside) or (is_snapshot and target.is_relative_to(blobs))
