"""The verdict: published formats get the word that docs/budget.md gives them, errors are minded."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from mixbits.formats.schemes import parse_scheme
from mixbits.report import verdict as v
from mixbits.report.report import Evaluation, HeldOut

DOCS = Path(__file__).parents[2] / "docs" / "budget.md"


def figures(ratio: Any, agreement: Any, ratio_error: Any = None, error: Any = None) -> dict:
    return {
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio_error,
        "top1_agreement": agreement,
        "top1_agreement_stderr": error,
    }


def test_the_table_of_the_documentation_is_what_is_done() -> None:
    """Its limits are those of the code, and every published row gets the word beside it."""
    text = DOCS.read_text(encoding="utf-8").split("## Is it good?")[1]
    limits = re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) % \|", text, re.M)
    assert [(w, float(r), float(a) / 100) for w, r, a in limits] == list(v.LEVELS[:-1])
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| ([\d.]+) \| ([\d.]+) % \| (\S+) \|", text, re.M)
    assert len(rows) > 8 and {word for *_, word in rows} == set(v.WORDS)
    for ratio, agreement, word in rows:
        assert v.verdict(figures(float(ratio), float(agreement) / 100))["word"] == word


@pytest.mark.parametrize("level", range(4))
def test_the_worse_criterion_decides_and_a_limit_belongs_to_the_better_word(level: int) -> None:
    word, most, least = v.LEVELS[level]
    assert v.verdict(figures(most, 1.0))["word"] == word
    assert v.verdict(figures(1.0, least))["word"] == word
    following = v.WORDS[level + 1]
    assert v.verdict(figures(most + 1e-9, 1.0))["word"] == following
    found = v.verdict(figures(0.9, least - 1e-9))
    assert found["word"] == following and "the agreement decides" in found["sentence"]


@pytest.mark.parametrize(
    ("given", "word", "border"),
    [
        ((1.03, 0.93, 0.019, 0.001), "good", None),
        ((1.03, 0.93, 0.021, 0.001), "good", "fair"),
        ((1.03, 0.93, 0.001, 0.031), "good", "fair"),
        ((1.06, 0.93, 0.011, 0.001), "fair", "good"),
        ((1.06, 0.85, 0.011, 0.001), "fair", None),  # the agreement alone says fair
        ((1.06, 0.85, 0.011, 0.060), "fair", "poor"),  # of two neighbours the worse
        ((1.00, 1.00, 0.0, 0.0), "near-lossless", None),
        ((9.00, 0.10, 8.5, 0.9), "unusable", "poor"),
    ],
)
def test_an_error_that_spans_a_limit_is_said(given: Any, word: str, border: str | None) -> None:
    found = v.verdict(figures(*given))
    assert (found["word"], found["border"]) == (word, border)
    assert (f"at the border of {border}" in found["sentence"]) == (border is not None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_what_is_no_number_is_unusable(bad: Any) -> None:
    for given in ((bad, 0.99), (1.0, bad)) if bad != math.inf else ((bad, 0.99),):
        assert v.verdict(figures(*given))["word"] == "unusable"


def test_errors_that_are_not_known_move_nothing() -> None:
    for error in (None, math.nan):
        found = v.verdict(figures(1.0499, 0.93, error, error))
        assert (found["word"], found["border"]) == ("good", None) and "±" not in found["sentence"]


def test_without_text_nothing_is_judged() -> None:
    for nothing in (None, {}):
        found = v.verdict(nothing)
        assert found["word"] == v.NOT_JUDGED and found["sentence"].startswith("Not judged")
    assert v.lines(None) == v.lines(Evaluation()) == v.lines(Evaluation(held_out=HeldOut())) == []


def circumstances(*schemes: str, **changes: Any) -> v.Circumstances:
    parsed = [parse_scheme(name) for name in schemes]
    known: dict[str, Any] = {"avg_bits": 4.5, "widest": 8.25, "gated": True, **changes}
    return v.Circumstances(parsed, **known)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (circumstances("MXFP4", "MXFP8"), "MXFP4 rounds activations to 4 bits"),
        (circumstances("MXFP4A16", "MXFP8A16"), "--avg-bits 5.5"),
        (circumstances("MXFP8"), "--avg-bits 5.5"),  # 8 bits of an activation cost little
        (circumstances("W4A16", tokens=2048, gated=False), "rounded with 2,048 tokens"),
        (circumstances("W4A16", tokens=2048), "--avg-bits 5.5"),  # another rounding was compared
        (circumstances("W4A16", avg_bits=7.9), "--avg-bits 8.25"),
        (circumstances("W8A16", avg_bits=8.1, gated=False), "leave the gate on"),
        (circumstances("W8A16", avg_bits=8.1, gated=False, gate_possible=False), "such as BF16"),
        (circumstances("BF16", avg_bits=16, widest=16), "--keep"),
    ],
)
def test_advice_follows_from_the_plan(given: v.Circumstances, part: str) -> None:
    bad, good = figures(2.4, 0.5), figures(1.02, 0.93)
    advice = v.verdict(bad, given)["advice"]
    assert part in advice and advice.count("\n") == 0
    assert v.verdict(good, given)["advice"] is None and v.verdict(bad)["advice"] is None
