"""Quantizing with much text, little or none: what is read, and what is said of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import SMALL, add_tokenizer, make_model, read, write_ids

from mixbits import quantize
from mixbits.formats.menus import MENUS
from mixbits.pipeline import process, texts
from mixbits.pipeline.options import parse_arguments
from mixbits.pipeline.texts import Text, text_read


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
        (["--dataset", "a.txt", "--eval-dataset", "b.txt"], "a.txt; judged by b.txt"),
        (
            ["--dataset", "a,b.txt", "--dataset", "c/d", "--eval-dataset", "e", "--dataset", "f"],
            "a,b.txt, c/d and f, a sequence of each in turn; judged by e",
        ),
        (["--plan", "p", "--rounding", "rtn", "--eval-nsamples", "0"], "no text is needed"),
        (["--scores", "s", "--solve-only"], "no text is needed"),
        (
            ["--scores", "s", "--rounding", "rtn", "--gate", "0", "--eval-dataset", "b"],
            "judged by b",
        ),
        (["--effort", "quick"], "modules of Python's standard library"),
    ):
        assert text_read(parse_arguments(["m", *words])) == told


@pytest.fixture
def three(tmp_path: Path) -> list[object]:
    """`--dataset` of three texts of other ids; what is read of each can be told from the ids."""
    words: list[object] = []
    for seed in (1, 2, 3):
        words += ["--dataset", write_ids(tmp_path / f"{seed}.npy", 2048, seed=seed)]
    return words


class Seen:
    """Which sequence of 32 ids of which file each part of a run's text is."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known = {
            tuple(row.tolist()): (seed, number)
            for seed in (1, 2, 3)
            for number, row in enumerate(np.load(folder / f"{seed}.npy").reshape(-1, 32))
        }
        self.text: Text | None = None

        def spied(*args: Any) -> Text:
            self.text = texts.calibrate(*args)
            return self.text

        monkeypatch.setattr(process, "calibrate", spied)

    def __getattr__(self, part: str) -> list[tuple[int, int]]:
        return [self.known[tuple(row)] for row in getattr(self.text, part).ids.tolist()]


