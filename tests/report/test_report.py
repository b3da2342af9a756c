"""report.json as types: what is read is written again to the byte, and what is wrong is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_html import made_up

from mixbits.errors import UsageError
from mixbits.files.io import write_text
from mixbits.measuring.scores import dump
from mixbits.report import tables
from mixbits.report.report import Evaluation, Report, Stage


def test_what_is_read_is_written_again_to_the_byte(tmp_path: Path) -> None:
    """In whatever order the keys are, with keys of other versions, and whole numbers as such."""
    report = {"mixbits_report": 1, **made_up()[0], "of_a_later_version": {"b": [1, 2.0], "a": None}}
    report["budget"] = {"counted": "elements", "avg_bits": 5}
    report["left_alone"] = [{"share": 0.25, "class": "Embedding", "why": "no linear", "x": 1}]
    report["evaluation"]["held_out"] |= {"kl_stderr": math.nan, "perplexity": 7}
    for data in (report, dict(reversed(report.items()))):
        write_text(tmp_path / "report.json", dump(data))
        found = Report.read(tmp_path / "report.json")
        assert found.text() == dump(data) == Report.of(data).text()
        assert list(found.data()) == list(data)
    assert found.held_out and found.held_out.kl_stderr is None  # JSON has no NaN
    assert found.left_alone and found.left_alone[0].kind == "Embedding"


def test_what_is_set_later_is_written_and_what_is_not_known_is_not() -> None:
    report = Report.of({"mixbits_report": 1, "gate": None})
    assert report.data() == {"mixbits_report": 1, "gate": None}
    report.bytes_after = None
    report.evaluation = Evaluation.of({"sample": "x"})
    report.stages = [Stage(stage="open", seconds=1.5, peak_memory_bytes=7)]
    row = {"stage": "open", "seconds": 1.5, "peak_memory_bytes": 7}
    later = {"bytes_after": None, "evaluation": {"sample": "x"}, "stages": [row]}
    assert json.loads(report.text()) == {"mixbits_report": 1, "gate": None, **later}


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({}, "must hold 'mixbits_report': 1: got None"),
        ({"mixbits_report": 2}, "must hold 'mixbits_report': 1: got 2"),
        ({"mixbits_report": 1, "gate": {"candidates": [{"kl": "low"}]}}, "gate.candidates[0].kl"),
        ({"mixbits_report": 1, "reached": None}, "reached must"),
        ({"mixbits_report": 1, "curve": 7}, "curve must be a valid list: got 7"),
    ],
)
def test_no_report_is_one_sentence(data: Any, part: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(UsageError) as error:
        Report.read(tmp_path / "report.json")
    assert part in str(error.value) and "report.json" in str(error.value)


def test_figures_that_are_not_known_are_not_made_up() -> None:
    """The same rows in the terminal, on the card and on the page."""
    scores = {"acc": 0.25, "acc_stderr": 0.125, "ppl": 3.0}
    tasks = {"tasks": {"t": scores, "u": {"acc": 0.5}}, "average": 0.375, "average_stderr": None}
    held_out = {"kl": 0.5, "kl_stderr": math.nan, "perplexity": 2.0, "perplexity_stderr": 0.25}
    evaluation = {"held_out": held_out, "tasks": tasks, "original_tasks": {"tasks": {"t": scores}}}
    report = Report.of({"evaluation": evaluation, "bytes_before": 2000, "bytes_after": 10})
    assert report.evaluation
    assert tables.task_rows(report.evaluation) == [
        ["task", "metric", "original", "quantized"],
        ["t", "acc", "0.2500 ± 0.1250", "0.2500 ± 0.1250"],
        ["t", "ppl", "3.0000", "3.0000"],
        ["u", "acc", "-", "0.5000"],
        ["mean of 2 tasks", "acc", "-", "0.3750"],
    ]
    assert tables.result_rows(report) == [
        ["", "original", "quantized"],
        ["weight files", "2.00 kB", "10 B"],
        ["KL, nats/token", "0", "0.5000"],
        ["perplexity", "-", "2.000 ± 0.250"],
        ["top-1 agreement", "1", "-"],
    ]
    assert tables.task_rows(Evaluation()) == []


def test_accuracies_of_two_models_are_paired_by_document() -> None:
    """Each task's mean difference d, and 1.96 times its error; of the mean of both, likewise."""

    def tasks(a: list[float], b: list[float]) -> dict[str, Any]:
        means = {"a": {"acc": sum(a) / 4, "acc_norm": 0.5}, "b": {"acc": sum(b) / 2}}
        return {"tasks": means, "average": 0.5, "documents": {"a": a, "b": b}}

    one, two = tasks([1, 1, 0, 1], [0, 1]), tasks([0, 1, 0, 1], [1, 1])
    rows = tables.task_rows(Evaluation.of({"original_tasks": one, "tasks": two}))
    assert [row[-1] for row in rows] == [
        "difference, 95 %",
        "-0.2500 ± 0.4900",  # changes -1 0 0 0: deviation 1/2, error 1/4
        "",
        "0.5000 ± 0.9800",  # changes 1 0: deviation 1/sqrt 2, error 1/2
        "0.1250 ± 0.5478",  # sqrt(1/16 + 1/4) / 2 is its error
    ]
    two["documents"]["b"] = [1]  # fewer documents: nothing to pair
    rows = tables.task_rows(Evaluation.of({"original_tasks": one, "tasks": two}))
    assert [row[-1] for row in rows][1:] == ["-0.2500 ± 0.4900", "", "", ""]
