"""The gate ships what is really best on its text, and says by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model

from mixbits.formats.recipes import parse_recipe
from mixbits.formats.scale_range import ScaleError
from mixbits.measuring.evaluate import sequence_kl
from mixbits.measuring.text import Sequences
from mixbits.model.layout import find_linears
from mixbits.pipeline.candidates import Candidate, Contest, compared
from mixbits.pipeline.gate import choose
from mixbits.pipeline.roundings import Gptq, Nearest, Rounding, Search, Subject
from mixbits.planning.plan import Plan
from mixbits.rounding.whole_model import RoundedModel, round_model
from mixbits.source.source import open_source


def plan(linears: list[Any], schemes: list[str]) -> Plan:
    units = [
        {"unit": i.name, "scheme": s, "linears": {i.name: "all"}}
        for i, s in zip(linears, schemes, strict=True)
    ]
    data = {"weight_scale_mode": "floor", "act_scale_mode": "floor", "units": units}
    return Plan(data, {i.name: i for i in linears})


@pytest.fixture
def given(tmp_path: Path) -> tuple[Subject, dict[str, Plan]]:
    source = open_source(str(make_model(tmp_path)))
    model = source.load()
    linears = find_linears(model)
    text = Sequences(torch.randint(0, 130, (8, 32)), "ids")
    count = len(linears)
    plans = {
        "optimal": plan(linears, ["MXFP4"] * count),
        "uniform": plan(linears, ["MXFP4"] * count),
        "head": plan(linears, ["MXFP8"] * (count - 2) + ["MXFP4"] * 2),
        "tail": plan(linears, ["MXFP4"] * (count - 2) + ["MXFP8"] * 2),
    }
    return Subject(source, model, linears, text), plans


def test_the_plans_without_repetition_and_the_best_of_them_compensated(given: Any) -> None:
    plans = given[1]
    found = compared(plans, Gptq(0.5))
    names = ["optimal, search", "head, search", "tail, search"]
    assert [(c.name, c.rounding) for c in found.first] == [(name, Search()) for name in names]
    assert [(c.name, c.plan, c.rounding) for c in found.after(found.first[1])] == [
        ("head", plans["head"], Gptq(0.5)),
        ("head, correction 0", plans["head"], Gptq(0.0)),
    ]
    assert [c.name for c in compared(plans, Gptq(0.0)).after(found.first[0])] == ["optimal"]
    found = compared(plans, Search())
    assert [c.name for c in found.first] == ["optimal", "head", "tail"]
    assert not found.after(found.first[0])


@pytest.mark.parametrize("how", [Nearest(), Gptq(0.5)])
def test_the_lowest_divergence_wins_and_the_rows_tell_the_paired_differences(
    given: Any, how: Rounding
) -> None:
    subject, plans = given
    model, linears = subject.streamed, subject.linears
    held_out = torch.randint(0, 130, (6, 32))
    found = compared(plans, how)
    decision = choose(subject, found, held_out)
    measured = {}
    best = next(c for c in found.first if c.name.startswith("head"))
    for c in [*found.first, *found.after(best)]:
        recipes = c.plan.assignment
        told = c.rounding.describe()
        share = told.get("correction", 0.0)
        rounded = round_model(model, linears, recipes, told["method"], subject.text.ids, share)
        measured[c.name] = sequence_kl(
            model, RoundedModel(model, linears, recipes, rounded), held_out
        )
    best = min(measured, key=lambda name: float(measured[name].mean()))
    assert decision.winner.name == best == decision.rows[0]["name"]
    assert best.startswith("head")
    assert {row["name"] for row in decision.rows} == set(measured)
    assert [row["kl"] for row in decision.rows] == sorted(row["kl"] for row in decision.rows)
    assert set(decision.rows[0]) == {"name", "kl", "kl_stderr"}
    for row in decision.rows:
        assert row["kl"] == float(measured[row["name"]].mean())
        own = float(measured[row["name"]].std()) / 6**0.5
        assert row["kl_stderr"] == pytest.approx(own, rel=1e-12)
        if row["name"] != best:
            difference = measured[row["name"]] - measured[best]
            assert row["behind"] == pytest.approx(float(difference.mean()), rel=1e-12)
            stderr = float(difference.std()) / 6**0.5
            assert row["interval"] == pytest.approx(1.959964 * stderr, rel=1e-6)
    winner = decision.winner.plan.assignment
    shipped = sequence_kl(
        model, RoundedModel(model, linears, winner, decision.outcome.weights), held_out
    )
    assert torch.equal(shipped, measured[best])


def test_equals_are_settled_for_the_first(given: Any) -> None:
    subject, plans = given
    twice = [Candidate(name, plans["tail"], Nearest()) for name in ("first", "second")]
    decision = choose(subject, Contest(twice), torch.randint(0, 130, (4, 32)))
    assert decision.winner.name == "first"
    assert decision.rows[0].keys() == {"name", "kl", "kl_stderr"}
    assert (decision.rows[1]["behind"], decision.rows[1]["interval"]) == (0.0, 0.0)
    assert parse_recipe("MXFP8", "floor", "floor") in decision.winner.plan.assignment.values()


class _Refused(Nearest):
    def __call__(self, *args: Any) -> Any:
        raise ScaleError("a weight is too small")


def test_what_cannot_be_packed_is_told_and_left_out(
    given: Any, printed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    subject, plans = given
    ids = torch.randint(0, 130, (4, 32))
    fails = Candidate("fails", plans["head"], _Refused())
    works = Candidate("works", plans["tail"], Nearest())
    decision = choose(subject, Contest([fails], lambda best: [works]), ids)
    assert decision.winner is works and [row["name"] for row in decision.rows] == ["works"]
    assert "without fails: a weight is too small" in capsys.readouterr().out
    with pytest.raises(ScaleError, match="too small"):
        choose(subject, Contest([fails, fails]), ids)


def test_one_alone_ships_without_a_comparison(given: Any) -> None:
    subject, plans = given
    only = Contest([Candidate("only", plans["tail"], Nearest())])
    decision = choose(subject, only, torch.empty(0))
    assert decision.winner.name == "only" and not decision.rows
    assert decision.outcome.weights and decision.outcome.told == {"method": "rtn"}
