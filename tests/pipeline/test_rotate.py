"""What is rotated: by default, when asked for, and where scores say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import read

from mixbits.pipeline.options import parse_arguments
from mixbits.pipeline.run import prepare

DEFAULTS = {
    "MXFP4,MXFP8": "all",
    "NVFP4,MXFP8": "all",
    "W4G32xMXINT8,FP8": "all",
    "NVFP4": "none",  # gains nothing by it
    "NVFP4,MXFP4A16": "none",  # slow with activations in 16 bits
    "MXFP4,W8A16G64": "none",
}


@pytest.mark.parametrize("schemes", DEFAULTS)
def test_what_is_rotated_by_default_follows_from_the_schemes(schemes: str, shared: Path) -> None:
    words = [shared / "llama", "--schemes", schemes, "--avg-bits", 8, "--seqlen", 32]
    run = prepare(parse_arguments([str(word) for word in words]))
    expected = {run.settings: DEFAULTS[schemes], replace(run.settings, rotate="ffn"): "ffn"}
    without = ({"target": "compressed-tensors"}, {"method": "weight"}, {"tune": 1})
    expected |= {replace(run.settings, **change): "none" for change in without}
    for settings, rotation in expected.items():
        found = replace(run, settings=settings)
        assert found.rotation == rotation
        leaves = {name.rpartition(".")[2] for name in found.rotated}
        assert len(leaves) == {"none": 0, "ffn": 1, "all": 7}[rotation]


def test_scores_without_rotation_serve_no_rotated_plan(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--avg-bits", 6, "--rotate", "none", "--solve-only") == 0
    scores = ["--scores", tmp_path / "out" / "scores.json"]
    assert run("--avg-bits", 5, *scores, "--rotate", "ffn", "--solve-only", out="again") == 2
    assert "was measured without --rotate ffn" in capsys.readouterr().err
    assert run("--avg-bits", 6, "--rotate", "ffn", "--solve-only", out="rotated") == 0
    rotated = ["--scores", tmp_path / "rotated" / "scores.json", "--solve-only", "--overwrite"]
    assert run("--avg-bits", 5, *rotated, "--rotate", "ffn", out="again") == 0
    assert run("--avg-bits", 5, *rotated, out="again") == 0  # as they were measured
    units = read(tmp_path / "again" / "plan.json")["units"]
    assert {name.rpartition(".")[2] for u in units for name in u.get("rotated", [])} == {
        "down_proj"
    }
    assert run("--avg-bits", 5, *rotated, "--rotate", "all", out="again") == 2
    assert "was measured without --rotate all" in capsys.readouterr().err
