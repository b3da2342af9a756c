"""The model in the box: a tiny Python-source language model and the text that goes with it.

Everything in mixbits can be tried without a download.  `MODEL_DIR` is a complete Hugging Face
folder (a 4-layer Llama, under 8 MB) that was trained by ``benchmarks/tools/train_demo.py`` on the
sources of the Python standard library, and the text it is calibrated on and judged by is the
standard library of the interpreter that runs: every user has it on disk already.

The split is by module.  The modules named in `HELD_OUT` are never trained on, and neither are
their test files, which quote them; everything else is training text.  Which bytes those are
depends on the Python version and on whether the distribution ships ``Lib/test`` (Debian does
not), so numbers are comparable between runs on one interpreter, not across interpreters.

This module does not import torch, so that asking for the text stays cheap.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "HELD_OUT",
    "MODEL_DIR",
    "TASKS_DIR",
    "held_out_files",
    "held_out_text",
    "training_files",
    "training_text",
]

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""The bundled model: config, safetensors weights and tokenizer, as `from_pretrained` wants them."""

TASKS_DIR: Path = Path(__file__).resolve().parent / "tasks"
"""The bundled lm-eval tasks, for ``TaskManager(include_path=...)``."""

# Plain-Python modules and packages of every CPython from 3.11 to 3.14: parsers, numerics, data
# structures, formats; some are mostly code and some mostly prose.  About 0.55 MB together.
HELD_OUT: tuple[str, ...] = (
    "argparse",
    "calendar",
    "colorsys",
    "configparser",
    "csv",
    "fractions",
    "gettext",
    "graphlib",
    "heapq",
    "ipaddress",
    "json",
    "netrc",
    "queue",
    "sched",
    "shlex",
    "statistics",
    "textwrap",
    "timeit",
    "tomllib",
)

# Not text a code model should learn from: other people's packages, caches, generated tables and
# files that are syntax errors on purpose or data in disguise.  The wave module is in neither list:
# up to Python 3.12 much of it stands in chunk.py, aifc.py and sunau.py too, so as held-out text it
# would be half known.
_SKIPPED_DIRS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "lib2to3", "idlelib", "pydoc_data"}
    | {"encodings", "lib-dynload"}
)
_SKIPPED_NAMES = re.compile(r"_sysconfigdata|bad_|badsyntax_|(test_)?wave\.py")

_SEPARATOR = "\n\n"


def training_files() -> list[Path]:
    """The standard-library sources that are neither held out nor tests of held-out modules."""
    root = _stdlib()
    return [
        path
        for path in _sources(root)
        if not _is_held_out(path.relative_to(root))
        and not _tests_held_out(path.relative_to(root))
        and _read(path)
    ]


def held_out_files() -> list[Path]:
    """The sources of the modules in `HELD_OUT`, sorted by path."""
    root = _stdlib()
    return [p for p in _sources(root) if _is_held_out(p.relative_to(root)) and _read(p)]


def training_text() -> str:
    """All training files as one string, joined by two newlines."""
    return _joined(training_files())


def held_out_text() -> str:
    """All held-out files as one string, joined by two newlines."""
    return _joined(held_out_files())


def _stdlib() -> Path:
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "argparse.py").is_file():
        raise FileNotFoundError(
            f"The standard library's .py sources are not in {root}, so there is no demo text."
        )
    return root


def _sources(root: Path) -> list[Path]:
    """Every .py file below root that is worth reading, sorted."""
    found = []
    for folder, below, names in os.walk(root):
        # Pruned in place, so that a large site-packages is not even listed.
        below[:] = [d for d in below if d not in _SKIPPED_DIRS and not d.startswith("config-")]
        found += [
            Path(folder, name)
            for name in names
            if name.endswith(".py") and not _SKIPPED_NAMES.match(name)
        ]
    return sorted(found)


def _is_held_out(relative: Path) -> bool:
    """Whether a path is ``<module>.py`` or inside ``<module>/`` for a held-out module."""
    return relative.parts[0].removesuffix(".py") in HELD_OUT


def _tests_held_out(relative: Path) -> bool:
    """Whether a path below ``test/`` tests a held-out module.

    Files such as ``test_argparse.py``, ``test_json/test_decode.py`` and any other name in which a
    held-out module's name is a word: better to lose a little training text than to leak.
    """
    if relative.parts[0] != "test":
        return False
    words = {word for part in relative.parts for word in re.split(r"[_.]", part)}
    return not words.isdisjoint(HELD_OUT)


def _read(path: Path) -> str:
    """The file's text, or "" where it is not UTF-8 (some test files) or a dangling link."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, FileNotFoundError):
        return ""


def _joined(paths: Iterable[Path]) -> str:
    return _SEPARATOR.join(_read(path) for path in paths)
