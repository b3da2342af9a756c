"""Whether texts part is said where it is sure and worth a word, and everywhere alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_card import report_of
from test_html import Page

from mixbits.measuring.evaluate import interval
from mixbits.pipeline import telling
from mixbits.report import card, html
from mixbits.report.parting import FEWEST, texts_compared
from mixbits.report.report import Report
from mixbits.source.source import Source


def compared(*kls: float | None, stderr: float = 0.001, nsamples: int = 32) -> dict[str, Any]:
    """Of KL on calibration, gate's and held-out text, as far as there are such."""
    rows = zip(("calibration", "gate", "held-out"), kls, strict=True)
    figures = {"nsamples": nsamples, "seqlen": 8, "kl_stderr": stderr, "source": "a.txt"}
    return texts_compared([{"text": n, "kl": kl, **figures} for n, kl in rows if kl is not None])


FOLLOWS, KIND = "It keeps closer to its calibration text", "is harder to keep to than"


@pytest.mark.parametrize(
    ("kls", "said"),
    [
        ((0.08, 0.115, 0.13), FOLLOWS),
        ((0.08, None, 0.13), FOLLOWS),
        ((0.08, 0.119, 0.121), FOLLOWS),  # both are above, one of them by enough
        ((0.08, 0.13, 0.2), FOLLOWS),
        ((0.08, 0.081, 0.13), KIND),
        ((0.08, 0.13, 0.119), None),  # what judges is not the gate's text
        ((0.08, 0.08, 0.08), None),
        ((0.12, 0.08, 0.08), None),
        ((None, 0.08, 0.13), None),
        ((None, None, 0.13), None),
        ((0.0, 0.0, 0.0), None),  # nothing was rounded
        ((0.08, float("nan"), float("nan")), None),
    ],
)
def test_the_judging_text_is_more_than_half_as_much_above(
    kls: tuple[Any, ...], said: str | None
) -> None:
    found = compared(*kls)
    assert [row["text"] for row in found["compared"]] == [
        name
        for name, kl in zip(("calibration", "gate", "held-out"), kls, strict=True)
        if kl is not None
    ]
    if said is None:
        assert (found["sentence"], found["advice"]) == (None, None)
        return
    assert said in found["sentence"] and "--dataset" in found["advice"]
    for kl in kls:
        assert kl is None or f"{kl:.4f} ± 0.0010" in found["sentence"]


def test_it_is_beyond_the_joint_interval() -> None:
    """0.05 apart: standard errors may come to 0.0255 together, which is 0.0180 of each."""
    assert interval(0.3, 0.4) == pytest.approx(1.959964 * 0.5, rel=1e-6)
    assert compared(0.08, None, 0.13, stderr=0.0179)["sentence"]
    assert compared(0.08, None, 0.13, stderr=0.0182)["sentence"] is None


def test_a_few_sequences_say_nothing() -> None:
    assert compared(0.08, None, 0.13, nsamples=FEWEST)["sentence"]
    assert compared(0.08, None, 0.13, nsamples=FEWEST - 1)["sentence"] is None
    assert compared(0.08, None, 0.13, stderr=float("nan"))["sentence"] is None


@pytest.mark.parametrize("kls", [(0.08, 0.115, 0.13), (0.08, 0.081, 0.13), (0.08, 0.08, 0.08)])
def test_it_is_said_in_the_terminal_on_the_page_and_on_the_card(
    kls: tuple[float, ...], shared: Path, printed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = report_of("a.txt")
    data["evaluation"] = {"held_out": data["evaluation"]["held_out"], "texts": compared(*kls)}
    data["evaluation"]["verdict"] = {"word": "good", "sentence": "Good: it is."}
    report = Report.of(data)
    telling.results(report)
    terminal = capsys.readouterr().out
    page = Page(html.render(report)).text
    rows = [["module", "MXFP4", "bits"], ["all", "1", "4"]]
    made = card.render("out", Source("a", shared / "llama", None), rows, report)
    for kl in kls:
        assert f"{kl:.4f} ± 0.0010" in page  # in the table of texts, whether they part or not
    found = data["evaluation"]["texts"]
    if found["sentence"] is None:
        assert "calibration text" not in terminal + made
        return
    assert found["sentence"] in terminal and found["advice"] in terminal
    assert found["sentence"] in page and found["advice"] in page
    assert found["sentence"] in made and found["advice"] not in made
