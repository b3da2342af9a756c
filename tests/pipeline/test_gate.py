"""The gate ships what is really best on its text, and says by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model

from mixbits.formats.recipes import parse_recipe
from mixbits.measuring.evaluate import sequence_kl
from mixbits.model.layout import find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.pipeline.gate import Candidate, candidates, choose
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
def subject(tmp_path: Path) -> tuple[StreamedModel, list[Any], dict[str, Plan]]:
    model = StreamedModel(open_source(str(make_model(tmp_path))).load())
    linears = find_linears(model.model)
    count = len(linears)
    plans = {
        "optimal": plan(linears, ["MXFP4"] * count),
        "uniform": plan(linears, ["MXFP4"] * count),
        "head": plan(linears, ["MXFP8"] * (count - 2) + ["MXFP4"] * 2),
        "tail": plan(linears, ["MXFP4"] * (count - 2) + ["MXFP8"] * 2),
    }
    return model, linears, plans


def test_candidates_are_the_plans_without_repetition(subject: Any) -> None:
    _, _, plans = subject
    named = [(c.name, c.share) for c in candidates(plans, "gptq", 0.5)]
    assert named == [
        ("optimal", 0.5),
        ("optimal, correction 0", 0.0),
        ("head", 0.5),
        ("tail", 0.5),
    ]
    assert [c.name for c in candidates(plans, "search", 0.5)] == ["optimal", "head", "tail"]
    assert [c.name for c in candidates(plans, "gptq", 0.0)] == ["optimal", "head", "tail"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_lowest_divergence_wins_and_the_rows_tell_the_paired_differences(
    subject: Any, method: str
) -> None:
    model, linears, plans = subject
    ids, held_out = torch.randint(0, 130, (8, 32)), torch.randint(0, 130, (6, 32))
    found = candidates(plans, method, 0.5)
    choice = choose(model, linears, found, method, ids, held_out)
    measured = {}
    for c in found:
        recipes = c.plan.assignment
        rounded = round_model(model, linears, recipes, method, ids, c.share)
        measured[c.name] = sequence_kl(
            model, RoundedModel(model, linears, recipes, rounded), held_out
        )
    best = min(measured, key=lambda name: float(measured[name].mean()))
    assert choice.winner.name == best == choice.rows[0]["name"] == "head"
    assert [row["kl"] for row in choice.rows] == sorted(row["kl"] for row in choice.rows)
    assert set(choice.rows[0]) == {"name", "kl"}
    for row in choice.rows:
        assert row["kl"] == float(measured[row["name"]].mean())
        if row["name"] != best:
            difference = measured[row["name"]] - measured[best]
            assert row["behind"] == pytest.approx(float(difference.mean()), rel=1e-12)
            stderr = float(difference.std()) / 6**0.5
            assert row["interval"] == pytest.approx(1.959964 * stderr, rel=1e-6)
    winner = choice.winner.plan.assignment
    shipped = sequence_kl(model, RoundedModel(model, linears, winner, choice.rounded), held_out)
    assert torch.equal(shipped, measured[best])


def test_equals_are_settled_for_the_first(subject: Any) -> None:
    model, linears, plans = subject
    twice = [Candidate(name, plans["tail"], 0.0) for name in ("first", "second")]
    ids = torch.randint(0, 130, (4, 32))
    choice = choose(model, linears, twice, "rtn", ids, ids)
    assert choice.winner.name == "first"
    assert choice.rows[0].keys() == {"name", "kl"}
    assert (choice.rows[1]["behind"], choice.rows[1]["interval"]) == (0.0, 0.0)
    assert parse_recipe("MXFP8", "floor", "floor") in choice.winner.plan.assignment.values()
