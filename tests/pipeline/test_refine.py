"""Refining a plan: what is measured equals slow twins, and what is decided can only gain."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SMALL, make_model, read

from mixbits import quantize
from mixbits.errors import UsageError
from mixbits.measuring.evaluate import sequence_kl
from mixbits.measuring.text import Sequences
from mixbits.model.streaming import StreamedModel
from mixbits.pipeline.options import parse_arguments
from mixbits.pipeline.plans import make_problem
from mixbits.pipeline.refine import Meter, Picks, divergences, marginals, proposals, refine
from mixbits.pipeline.run import prepare
from mixbits.pipeline.scoring import measure
from mixbits.planning.allocate import Allocation, Item, allocate, total
from mixbits.planning.plan import Budget, Problem
from mixbits.runtime.fake import fake_quantize_model

IDS = torch.randint(0, 130, (7, 24), generator=torch.Generator().manual_seed(0))
CASES = {
    "layers": ["--schemes", "MXFP4,MXFP8", "--keep", "*.0.*.v_proj=MXFP8"],
    "three schemes": ["--schemes", "W2A16,W4A16,BF16", "--quantize-lm-head"],
    "fused": ["--schemes", "MXFP4,W8A16", "--fuse", "--rotate", "ffn"],
    "experts": ["--schemes", "MXFP4,MXFP8", "--ignore", "*.experts.1.*"],
}


def prepared(case: str, folder: Path) -> tuple[StreamedModel, Problem]:
    kind = "mixtral" if case == "experts" else "llama"
    words = [str(make_model(folder / "model", kind)), "--device", "cpu", "--seqlen", "24"]
    run = prepare(parse_arguments([*words, "--out", str(folder / "out"), *CASES[case]]))
    model = run.source.load()
    scores = measure(run, model, Sequences(IDS, "ids"), "none")
    return StreamedModel(model), make_problem(run, scores, False)


def slow(model: StreamedModel, problem: Problem, plan: Picks) -> float:
    """The KL of a copy of the model whose linears are replaced."""
    fake = copy.deepcopy(model.model).float()
    recipes = problem.plan(Allocation(plan, 0, 0.0, 0.0), "", Budget()).assignment
    fake_quantize_model(fake, recipes)
    return float(sequence_kl(model, StreamedModel(fake), IDS).mean())


def drawn(items: Sequence[Item], seed: int) -> Picks:
    """A plan with any option for each item."""
    generator = torch.Generator().manual_seed(seed)
    counts = [len(item.costs) for item in items]
    return tuple(int(torch.randint(n, (), generator=generator)) for n in counts)


@pytest.mark.parametrize("case", CASES)
def test_marginals_are_what_a_model_with_one_unit_changed_adds(case: str, tmp_path: Path) -> None:
    model, problem = prepared(case, tmp_path)
    at = drawn(problem.items, 1)
    changes = marginals(problem.items, at, Meter(model, problem, IDS, batch_size=3))
    kl = slow(model, problem, at)
    assert [(i.name, i.costs) for i in changes] == [(i.name, i.costs) for i in problem.items]
    for i, item in list(enumerate(changes))[:: len(changes) // 4]:
        for option, added in enumerate(item.losses):
            flipped = slow(model, problem, (*at[:i], option, *at[i + 1 :]))
            assert added == pytest.approx(flipped - kl, abs=1e-4 * kl)
            assert (added == 0.0) == (option == at[i])


@pytest.mark.parametrize("case", CASES)
def test_kept_blocks_change_nothing(case: str, tmp_path: Path) -> None:
    model, problem = prepared(case, tmp_path)
    linears = problem.linears
    first, *others = (
        problem.plan(Allocation(drawn(problem.items, seed), 0, 0.0, 0.0), "", Budget()).assignment
        for seed in range(3)
    )
    # Of the first block, of the last only, of the head or an expert, and of nothing.
    parts = [list(first)[:2], list(first)[-2:], list(first)[-1:], []]
    changes = [{name: other[name] for name in part} for other in others for part in parts]
    found = divergences(model, linears, first, changes, IDS, batch_size=3)
    assert found.shape == (1 + len(changes), len(IDS)) and found.dtype == torch.float64
    for row, change in zip(found, [{}, *changes], strict=True):
        whole = divergences(model, linears, {**first, **change}, [], IDS, batch_size=3)[0]
        assert torch.equal(row, whole)
    assert all(len(block._forward_hooks) == 0 for block in model.blocks)


def test_what_is_not_finite_is_named() -> None:
    items = [Item("first", (1, 2), (0.0, 0.0)), Item("second", (1, 2), (0.0, 0.0))]
    with pytest.raises(UsageError, match=r"must be finite to refine a plan: got nan \(second\)"):
        marginals(items, (0, 0), lambda plans: [float("nan") if p[1] else 1.0 for p in plans])


def test_units_that_the_text_does_not_reach_keep_what_was_predicted() -> None:
    items = [
        Item("reached", (1, 2, 3), (0.4, 0.2, 0.0)),
        Item("idle", (1, 2), (0.6, 0.1)),
        Item("fixed", (5,), (9.0,)),
    ]
    measured = {0: 1.8, 1: 1.4, 2: 1.0}  # twice what was predicted, of the first unit alone
    found = marginals(items, (2, 1, 0), lambda plans: [measured[plan[0]] for plan in plans])
    assert found[0].losses == pytest.approx((0.8, 0.4, 0.0))
    assert found[1].losses == pytest.approx((1.0, 0.0)) and found[2].losses == (0.0,)
    alone = marginals(items[1:], (1, 0), lambda plans: [1.0 for _ in plans])
    assert alone[0].losses == pytest.approx((0.5, 0.0))


class Quadratic:
    """KL of plans with interactions, and the knapsack; what was measured is kept."""

    def __init__(self, seed: int, count: int = 7, interaction: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        costs = torch.randint(1, 9, (count,), generator=generator).tolist()
        losses = torch.rand(count, generator=generator).tolist()
        # Three options, each half as lossy as the one before; an item has the last two only.
        self.items = [
            Item(f"{i}", (2 * c, 4 * c, 8 * c)[i == 0 :], (4 * x, x, x / 4)[i == 0 :])
            for i, (c, x) in enumerate(zip(costs, losses, strict=True))
        ]
        self.matrix = interaction * (torch.rand(count, count, generator=generator).double() - 0.5)
        self.budget = 4 * sum(costs)
        self.measured: dict[Picks, float] = {}

    def solve(self, items: Sequence[Item]) -> Picks:
        return allocate(items, self.budget).choice

    def measure(self, plans: Sequence[Picks]) -> list[float]:
        for plan in plans:
            roots = torch.tensor(
                [i.losses[o] ** 0.5 for i, o in zip(self.items, plan, strict=True)]
            ).double()
            self.measured[plan] = float(roots @ roots + roots @ self.matrix @ roots)
        return [self.measured[plan] for plan in plans]


@pytest.mark.parametrize("seed", range(12))
def test_rounds_only_gain_within_the_budget(seed: int) -> None:
    q = Quadratic(seed)
    start = q.solve(q.items)
    found = refine(q.items, start, q.measure, q.measure, q.solve, 6)
    assert total(q.items, found.plan)[0] <= q.budget
    taken = [row for row in found.rounds if row["kl"] < row["kl_before"]]
    assert found.rounds[: len(taken)] == taken  # whatever gains nothing is the end
    assert all(a["kl"] == b["kl_before"] for a, b in itertools.pairwise(found.rounds))
    last = taken[-1]["kl"] if taken else q.measured[start]
    assert q.measured[found.plan] == last <= q.measured[start]
    assert (found.plan == start) == (not taken)
    # A limit on rounds is the same up to there.
    assert refine(q.items, start, q.measure, q.measure, q.solve, 1).rounds == found.rounds[:1]


def test_most_starts_that_are_not_best_become_so() -> None:
    """Against all plans there are. Without interactions every start is best, and stays."""
    missed = {"start": 0, "refined": 0}
    for seed in range(12):
        q = Quadratic(seed)
        start = q.solve(q.items)
        found = refine(q.items, start, q.measure, q.measure, q.solve, 6)
        every = itertools.product(*(range(len(item.costs)) for item in q.items))
        best = min(q.measure([p for p in every if total(q.items, p)[0] <= q.budget]))
        missed["start"] += q.measured[start] > best
        missed["refined"] += q.measured[found.plan] > best
        alone = Quadratic(seed, interaction=0.0)
        start = alone.solve(alone.items)
        assert (
            refine(alone.items, start, alone.measure, alone.measure, alone.solve, 6).plan == start
        )
    assert missed["start"] >= 6 and missed["refined"] <= 1


@pytest.mark.parametrize("seed", range(6))
def test_proposals_are_other_plans_within_the_budget_each_once(seed: int) -> None:
    q = Quadratic(seed)
    at = (0,) * len(q.items)
    changes = marginals(q.items, at, q.measure)
    found = proposals(changes, at, q.solve)
    assert len(set(found)) == len(found) > 1 and at not in found
    assert all(total(q.items, plan)[0] <= q.budget for plan in found)
    assert found[0] == min(found, key=lambda plan: total(changes, plan)[1])
    moved = [sum(a != b for a, b in zip(plan, at, strict=True)) for plan in found]
    assert min(moved) < moved[0]
    # Each unit that the knapsack moves stays in a proposal, the best of those in which it does.
    for held in range(len(at)):
        if found[0][held] != at[held]:
            staying = [plan for plan in found if plan[held] == at[held]]
            one = [replace(i, costs=i.costs[:1], losses=i.losses[:1]) for i in changes]
            kept = [*changes[:held], one[held], *changes[held + 1 :]]
            best = allocate(_positive(kept), q.budget).choice
            assert min(total(changes, p)[1] for p in staying) == total(changes, best)[1]


def _positive(items: Sequence[Item]) -> list[Item]:
    return [replace(i, losses=tuple(x - min(i.losses) for x in i.losses)) for i in items]


@pytest.fixture(scope="module")
def misled(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose scores.json praises what hurts: the order of linears is turned around."""
    folder = tmp_path_factory.mktemp("misled")
    words = [str(shared / "llama"), "--dataset", str(shared / "ids.npy"), *SMALL, "--solve-only"]
    assert quantize.main([*words, "--avg-bits", "6", "--out", str(folder), "--overwrite"]) == 0
    data = read(folder / "scores.json")
    rows = data["linears"]
    for scheme in ("MXFP4", "MXFP8"):
        losses = {name: row["scores"][scheme] for name, row in rows.items()}
        middle = max(losses.values()) * min(losses.values())
        for name, loss in losses.items():
            rows[name]["scores"][scheme] = middle / loss
    # The hash is that of the content again, so that the scores are believed.
    content = {k: v for k, v in data.items() if k != "sha256"}
    data["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "scores.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("budget", ["bits", "elements", "bytes"])
def test_a_misled_plan_is_improved(
    budget: str, run: Callable[..., int], misled: Path, tmp_path: Path, capsys: Any
) -> None:
    kept, size = "model.layers.1.mlp.up_proj", read(misled / "report.json")["reached"]
    words: list[Any] = (
        ["--size", size["predicted_bytes"]] if budget == "bytes" else ["--avg-bits", 6]
    )
    words += ["--ignore-scale-bits"] * (budget == "elements") + ["--keep", f"{kept}=MXFP8"]
    words += ["--scores", misled / "scores.json", "--rounding", "rtn"]
    assert run(*words, "--refine", 3, "--gate", 6) == 0
    printed, report = capsys.readouterr().out, read(tmp_path / "out" / "report.json")
    rounds = report["refine"]["rounds"]
    assert report["refine"]["nsamples"] == [2, 2] and 1 <= len(rounds) <= 3
    assert rounds[0]["kl"] < rounds[0]["kl_before"]
    assert "] refine" in printed and printed.count("KL on the calibration text") == len(rounds)
    measured = {row["name"]: row["kl"] for row in report["gate"]["candidates"]}
    assert measured["optimal, refined"] < measured["optimal"]
    # Without a gate the refined plan is the one that ships, within its budget.
    assert run(*words, "--refine", 3, "--solve-only", out="solved") == 0
    plan = read(tmp_path / "solved" / "plan.json")
    assert plan["strategy"] == "optimal, refined"
    schemes = {unit["unit"]: unit["scheme"] for unit in plan["units"]}
    assert schemes[kept] == "MXFP8" and set(schemes.values()) == {"MXFP4", "MXFP8"}
    reached = read(tmp_path / "solved" / "report.json")["reached"]
    if budget == "bytes":
        assert reached["predicted_bytes"] <= size["predicted_bytes"]
    else:
        key = "avg_bits" if budget == "bits" else "avg_bits_without_scales"
        assert reached[key] <= 6


def test_a_plan_that_is_best_stays(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    """One scheme leaves nothing to be changed."""
    assert run("--schemes", "MXFP4", "--avg-bits", 4.2571, "--refine", "--solve-only") == 0
    assert "no other plan was proposed" in capsys.readouterr().out
    assert read(tmp_path / "out" / "plan.json")["strategy"] == "optimal"
    assert read(tmp_path / "out" / "report.json")["refine"]["rounds"] == []


BAD = {
    "no rounds": (["--refine", "0"], "--refine: must be a whole number of at least 1: got '0'"),
    "slabs": (["--refine", "--granularity", "slab"], "--refine measures whole linears"),
    "a baseline": (["--refine", "--strategy", "head"], "it cannot go with --strategy head"),
    "a quality": (["--refine", "--max-kl", "0.1", "--gate", "2"], "--max-kl looks for one"),
    "a plan": (["--refine", "--plan", "plan.json"], "--refine helps to make a plan"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_it_cannot_go_with(case: str, run: Callable[..., int], capsys: Any) -> None:
    options, expected = BAD[case]
    assert run(*options) == 2
    assert expected in capsys.readouterr().err
