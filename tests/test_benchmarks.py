"""Every benchmark can be imported, and asked what it takes: a name that has moved must not wait for
the next measurement."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "benchmarks").glob("*/*.py"))
if not FILES:
    pytest.skip("installed without its benchmarks", allow_module_level=True)
by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")


def imported(path: Path) -> ModuleType:
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


@by_file
def test_a_benchmark_can_be_imported(path: Path) -> None:
    """It has a `main` if it is a program, and only then."""
    is_program = '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
    assert callable(getattr(imported(path), "main", None)) == is_program


PROGRAMS = [path for path in FILES if "\ndef main(" in path.read_text(encoding="utf-8")]
PROGRAMS.remove(ROOT / "benchmarks" / "peers" / "autoscheme_worker.py")  # which reads a job


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_benchmark_says_what_it_takes(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        imported(path).main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
