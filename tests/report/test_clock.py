"""The clock: stages are told as they run, and their rows are what a report holds."""

from __future__ import annotations

import re

import pytest

from mixbits.report.clock import Clock, environment
from mixbits.report.report import Environment, Stage


@pytest.mark.usefixtures("printed")
def test_stages_are_told_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(["open", "write"])
    with clock.run("write", "a\x1b folder"):
        held = bytearray(1 << 24)
    with pytest.raises(KeyError), clock.run("open", "what fails"):
        raise KeyError
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "[2/2] write        a\ufffd folder" and told[2].startswith("[1/2] open")
    assert re.fullmatch(r" {6}\d+\.\d s", told[1])
    (row,) = clock.rows  # what fails has no row
    assert row["stage"] == "write" and row["peak_memory_bytes"] > len(held)
    assert Stage.of(row).data() == row


def test_an_environment_is_one_of_a_report() -> None:
    found = environment()
    assert Environment.of(found).data() == found and found["mixbits"] and found["torch"]