@pytest.fixture
def seen(three: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the parts of the text of the last run were, of `three`."""
    return Seen(tmp_path, monkeypatch)


def test_datasets_are_mixed_in_turn_in_every_part(
    run: Callable[..., int],
    three: list[object],
    seen: Seen,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    how = ("--avg-bits", 5, "--rounding", "rtn", "--nsamples", 4, "--gate", 3)
    assert run(*three, *how) == 0
    assert "npy, a sequence of each in turn" in capsys.readouterr().out
    assert seen.calibration == [(1, 0), (2, 0), (3, 0), (1, 1)]
    assert seen.gate == [(1, 2), (2, 2), (3, 2)]  # from the next whole turn on
    assert seen.held_out == [(1, 3), (2, 3), (3, 3), (1, 4)]
    report = read(tmp_path / "out" / "report.json")
    scores = read(tmp_path / "out" / "scores.json")
    for part in (scores["calibration"], report["gate"], report["evaluation"]["held_out"]):
        assert (part["source"], part["datasets"]) == ("1.npy, 2.npy and 3.npy", 3)
    for page in ("README.md", "report.html"):
        assert "1.npy, 2.npy and 3.npy" in (tmp_path / "out" / page).read_text(encoding="utf-8")
    assert "--dataset 1.npy --dataset 2.npy --dataset 3.npy" in report["command"]


def test_scores_of_a_mix_serve_other_mixes_and_what_they_saw_judges_nothing(
    run: Callable[..., int], three: list[object], seen: Seen, tmp_path: Path
) -> None:
    assert run(*three, "--avg-bits", 5, "--nsamples", 7, "--rounding", "rtn") == 0
    assert seen.calibration[-1] == (1, 2)
    how = ("--avg-bits", 6, "--scores", tmp_path / "out" / "scores.json", "--nsamples", 3)
    for datasets, held_out in (
        (three, [(1, 3), (2, 3), (3, 3), (1, 4)]),
        ([*three[4:], *three[:2]], [(3, 3), (1, 3), (3, 4), (1, 4)]),
        (three[:2], [(1, 3), (1, 4), (1, 5), (1, 6)]),
    ):
        assert run(*datasets, *how, out=f"out{len(datasets)}") == 0
        assert seen.held_out == held_out
    # Scores of one text, in a mix with another one.
    one = tmp_path / "out2" / "scores.json"
    assert run(*three[:2], "--nsamples", 5, "--solve-only", "--overwrite", out="out2") == 0
    assert run(*three[:4], "--scores", one, "--nsamples", 3, "--avg-bits", 6, out="both") == 0
    assert seen.held_out == [(1, 5), (2, 5), (1, 6), (2, 6)]
    used = read(one)["calibration"]
    assert used["source"] == "1.npy" and "datasets" not in used


def test_what_judges_was_not_calibrated_with_where_a_dataset_does_both(
    run: Callable[..., int],
    three: list[object],
    seen: Seen,
    capsys: pytest.CaptureFixture[str],
) -> None:
    how = ("--avg-bits", 5, "--rounding", "rtn", "--gate", 2)
    judges = ["--eval-dataset" if word == "--dataset" else word for word in three[2:]]
    assert run(*three[:4], *how, *judges) == 0
    assert seen.gate == [(1, 2), (2, 2)]
    assert seen.held_out == [(2, 3), (3, 0), (2, 4), (3, 1)]
    assert run(*three[:2], "--nsamples", 61, "--eval-dataset", three[1], out="no") == 2
    message = "--eval-dataset must have 4 sequences of 32 tokens behind the first 61, which"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wikitext", "wikitext:config=wikitext-2-raw-v1"])
@pytest.mark.parametrize("more", [(), ("--dataset", "ptb_text_only")])
def test_what_is_typed_is_a_name_whatever_it_looks_like(
    name: str,
    more: tuple[str, ...],
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Names of the hub need no owner; in Python a list of such words is one of texts."""
    seen = []

    def load_dataset(name: str, *_: str, **__: Any) -> Any:
        seen.append(name)
        return [{"text": "a text of its own " * 40}]

    fake = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    model = add_tokenizer(make_model(tmp_path / "model"))
    words = ("--dataset", name, *more, "--rounding", "rtn", "--solve-only")
    assert run(*words, model=model) == 0
    assert seen == ["wikitext", *more[1:]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/1.npy,{}/2.npy"], "2.npy is no file; several are given one by one"),
        (["{}/1.npy", "--dataset", "{}/../{name}/1.npy"], "--dataset must name each dataset once"),
        (["{}/1.npy", "--dataset", "{}/2.npy", "--nsamples", "1"], "--nsamples must be at least 2"),
        (["{}/1.npy", "--dataset", "{}/2.npy", "--gate", "1"], "--gate must be at least 2"),
        (["{}/1.npy", "--dataset", "{}/2.npy", "--eval-nsamples", "1"], "--eval-nsamples must be"),
        (["{}/1.npy", "--dataset", "{}/short.npy"], "need 4 sequences of 32 tokens (4 for"),
    ],
)
def test_mixes_that_are_refused(
    words: list[str],
    message: str,
    run: Callable[..., int],
    three: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_ids(tmp_path / "short.npy", 3 * 32)
    told = [word.replace("{}", str(tmp_path)).format(name=tmp_path.name) for word in words]
    assert run("--dataset", *told) == 2
    error = capsys.readouterr().err
    assert message in error and ("short" not in words[-1] or "got 3 from" in error)
    assert "short.npy" in error or "short" not in words[-1]


def kl_by_text(folder: Path) -> dict[str, Any]:
    """Rows of report.json by the name of the text."""
    found = read(folder / "report.json")["evaluation"]["texts"]
    return {row["text"]: row for row in found["compared"]}


def test_the_result_is_compared_on_every_text_of_the_run(
    run: Callable[..., int], tmp_path: Path
) -> None:
    """That of calibration is as short as the shortest other one, and where there is none, none."""
    assert run("--avg-bits", 5, "--nsamples", 9, "--gate", 6, "--eval-nsamples", 8) == 0
    report, found = read(tmp_path / "out" / "report.json"), kl_by_text(tmp_path / "out")
    assert list(found) == ["calibration", "gate", "held-out"]
    assert [row["nsamples"] for row in found.values()] == [6, 6, 8]
    assert {row["source"] for row in found.values()} == {"ids.npy"}
    best, held_out = report["gate"]["candidates"][0], report["evaluation"]["held_out"]
    for row, of in ((found["gate"], best), (found["held-out"], held_out)):
        assert (row["kl"], row["kl_stderr"]) == (of["kl"], of["kl_stderr"])
    assert found["calibration"]["kl"] > 0 and found["calibration"]["kl_stderr"] > 0
    scores = ("--avg-bits", 5, "--scores", tmp_path / "out" / "scores.json")
    for options, names in (
        (["--gate", 0], ["calibration", "held-out"]),
        (["--gate", 3, "--rounding", "rtn"], ["gate", "held-out"]),  # nothing is made with it
        (["--gate", 0, "--rounding", "rtn"], ["held-out"]),
    ):
        assert run(*scores, *options, "--overwrite", out="b") == 0
        assert list(kl_by_text(tmp_path / "b")) == names


def test_the_same_text_everywhere_does_not_part(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nine sequences over and over: calibration, gate and held-out text are the same."""
    once = np.load(write_ids(tmp_path / "once.npy", 9 * 32))
    np.save(tmp_path / "again.npy", np.tile(once, 3))
    text = ("--dataset", tmp_path / "again.npy", "--nsamples", 9, "--gate", 9)
    assert run(*text, "--eval-nsamples", 9, "--avg-bits", 5) == 0
    found = kl_by_text(tmp_path / "out")
    assert found["calibration"]["kl"] == found["held-out"]["kl"]
    assert found["gate"]["kl"] == pytest.approx(found["held-out"]["kl"], rel=1e-3)
    assert read(tmp_path / "out" / "report.json")["evaluation"]["texts"]["sentence"] is None
    assert "calibration text" not in capsys.readouterr().out


def test_a_text_of_another_kind_is_told(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calibrated with one token over and over, which tells nothing of other text."""
    one, other = (write_ids(tmp_path / f"{n}.npy", 2048, vocab_size=n) for n in (1, 130))
    text = ("--dataset", one, "--eval-dataset", other, "--nsamples", 16, "--eval-nsamples", 16)
    assert run(*text, "--avg-bits", 5, "--correction", 0) == 0
    texts = read(tmp_path / "out" / "report.json")["evaluation"]["texts"]
    assert texts["sentence"].startswith("It keeps closer to its calibration text than to other")
    printed = capsys.readouterr().out
    assert texts["sentence"] in printed and texts["advice"] in printed
