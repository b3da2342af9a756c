"""Quantizing with much text, little or none: what is read, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import SMALL, make_model, read

from mixbits import quantize
from mixbits.formats.menus import MENUS
from mixbits.pipeline.options import parse_arguments
from mixbits.pipeline.texts import text_read


def test_held_out_text_follows_what_the_scores_were_measured_on(
    run: Callable[..., int], tmp_path: Path
) -> None:
    assert run("--avg-bits", 5, "--nsamples", 9) == 0
    scores = tmp_path / "out" / "scores.json"
    assert run("--avg-bits", 5, "--nsamples", 2, "--scores", scores, out="b") == 0
    assert run("--avg-bits", 5, "--nsamples", 9, "--scores", scores, out="c") == 0
    a, b, c = (read(tmp_path / x / "report.json") for x in ("out", "b", "c"))
    held = [x["evaluation"]["held_out"] for x in (a, b, c)]
    assert held[0]["sha256"] == held[1]["sha256"] == held[2]["sha256"]
    assert [x["rounding"]["nsamples"] for x in (a, b, c)] == [9, 2, 9]
    assert held[0]["kl"] == held[2]["kl"] != held[1]["kl"]


def test_one_held_out_sequence_has_no_standard_error(
    run: Callable[..., int], tmp_path: Path
) -> None:
    assert run("--avg-bits", 5, "--eval-nsamples", 1) == 0
    assert read(tmp_path / "out" / "report.json")["evaluation"]["held_out"]["kl_stderr"] is None


@pytest.mark.parametrize("text", [True, False])
def test_quick_needs_no_text(text: bool, shared: Path, tmp_path: Path) -> None:
    """It is judged on what there is; what is given beside the preset wins."""
    model = make_model(tmp_path / "model") if text else shared / "llama"
    given = ["--dataset", shared / "ids.npy"] if text else []
    words = [
        model,
        "--effort",
        "quick",
        "--seqlen",
        32,
        "--device",
        "cpu",
        *given,
        "--out",
        tmp_path / "out",
    ]
    assert quantize.main(list(map(str, words))) == 0
    report, scores = (read(tmp_path / "out" / f"{name}.json") for name in ("report", "scores"))
    assert scores["method"] == "weight" and scores["calibration"]["nsamples"] == 0
    assert report["rounding"]["method"] == "search" and report["gate"] is None
    held = report["evaluation"]["held_out"]
    assert held["nsamples"] == 8 and held["kl"] > 0
    assert held["source"] == ("ids.npy" if text else "its held-out modules")
    options = ["--scores", tmp_path / "out" / "scores.json", "--dataset", shared / "ids.npy"]
    assert quantize.main([*map(str, [model, *options, *SMALL[:-2], "--out", tmp_path / "b"])]) == 0
    chosen = {u["scheme"] for u in read(tmp_path / "b" / "plan.json")["units"]}
    assert chosen <= set(MENUS["cpu"])  # what the scores have


def test_a_model_without_tokenizer_and_text_is_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "model")
    words = [model, "--effort", "quick", "--seqlen", 32, "--out", tmp_path / "out"]
    assert quantize.main(list(map(str, words))) == 0
    assert "not judged: there is no --dataset, and no tokenizer" in capsys.readouterr().out
    assert read(tmp_path / "out" / "report.json")["evaluation"]["verdict"]["word"] == "not judged"


def test_little_text_is_not_followed_closely(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice as many tokens as the widest input has columns, 172, are enough."""
    for nsamples, given, correction, note in (
        (10, [], 0.0, "the text is short for gptq: 320 tokens, and inputs of 172 columns want 344"),
        (10, ["--correction", "0.5"], 0.5, "which --correction follows closely"),
        (11, [], 0.5, None),
    ):
        words = ("--avg-bits", 5, "--nsamples", nsamples, *given, "--eval-nsamples", 1)
        assert run(*words, "--overwrite") == 0
        rounding = read(tmp_path / "out" / "report.json")["rounding"]
        assert rounding["correction"] == correction
        notes, printed = rounding.get("notes", []), capsys.readouterr().out
        assert all(one in printed for one in notes) and bool(notes) == (note is not None)
        assert note is None or note in notes[0]


def test_what_is_read_is_what_is_announced() -> None:
    for words, told in (
        ([], "NeelNanda/pile-10k"),
        (["--dataset", "a.txt", "--eval-dataset", "b.txt"], "a.txt, b.txt"),
        (["--plan", "p", "--rounding", "rtn", "--eval-nsamples", "0"], "no text is needed"),
        (["--scores", "s", "--solve-only"], "no text is needed"),
        (["--scores", "s", "--rounding", "rtn", "--gate", "0", "--eval-dataset", "b"], "b"),
        (["--effort", "quick"], "modules of Python's standard library"),
    ):
        assert text_read(parse_arguments(["m", *words])) == told
