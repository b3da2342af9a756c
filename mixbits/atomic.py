"""Folders that appear complete or not at all.

An output is written into a hidden folder beside its destination and renamed when complete: a
reader sees all of it or nothing.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from .formats import UsageError

MARKS = ("plan.json", "mixbits-export.json")  # of folders that `overwrite` may remove


def check_room(folder: Path, needs: int) -> None:
    """Raise UsageError where the disk that `folder` is, or will be, on has fewer bytes free."""
    where = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(where).free
    if free < needs:
        raise UsageError(f"{where} has {free:,} bytes free: {needs:,} are needed")


def scratch_folder(beside: Path, needs: int) -> tempfile.TemporaryDirectory[str]:
    """A hidden folder that goes with the process; what killed processes have left goes first.

    It lies in `beside`, or what there is of that path. `needs` is the room to ask for. Raises
    UsageError for a full disk.
    """
    where = next(path for path in (beside, *beside.parents) if path.is_dir())
    for path in where.glob(".mixbits-scratch-*"):
        pid = path.name.split("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    free = shutil.disk_usage(where).free
    if free < needs:
        raise UsageError(f"{where} has {free:,} bytes free: {needs:,} are needed")
    return tempfile.TemporaryDirectory(prefix=f".mixbits-scratch-{os.getpid()}-", dir=where)


@contextmanager
def atomic_folder(destination: Path, overwrite: bool = False, needs: int = 0) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `destination` when the block ends well.

    On any error, and on SIGTERM or Ctrl-C, nothing is left. `needs` is the room to ask for
    first. Raises UsageError for an existing destination or a full disk.
    """
    destination = destination.resolve()
    check_destination(destination, overwrite)
    parent, pid = destination.parent, os.getpid()
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needs:
        raise UsageError(f"{parent} has {free:,} bytes free: {needs:,} are needed")
    ours = re.compile(re.escape(f".{destination.name}.") + r"(?:partial|replaced)-(\d+)")
    for path in parent.iterdir():  # left by processes that were killed, perhaps with our number
        match = ours.fullmatch(path.name)
        if match and (int(match[1]) == pid or not _is_alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)
    partial, old = (parent / f".{destination.name}.{k}-{pid}" for k in ("partial", "replaced"))

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        partial.mkdir()
        yield partial
        _sync(partial)
        if destination.exists():
            destination.rename(old)
        partial.rename(destination)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if old.exists() and not destination.exists():
            old.rename(destination)
        if not _is_disk_full(error):
            raise
        raise UsageError(f"the disk is full ({parent}); nothing was written") from None
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(partial, ignore_errors=True)


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "os error 28" in str(error) or "No space left" in str(error)  # of safetensors


def _is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        with suppress(PermissionError):
            os.kill(pid, 0)
        return True
    return False


def _sync(folder: Path) -> None:
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise UsageError if `destination` exists and may not be replaced, or cannot be made."""
    if not destination.exists():
        above = next(p for p in destination.absolute().parents if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UsageError(f"--out must lie in a writable folder: {above} is none")
        return
    if not overwrite:
        raise UsageError(f"{destination} exists: pass --overwrite, or another --out")
    is_ours = any((destination / name).is_file() for name in MARKS)
    if not destination.is_dir() or not (is_ours or not any(destination.iterdir())):
        raise UsageError(f"{destination} is no mixbits output: --overwrite does not remove it")
