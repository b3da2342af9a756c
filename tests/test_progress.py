"""Progress: the time left comes from the work that was done, and nothing is drawn unasked."""

from __future__ import annotations

import io
import itertools

import pytest

from mixbits import progress as p
from mixbits.pipeline import work as work_of
from mixbits.pipeline.options import parse_arguments


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_first_batch_tells_how_long_the_rest_takes() -> None:
    clock = Clock()
    run = p.Progress({"measure": 40.0, "round": 60.0, "evaluate": 100.0}, io.StringIO(), clock)
    clock.now = 7.0  # opening takes time, which says nothing of the rest
    with run.stage("measure"):
        assert run.left() is None
        advance = p.steps(4, 10.0)
        clock.now += 2.0
        advance()
        assert run.left() == pytest.approx(0.2 * 190) and run.share() == pytest.approx(10 / 200)
        for _ in range(3):
            clock.now += 2.0
            advance()
    assert run.left() == pytest.approx(0.2 * 160)
    with run.stage("round"):
        advance = p.steps(6, 10.0)
        clock.now += 5.0  # this stage is slower: its own pace counts for itself
        advance()
        pace = (8 + 5) / 50
        assert run.left() == pytest.approx(0.5 * 50 + pace * 100)
        text = run.text()
        assert text.startswith("25 %, about ") and "20 s so far: round" in text


def test_work_that_was_not_foreseen_is_added_and_what_is_over_is_done() -> None:
    clock = Clock()
    run = p.Progress({"measure": 100.0, "evaluate": 10.0}, io.StringIO(), clock)
    with run.stage("measure"):
        advance = p.steps(5, 10.0)
        for _ in range(5):
            clock.now += 1.0
            advance()
    assert run.share() == pytest.approx(50 / 60)  # it needed half of what was expected
    with run.stage("evaluate"):
        advance = p.steps(30)
        assert run.work["evaluate"] == 30
        clock.now += 1.0
        advance(30)
    assert run.share() == 1.0 and run.left() == pytest.approx(0.0)


def test_candidates_are_numbered_and_the_first_says_what_the_others_take() -> None:
    clock = Clock()
    run, seen = p.Progress({"round": 5000.0}, io.StringIO(), clock), []
    with run.stage("round"):
        for _ in p.numbered("abcd", "candidate"):
            seen.append(run.part)
            advance = p.steps(10)
            clock.now += 1.0
            advance(10)
        assert run.part == ""
        assert run.work["round"] == 40.0
    assert seen == [f"candidate {i} of 4" for i in (1, 2, 3, 4)]


def test_what_is_known_of_one_round_replaces_the_guess_of_all() -> None:
    run, ahead = p.Progress({"evaluate": 8000.0}, io.StringIO(), Clock()), []
    with run.stage("evaluate"):
        for _ in p.numbered("ab", "model"):
            advance = p.steps(300, 2.0, is_all=True)
            ahead.append(run.work["evaluate"] - run.done["evaluate"])
            advance(300)
    assert ahead == [1200, 600] and run.share() == 1


def test_functions_called_from_python_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    advance = p.steps(10)
    with p.part("something"):
        advance()
        advance(3)
    assert list(p.numbered([1, 2], "candidate")) == [1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("printed")
def test_without_a_terminal_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock, stream = Clock(), io.StringIO()
    run = p.Progress({"measure": 1000.0}, stream, clock)
    with run.stage("measure"):
        advance = p.steps(1000)
        for _ in range(1000):
            clock.now += 1.0
            advance()
    lines = capsys.readouterr().out.splitlines()
    assert stream.getvalue() == "" and 3 <= len(lines) <= 7
    assert lines[0] == "      3 %, about 16 min 10 s left, 30 s so far: measure"
    assert all(line.isprintable() for line in lines)


def test_on_a_terminal_there_is_one_bar_that_goes(capsys: pytest.CaptureFixture[str]) -> None:
    clock, stream = Clock(), Terminal()
    run = p.Progress({"measure": 10.0, "round": 10.0}, stream, clock)
    for name in ("measure", "round"):
        with run.stage(name):
            advance = p.steps(10)
            for _ in range(10):
                clock.now += 1.0
                advance()
            with p.printed():
                p.say("a line beside it")
    drawn = stream.getvalue()
    assert "50 %, about 10 s left" in drawn and "100 %" in drawn and "\n" not in drawn
    assert drawn.rpartition("\r")[0].rpartition("\r")[2].strip() == ""  # wiped in the end
    assert capsys.readouterr().out == "a line beside it\n" * 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.4, "59.4 s"), (59.96, "1 min 0 s"), (125, "2 min 5 s"),
     (3599.7, "1 h 0 min"), (4260, "1 h 11 min")],
)  # fmt: skip
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert p.duration(seconds) == text


def test_what_is_planned_follows_from_the_arguments() -> None:
    def work(*options: str) -> dict[str, float]:
        words = ["m", "--nsamples", "8", "--gate", "4", "--eval-nsamples", "2", *options]
        return work_of.planned_work(parse_arguments(words), blocks=10, units=7)

    plain = work()
    assert plain["measure"] == 4 * 8 * 10 and plain["evaluate"] == 2 * (2 + 2) * 10
    assert work("--scores", "s.json", "--rounding", "rtn")["evaluate"] == 2 * 2 * 10
    assert work("--eval-nsamples", "0")["evaluate"] == 0
    assert work("--eval-nsamples", "6")["evaluate"] == 2 * (6 + 4) * 10  # the gate's are 4
    # Four plans by searched scales; the best of them is compensated twice.
    assert plain["round"] == (4 * (1 + 2 * 4) + 2 * (2 * 8 + 2 * 4)) * 10
    assert work("--rounding", "rtn")["round"] == 4 * (1 + 2 * 4) * 10
    assert work("--gate", "0")["round"] == 2 * 8 * 10
    assert work("--plan", "p.json")["measure"] == 0
    assert work("--max-kl", "0.1")["allocate"] > plain["allocate"] == 0
    assert work("--diagnose")["diagnose"] == (7 * 4 + 4 * 8) * 10
    assert work("--granularity", "slab")["measure"] == 2 * plain["measure"]
    both = work("--method", "deltaloss", "--schemes", "MXFP4,MXFP8")
    assert both["measure"] == 2 * plain["measure"]
    tasks = work("--tasks", "a,b", "--limit", "5", "--eval-original")["evaluate"]
    assert tasks - plain["evaluate"] == 2 * 2 * work_of.CHOICES * 5 * 10
    assert all(a >= 0 for a in itertools.chain(plain.values(), both.values()))


def test_what_a_terminal_would_obey_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with p.printed():
        p.say("name \x1b[2J\x1b]0;title\x07 of\u202e it\r\nnext\tcell \ud83d")
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and "\x1b" not in out and "\u202e" not in out
    assert all(line.isprintable() for line in out.split("\n"))
    assert "next cell" in out
