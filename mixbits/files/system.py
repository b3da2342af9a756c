"""What Python's `os` lacks: names that change places in one step, locks and errors that say more.

A lock is a file that the kernel keeps locked for whoever opened it, and lets go of however that
process ends. Process numbers say less: two containers that share a folder are both number 1.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

# <linux/fs.h>
_NOREPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
_NO_LOCKS = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}


@cache
def _renameat2() -> Any:
    """The C library's function; None where there is none."""
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Whether this kernel and file system can. Raises OSError for any other reason."""
    call = _renameat2()
    if call is None:
        return False
    names = os.fsencode(source), os.fsencode(target)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(target))


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False, and nothing done, where that cannot be.

    Raises OSError, FileNotFoundError among them.
    """
    return _rename(one, other, _EXCHANGE)


def rename_new(source: Path, target: Path) -> None:
    """Rename a folder to a name that is free. Raises FileExistsError where it is not.

    Where the kernel cannot do that in one step, what appears between looking and renaming is safe
    too, unless it is an empty folder: a folder cannot take the name of anything else.
    """
    if _rename(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise


@dataclass
class Lock:
    """A file that one holder at a time has; it goes with the lock."""

    path: Path
    descriptor: int
    is_exclusive: bool  # False where the file system knows no locks

    @classmethod
    def take(cls, path: Path) -> Lock | None:
        """None where another holds it. Raises OSError where no file can be made."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return cls(path, descriptor, is_exclusive=False)
                os.close(descriptor)
                raise
            if _is_same(descriptor, path):
                return cls(path, descriptor, is_exclusive=True)
            os.close(descriptor)  # its holder has removed it between our two steps

    def release(self) -> None:
        """Remove the file, then let go: whoever waits for it sees that it is gone."""
        if self.descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = -1


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def mounted_within(folder: Path) -> Path | None:
    """The folder itself, or one below it, where something is mounted on it."""
    if folder.is_mount():
        return folder
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return None
    for line in lines:
        octal = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4])
        mounted = Path(os.fsdecode(octal))
        if mounted.is_relative_to(folder):
            return mounted
    return None


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, unless they are ignored, as nohup has it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = []
    if threading.current_thread() is threading.main_thread():
        numbers = [signal.SIGTERM, signal.SIGHUP]
    before = {n: signal.getsignal(n) for n in numbers}
    before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk is full: a quota is reached"}
_FULL[errno.EFBIG] = "the disk is full: a limit on the size of files is reached"


def disk_full(error: BaseException | None) -> str | None:
    """What to say of an error that comes of too little disk, or of what caused it."""
    while error is not None:
        said = str(error)
        if isinstance(error, OSError) and error.errno in _FULL:
            return _FULL[error.errno]
        for number, sentence in _FULL.items():  # safetensors' errors, of Rust
            if f"(os error {number})" in said:
                return sentence
        if re.search(r"\d+ requested and \d+ written", said):  # numpy's
            return _FULL[errno.ENOSPC]
        error = error.__cause__ or error.__context__
    return None
