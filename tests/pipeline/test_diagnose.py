"""What the report says beside its figures, against slow twins."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import make_model
from torch import nn

from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Recipe, parse_scheme
from mixbits.measuring.evaluate import sequence_kl
from mixbits.measuring.sensitivity import measure as measure_sensitivity
from mixbits.measuring.text import Sequences
from mixbits.model.layout import find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.pipeline import diagnose as findings
from mixbits.pipeline import process
from mixbits.pipeline.diagnose import fidelity, linear_bits, swaps
from mixbits.pipeline.options import parse_arguments
from mixbits.pipeline.plans import Planned, Solved
from mixbits.pipeline.run import Run, prepare
from mixbits.pipeline.scoring import measure
from mixbits.pipeline.texts import Text
from mixbits.planning.plan import Budget, Problem, average_bits
from mixbits.runtime.fake import fake_quantize_model
from mixbits.source.source import open_source

IDS = torch.randint(0, 130, (8, 24), generator=torch.Generator().manual_seed(0))


def prepared(folder: Path, *options: str) -> tuple[Run, nn.Module, Problem]:
    words = [str(make_model(folder / "model")), "--device", "cpu", "--seqlen", "24", *options]
    words += ["--schemes", "MXFP4,MXFP8"]
    run = prepare(parse_arguments([*words, "--out", str(folder / "out")]))
    model = run.source.load()
    scores = measure(run, model, Sequences(IDS, "ids"), "none")
    return run, model, findings.make_problem(run, scores, run.settings.slabs)


@pytest.mark.parametrize("most", [200, 5])
@pytest.mark.parametrize("how", ["layer", "slab"])
def test_a_unit_alone_is_the_model_with_that_unit_quantized(
    how: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "MOST_UNITS", most)
    keep = ["--keep", "*.0.*.v_proj=MXFP8"] if how == "layer" else ["--rotate", "ffn"]
    run, model, problem = prepared(tmp_path, "--granularity", how, "--batch-size", "3", *keep)
    rows = fidelity(run, StreamedModel(model), problem, IDS)
    units = {unit.name: unit for unit in run.units}
    assert len(rows) == min(most, len(units))
    assert list(dict.fromkeys(row["unit"] for row in rows)) == [row["unit"] for row in rows]
    schemes = {row["unit"]: row["scheme"] for row in rows}
    assert schemes.get("model.layers.0.self_attn.v_proj", "MXFP8") == "MXFP8"
    original = copy.deepcopy(model).float()
    for row in rows[:: max(1, len(rows) // 4)]:
        fake = copy.deepcopy(original)
        recipes = {}
        for info in units[row["unit"]].linears:
            scheme = parse_scheme(row["scheme"], *run.scale_modes)
            order, rotated = (f(info.name) for f in (problem.scores.order, problem.scores.rotated))
            places = None if order is None else tuple(order)
            mixed = Recipe(((scheme, info.in_features),), places, rotated)
            recipes[info.name] = mixed if places or rotated else Recipe.plain(scheme)
        fake_quantize_model(fake, recipes)
        kl = sequence_kl(StreamedModel(model), StreamedModel(fake), IDS).mean()
        assert row["measured"] == pytest.approx(float(kl), rel=1e-3)


@pytest.mark.parametrize("how", ["layer", "slab"])
def test_the_halves_are_scored_on_their_own_text(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model, problem = prepared(tmp_path, "--granularity", how, "--rotate", "ffn")
    allocation = problem.allocate(Budget(6.0), "optimal")
    solved = Solved(problem, allocation, problem.plan(allocation, "optimal", Budget(6.0)))
    planned = Planned({"optimal": solved.plan}, problem.scores, {"optimal": solved})
    calls = []
    monkeypatch.setattr(findings, "stability", lambda *args: calls.append(args))
    text = Text(Sequences(IDS[:5], "ids"), Sequences(IDS[5:], "ids"), Sequences(IDS[:0], "none"))
    found = findings.diagnose(run, process.make_subject(run, model, text), planned, text)
    assert -1 <= found["rank_correlation"] <= 1 and len(found["measured"]) == len(run.units)
    ((items, halves, bits),) = calls
    assert items is problem.items and bits == allocation.cost
    assert [item.costs for item in halves[0]] == [item.costs for item in items]
    for half, ids in zip(halves, (IDS[:2], IDS[2:5]), strict=True):
        arranged = findings.arrangements_of(run, problem.scores, torch.device("cpu"))
        assert all(a.rotated for name, a in arranged.items() if name.endswith("down_proj"))
        slabs = measure_sensitivity(
            StreamedModel(model), run.linears, run.schemes, ids, arrangements=arranged
        )
        total = sum(sum(by_scheme["MXFP4"]) for by_scheme in slabs.values())
        assert sum(item.losses[0] for item in half) == pytest.approx(total, rel=1e-6)
    assert halves[0] != halves[1]


@pytest.mark.parametrize("how", ["layer", "slab"])
def test_swaps_name_units_and_schemes(how: str, tmp_path: Path) -> None:
    run, _, problem = prepared(tmp_path, "--granularity", how)
    budget = Budget(6.0)
    allocation = problem.allocate(budget, "optimal")
    solved = Solved(problem, allocation, problem.plan(allocation, "optimal", budget))
    names = [unit.name for unit in run.units]
    for dearer in (True, False):
        rows = swaps(solved, dearer)
        units = [row["unit"].partition("[")[0] for row in rows]
        assert rows and len(set(units)) == len(units) and set(units) <= set(names)
        pair = ("MXFP4", "MXFP8") if dearer else ("MXFP8", "MXFP4")
        assert {(row["before"], row["after"]) for row in rows} == {pair}
        assert all((row["bits"] > 0) == dearer for row in rows)
        if how == "layer":
            taken = {u["unit"]: u["scheme"] for u in solved.plan.data["units"]}
            assert all(taken[row["unit"]] == row["before"] for row in rows)


def test_the_experts_of_a_block_share_an_entry(tmp_path: Path) -> None:
    linears = find_linears(open_source(str(make_model(tmp_path, "qwen3_moe"))).load())
    recipes = [parse_recipe(name) for name in ("MXFP4", "MXFP8", "MXFP4")]
    plan = {info.name: recipes[i % 3] for i, info in enumerate(linears)}
    bits = linear_bits(linears, plan)
    assert len(bits) == 2 * (4 + 3)
    members = [i for i in linears if i.name.startswith("model.layers.1.mlp.experts.")]
    up = [i for i in members if i.name.endswith("up_proj")]
    assert bits["model.layers.1.mlp.experts.up_proj"] == average_bits(up, plan)
    assert bits["model.layers.0.self_attn.q_proj"] == pytest.approx(4.25)


@pytest.mark.parametrize("count", [1, 2, 40, 41, 43, 133])
def test_a_long_curve_is_thinned_to_its_ends(count: int) -> None:
    keys = ("avg_bits", "predicted_loss", "gap", "proven", "budget_bits")
    rows = [dict.fromkeys(keys, i) for i in range(count)]
    kept = [row["gap"] for row in findings._thinned(rows)]
    assert kept == sorted(set(kept)) and len(kept) <= findings.MOST_POINTS + 1
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert len(kept) == count or count > findings.MOST_POINTS
