"""The counts of the matrix: a cell that no test compared, or that has two answers, is an error."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matrix as table
import pytest
from conftest import FORMATS, MORE_FORMATS
from matrix import OPERATIONS, Matrix, Summary, format_id

from mixbits.formats.schemes import Format

INT4, MXFP4 = Format("int4", 32), Format("e2m1", 32)
NAMES = [format_id(INT4), format_id(MXFP4)]


@pytest.fixture(autouse=True)
def two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {("cpu", "here"): None, ("cpu", "there"): "this CPU has no there"}
    monkeypatch.setattr(table, "ways", lambda: found)


def item() -> Any:
    return SimpleNamespace(user_properties=[])


def tell(summary: Summary, said: Any, **how: Any) -> None:
    report = {"when": "call", "passed": True, "user_properties": said.user_properties, **how}
    summary.pytest_runtest_logreport(SimpleNamespace(**report))


def test_all_formats_have_names_of_their_own() -> None:
    names = [format_id(fmt) for fmt in FORMATS + MORE_FORMATS]
    assert len(set(names)) == len(names)


def test_what_is_missing_is_named_in_a_whole_run() -> None:
    one = item()
    for operation in OPERATIONS:
        with Matrix(one).cell("cpu", "here", operation, INT4):
            pass
        if operation != "activations":
            with Matrix(one).cell("cpu", "here", operation, MXFP4, "refused"):
                pass
    summary = Summary(NAMES, None)
    tell(summary, one)
    *lines, last, there = summary.lines(whole=True)
    assert all(line.endswith("1 equal, 1 refused, 0 twin") for line in lines)
    assert last.endswith("activations           1 equal, 0 refused, 0 twin, 1 MISSING: e2m1-floor")
    assert "20 cells not run here: this CPU has no there" in there
    assert summary.problems == ["cpu here activations"]
    part = Summary(NAMES, None)
    tell(part, one)
    assert "MISSING" not in "".join(part.lines(whole=False)) and not part.problems


def test_a_failure_says_its_cell_and_counts_for_none() -> None:
    one = item()
    with (
        pytest.raises(AssertionError) as caught,
        Matrix(one).cell("cpu", "here", ("dequantize", "fake_quantize"), INT4),
    ):
        raise AssertionError("2 of 3 differ")
    assert caught.value.__notes__ == ["cells: cpu here dequantize fake_quantize int4-g32-sym"]
    assert one.user_properties == []


def test_two_answers_are_an_error_and_failed_tests_say_nothing(tmp_path: Path) -> None:
    equal, refused = item(), item()
    for said, kind in ((equal, "equal"), (refused, "refused")):
        with Matrix(said).cell("cpu", "here", "dequantize", INT4, kind):
            pass
    summary = Summary(NAMES, None)
    tell(summary, equal)
    for how in ({"passed": False}, {"when": "teardown"}):
        tell(summary, refused, **how)
    assert summary.problems == []
    tell(summary, refused)
    assert summary.problems == ["cpu here dequantize int4-g32-sym: equal and refused"]
    cells, other = tmp_path / "cells.json", item()
    cells.write_text(json.dumps([[*cell, kind] for cell, kind in summary.cells.items()]))
    Matrix(other).take_over(cells)
    assert other.user_properties == equal.user_properties
