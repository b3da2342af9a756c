"""Which files of an output are ours: `mixbits-manifest.json`, and what it says of a folder.

    {"mixbits_manifest": 1, "mixbits_version",
     "files": {name, with folders before it: {"bytes", "sha256" of all but large files}, or null}}

null stands for a file that is still to be written again. A folder is ours if all that is in it is
in its manifest, and as it was written: whatever a user has added or changed makes it the user's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from ..errors import UsageError
from .io import read_object

MANIFEST = "mixbits-manifest.json"
TEMPORARY = ".mixbits-new"  # what takes the name of a file that is written again
_HASHED_BYTES = 16 << 20  # of larger files, which are weights, the size has to do
# Outputs from before there were manifests: what says that they are ours, and files that they have.
_MARKS = {"plan.json": "mixbits_plan", "mixbits-export.json": "mixbits_version"}
_WRITTEN = re.compile(
    r"(plan|scores|report|mixbits-export|config|generation_config)\.json|report\.html|README\.md"
    r"|curve\.(csv|svg|png)|model([-.][\w.-]*)?\.(safetensors|safetensors\.index\.json|gguf)"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt"
    r"|tokenizer\.model|chat_template\.jinja|additional_chat_templates/\w+\.jinja"
    r"|((video_)?pre)?processor_config\.json|LICENSE(\.\w+)?"
)


class Entry(BaseModel, extra="forbid"):
    """One file as it was written."""

    bytes: int
    sha256: str | None = None

    @classmethod
    def of(cls, path: Path) -> Entry:
        size = path.stat().st_size
        return cls(bytes=size, sha256=_sha256(path) if size <= _HASHED_BYTES else None)

    def fits(self, path: Path) -> bool:
        if path.stat().st_size != self.bytes:
            return False
        return self.sha256 is None or _sha256(path) == self.sha256


class Manifest(BaseModel):
    """The content of `mixbits-manifest.json`."""

    mixbits_manifest: Literal[1]
    mixbits_version: str
    files: dict[str, Entry | None]

    @classmethod
    def of(cls, folder: Path, later: Collection[str] = ()) -> Manifest:
        """Of what is in a folder now, but for files that are written again `later`."""
        from .. import __version__

        names = (path.relative_to(folder).as_posix() for path, _ in _walk(folder))
        files = {n: None if n in later else Entry.of(folder / n) for n in names if n != MANIFEST}
        return cls(mixbits_manifest=1, mixbits_version=__version__, files=files)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """None where there is none, or something else of that name."""
        path = folder / MANIFEST
        try:
            return cls.model_validate(read_object(path)) if _is_plain_file(path) else None
        except (UsageError, ValidationError):
            return None

    def add(self, name: str, data: bytes) -> None:
        """A file has these contents now."""
        self.files[name] = Entry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def text(self) -> str:
        return json.dumps(self.model_dump(), indent=1) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_plain_file(path: Path) -> bool:
    return os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode)


def _walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """All that is in a folder but its subfolders, sorted, and whether it is a plain file.

    Empty subfolders are among it. Links are not followed. Raises OSError.
    """
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False) and any(path.iterdir()):
            yield from _walk(path)
        else:
            yield path, entry.is_file(follow_symlinks=False)


def _sorted_out(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """All that is in a folder, and of what is not ours why."""
    manifest = Manifest.read(folder)
    is_older = manifest is None and _has_mark(folder)
    for path, is_file in _walk(folder):
        name = path.relative_to(folder).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if manifest is None:
            ours = is_file and is_older and _WRITTEN.fullmatch(name)
            yield path, None if ours else f"mixbits did not write {name}"
        elif is_folder and any(other.startswith(f"{name}/") for other in manifest.files):
            continue  # our files in it are gone
        elif not is_file or name not in {*manifest.files, MANIFEST, TEMPORARY}:
            yield path, f"mixbits did not write {name}"
        elif (entry := manifest.files.get(name)) and not entry.fits(path):
            yield path, f"{name} was changed since mixbits wrote it"
        else:
            yield path, None


def _has_mark(folder: Path) -> bool:
    for name, key in _MARKS.items():
        if _is_plain_file(folder / name):
            try:
                return key in read_object(folder / name)
            except UsageError:
                continue
    return False


def foreign(folder: Path) -> str | None:
    """Why the folder is not all ours, by its first file that is not; an empty one is."""
    return next((why for _, why in _sorted_out(folder) if why is not None), None)


def remove_ours(folder: Path) -> bool:
    """Delete what mixbits wrote, and no more; whether that was all. The manifest goes last."""
    ours = [path for path, why in _sorted_out(folder) if why is None]
    for path in sorted(ours, key=lambda p: p.name == MANIFEST):
        path.unlink(missing_ok=True)
    folders = [Path(top) for top, _, _ in os.walk(folder)]
    for path in reversed(folders):
        try:
            path.rmdir()
        except OSError:
            continue
    return not folder.exists()
