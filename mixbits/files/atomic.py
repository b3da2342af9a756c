"""Folders that appear complete or not at all, and take the place of nothing but mixbits' own.

An output is written into a hidden folder beside its destination, and takes the destination's name
when complete: a reader sees all of it or nothing. Who writes holds a lock beside the destination
from before the first work until after the last, so that two runs never share one, and so that
whatever a killed run has left is known by its lock being free.

With `overwrite`, the old folder and the new one change places in one step. Where a file system
cannot do that, the old one is renamed away first; if the process is killed just then, the next run
gives it its name back. What is replaced must be ours to the last file (`manifest`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import unicodedata
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ..errors import UsageError, first_line
from .io import encoded
from .manifest import MANIFEST, TEMPORARY, Manifest, foreign, remove_ours
from .system import Lock, disk_full, exchange, mounted_within, rename_new

_LONGEST_PATH = 3500  # bytes, so that the files in the folder stay below the 4,096 of Linux

logger = logging.getLogger("mixbits")


def check_room(folder: Path, needs: int) -> None:
    """Raise UsageError unless the disk that `folder` lies on, or will, has `needs` bytes free."""
    where = _existing(folder)
    free = shutil.disk_usage(where).free
    if free < needs:
        raise UsageError(f"{where} has {free:,} bytes free: {needs:,} are needed")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


class Scratch:
    """A hidden folder, `name`, that goes with the object and with the process."""

    def __init__(self, where: Path) -> None:
        while True:
            folder = where / f".mixbits-scratch-{secrets.token_hex(4)}"
            lock = Lock.take(Path(f"{folder}.lock"))
            if lock is not None:
                break
        self.name = str(folder)
        self.cleanup = weakref.finalize(self, _remove_scratch, folder, lock)
        folder.mkdir()


def _remove_scratch(folder: Path, lock: Lock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


def scratch_folder(beside: Path, needs: int) -> Scratch:
    """A hidden folder that goes with the process; what killed processes have left goes first.

    It lies in `beside`, or what there is of that path. `needs` is the room to ask for. Raises
    UsageError for a full disk.
    """
    where = _existing(beside)
    for name in {path.name.removesuffix(".lock") for path in where.glob(".mixbits-scratch-*")}:
        with suppress(OSError):
            lock = Lock.take(where / f"{name}.lock")
            if lock is not None and lock.is_exclusive:
                _remove_scratch(where / name, lock)
            elif lock is not None:
                lock.release()
    check_room(where, needs)
    return Scratch(where)


def _placed(out: Path) -> Path:
    """The absolute path of a destination, links above it followed. Raises UsageError."""
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in str(out)):
        raise UsageError(f"--out must be printable text: got {str(out)!r}")
    try:
        path = out.resolve() if out.name in ("", "..") else out.parent.resolve() / out.name
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        raise _unusable(out, error) from error
    if not path.name:
        raise UsageError(f"--out must be the name of a folder: got {path}")
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise UsageError(f"--out must be a path of at most {_LONGEST_PATH} bytes: got {path}")
    return path


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def _unusable(out: Path, error: Exception) -> UsageError:
    return UsageError(f"--out cannot be used: {_reason(error)} ({out})")


def _beside(path: Path, kind: str) -> Path:
    """The hidden name of this kind that belongs to a destination, whose own may be of 255 bytes."""
    name = path.name.encode()
    stem = name[:200].decode(errors="ignore")
    return path.with_name(f".{stem}.{kind}-{hashlib.sha256(name).hexdigest()[:8]}")


def _free_names(path: Path, suffix: str = "") -> Iterator[Path]:
    """Names like a destination's, for what may not have its own: out-2, or out.scores.json."""
    stem = path.name.encode()[:200].decode(errors="ignore")
    for number in count(1):
        end = f"-{number}" if number > 1 else ""
        if end or suffix:
            yield path.with_name(f"{stem}{end}{suffix}")


def check_destination(destination: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise UsageError if `destination` exists and may not be replaced, or cannot be made.

    `inputs` are files and folders that the run reads: what holds one of them is not replaced.
    """
    path = _placed(destination)
    recover(path)
    _check(destination, path, overwrite, inputs)


def _check(destination: Path, path: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    if not os.path.lexists(path):
        above = next(p for p in path.parents if os.path.lexists(p))
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UsageError(f"--out must lie in a writable folder: {above} is none")
        return
    try:
        why = _why_kept(path, inputs)
    except OSError as error:
        why = f"it cannot be read ({_reason(error)}: {error.filename})"
    if overwrite and why:
        raise UsageError(f"--overwrite does not remove {destination}: {why}; pass another --out")
    if why:
        raise UsageError(f"{destination} exists, and {why}: pass another --out")
    if not overwrite:
        raise UsageError(f"{destination} exists: pass --overwrite, or another --out")


def _why_kept(path: Path, inputs: Sequence[Path]) -> str | None:
    """Why what lies at a destination may not be removed. Raises OSError."""
    if path.is_symlink():
        return f"it is a link to {os.readlink(path)}"
    if not path.is_dir():
        return "it is no mixbits output, and no folder"
    held = [("the working folder", Path.cwd()), *((str(given), given) for given in inputs)]
    with suppress(RuntimeError):  # nobody's home
        held.append(("the home folder", Path.home()))
    for name, other in held:
        if os.path.exists(other) and other.resolve().is_relative_to(path):
            return f"it is, or holds, {name}"
    if mounted := mounted_within(path):
        return f"something is mounted on {mounted}"
    why = foreign(path)
    return f"it is no mixbits output ({why})" if why else None


def recover(destination: Path) -> None:
    """Give an output that a killed run was replacing its name back.

    Raises UsageError where a run is writing there now.
    """
    path = _placed(destination)
    lock_file = _beside(path, "lock")
    if any(os.path.lexists(other) for other in (lock_file, _beside(path, "replaced"))):
        lock = _locked(destination, lock_file)
        try:
            _restore(path)
        finally:
            lock.release()


def _locked(destination: Path, file: Path) -> Lock:
    try:
        lock = Lock.take(file)
    except OSError as error:
        raise _unusable(destination, error) from error
    if lock is None:
        raise UsageError(
            f"another run is writing {destination}: wait for it, or pass another --out"
        )
    return lock


def _restore(path: Path) -> None:
    """With the lock held: the old output has its name back, or goes if the new one is in place."""
    old = _beside(path, "replaced")
    if not os.path.lexists(old):
        return
    try:
        rename_new(old, path)
    except FileExistsError:
        if (path / MANIFEST).is_file():
            _discard(old, path)
        else:  # it is not what was to replace the old one
            _rename_free(old, path)


def _discard(old: Path, path: Path) -> None:
    """Remove an output that was replaced; what is not ours by now gets a name like `path`'s."""
    if not remove_ours(old):
        kept = _rename_free(old, path)
        logger.warning("what %s held that mixbits did not write is in %s", path, kept)


def _rename_free(hidden: Path, path: Path) -> Path:
    for name in _free_names(path):
        with suppress(FileExistsError):
            rename_new(hidden, name)
            return name
    raise AssertionError("there is always a number that is free")


class Destination:
    """A name for an output, this run's alone: see `reserved`."""

    def __init__(self, given: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
        self.given, self.path = given, _placed(given)
        self.overwrite, self.inputs = overwrite, inputs
        self.partial = _beside(self.path, "partial")
        self.aside: Path | None = None
        self._written = -1  # a descriptor of the folder that this run has written
        self._manifest: Manifest | None = None

    @contextmanager
    def folder(self, needs: int = 0, later: Sequence[str] = ()) -> Iterator[Path]:
        """A hidden folder to write into, which gets the name when the block ends well.

        `needs` is the room to ask for first; `later` are files that `rewrite` will write again.

        Raises UsageError, and leaves the complete folder under a name like the destination's, where
        something has appeared there meanwhile that may not be replaced.
        """
        check_room(self.path.parent, needs)
        try:
            self.partial.mkdir()
        except FileExistsError as error:
            raise UsageError(
                f"another run is writing {self.given}, or was killed: remove {self.partial}"
            ) from error
        try:
            yield self.partial
            self._complete(later)
            self._publish()
        finally:
            # Whatever has interrupted us, and where: what lies there now says what is left to do.
            if self._is_in_place():
                _restore(self.path)
                if self.partial.exists():  # it has changed places with the old one
                    _discard(self.partial, self.path)
            else:
                shutil.rmtree(self.partial, ignore_errors=True)

    def _complete(self, later: Sequence[str]) -> None:
        self._manifest = Manifest.of(self.partial, later)
        said = self.partial / MANIFEST
        said.write_bytes(encoded(self._manifest.text()))
        mode = said.stat().st_mode & 0o777  # as the umask has it; safetensors' own is 0600
        for path in filter(Path.is_file, self.partial.rglob("*")):
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._written = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY)

    def _publish(self) -> None:
        while True:
            try:
                if os.path.lexists(self.path):
                    _check(self.given, self.path, self.overwrite, self.inputs)
                    self._replace()
                else:
                    rename_new(self.partial, self.path)
                return
            except (FileExistsError, FileNotFoundError):
                if not self.path.parent.is_dir() or not self.partial.is_dir():
                    raise
            except UsageError as error:
                kept = _rename_free(self.partial, self.path)
                raise UsageError(
                    f"{self.given} has appeared meanwhile: the output is complete in {kept} "
                    f"({error})"
                ) from error

    def _replace(self) -> None:
        if exchange(self.partial, self.path):
            return
        self.path.rename(_beside(self.path, "replaced"))
        try:
            rename_new(self.partial, self.path)
        finally:
            if not self._is_in_place():
                _restore(self.path)

    def _is_in_place(self) -> bool:
        if self._written < 0:
            return False
        try:
            here = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(here, os.fstat(self._written))

    def check_in_place(self) -> None:
        """Raise UsageError unless the folder that this run wrote is still where it was put."""
        if not self._is_in_place():
            raise UsageError(
                f"{self.given} was removed or replaced by another while this ran: it is not used"
            )

    def rewrite(self, texts: Mapping[str, str]) -> None:
        """Write files of the finished folder again, wherever it is by now, and in no other.

        Raises UsageError where it is not in place any more.
        """
        self.check_in_place()
        assert self._manifest is not None
        for name, text in texts.items():
            self._manifest.add(name, encoded(text))
            self._rewrite(name, encoded(text))
        self._rewrite(MANIFEST, encoded(self._manifest.text()))

    def _rewrite(self, name: str, data: bytes) -> None:
        there = self._written
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        try:
            with open(os.open(TEMPORARY, flags, 0o666, dir_fd=there), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(TEMPORARY, name, src_dir_fd=there, dst_dir_fd=there)
        except OSError:
            with suppress(OSError):
                os.unlink(TEMPORARY, dir_fd=there)
            raise

    def set_aside(self, suffix: str, text: str) -> Path | None:
        """Write `text` beside the destination, for the case that no output comes about.

        Returns where: a name that was free, or of a file with just this content; None where that
        cannot be done. `drop_aside` removes it.
        """
        data, hidden = encoded(text), _beside(self.path, "aside")
        with suppress(OSError):
            hidden.write_bytes(data)
            for path in _free_names(self.path, suffix):
                with suppress(FileExistsError):
                    if not _holds(path, data):
                        rename_new(hidden, path)
                    self.aside = path
                    break
        hidden.unlink(missing_ok=True)
        return self.aside

    def drop_aside(self) -> None:
        if self.aside is not None:
            self.aside.unlink(missing_ok=True)
            self.aside = None

    def close(self) -> None:
        if self._written >= 0:
            os.close(self._written)
            self._written = -1


def _holds(path: Path, data: bytes) -> bool:
    is_file = path.is_file() and not path.is_symlink()
    return is_file and path.stat().st_size == len(data) and path.read_bytes() == data


@contextmanager
def reserved(
    destination: Path, overwrite: bool = False, inputs: Sequence[Path] = ()
) -> Iterator[Destination]:
    """A destination that no other run can write meanwhile; what killed runs have left there goes.

    A command runs it in `ended_by_signals`, so that it cleans up as for Ctrl-C. `inputs` are files
    and folders that the run reads.

    Raises UsageError in one sentence: for a destination that exists, is in use, or may not be
    replaced; for a disk that is full, at whatever moment of the block.
    """
    check_destination(destination, overwrite, inputs)
    place = Destination(destination, overwrite, inputs)
    with _parents_of(place), _lock_on(place):
        _check(destination, place.path, overwrite, inputs)
        try:
            yield place
        except Exception as error:  # a full disk has many faces: `disk_full` looks at its causes
            if (full := disk_full(error)) is None:
                raise
            kept = "nothing was written"
            if place._is_in_place():
                kept = f"{destination} is complete, but its report has not all of the evaluation"
            told = UsageError(f"{full} ({_existing(place.path.parent)}); {kept}")
            told.__notes__ = getattr(error, "__notes__", [])
            raise told from error
        finally:
            place.close()


@contextmanager
def atomic_folder(
    destination: Path, overwrite: bool = False, needs: int = 0, inputs: Sequence[Path] = ()
) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `destination` when the block ends well.

    On any error, and on a signal or Ctrl-C, nothing is left. `needs` is the room to ask for first.
    Raises UsageError as `reserved` does.
    """
    with reserved(destination, overwrite, inputs) as place, place.folder(needs) as folder:
        yield folder


@contextmanager
def _parents_of(place: Destination) -> Iterator[None]:
    """The folders above a destination are made, and go again if nothing comes into them."""
    made = [p for p in place.path.parents if not p.exists()]
    try:
        try:
            place.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(place.given, error) from error
        _placed(place.given)  # whether the name can be is known in a folder that is there
        yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _lock_on(place: Destination) -> Iterator[None]:
    lock = _locked(place.given, _beside(place.path, "lock"))
    try:
        _restore(place.path)
        if lock.is_exclusive:
            _discard_left(place.path)
        yield
    finally:
        lock.release()


def _discard_left(path: Path) -> None:
    """What killed runs have left: an output that is not complete, or one that was replaced."""
    _beside(path, "aside").unlink(missing_ok=True)
    partial = _beside(path, "partial")
    if (partial / MANIFEST).exists():
        _discard(partial, path)
    else:
        shutil.rmtree(partial, ignore_errors=True)
