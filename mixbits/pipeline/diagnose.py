"""What the report says of a plan beside its figures: where the bits went, and whether to trust it.

`report` is cheap: what report.json holds before anything is packed. `diagnose` measures: every unit
alone in its cheapest scheme, against what was predicted for it, and the plans of two halves of the
calibration text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.io import without_folders, write_text
from ..formats.arrange import Arrangement
from ..formats.schemes import BF16, Assignment
from ..measuring.evaluate import logits_kl
from ..measuring.scores import VERSION, Scores
from ..measuring.text import Sequences
from ..model.layout import LinearInfo
from ..model.streaming import StreamedModel
from ..planning import curve
from ..planning.allocate import Allocation
from ..planning.plan import Budget, Plan, Problem, average_bits
from ..planning.stability import next_swaps, spearman, stability
from ..progress import steps
from ..report import frontier, style
from ..report.clock import environment
from ..report.report import Baseline, Report, Rounding
from ..report.verdict import Circumstances
from ..rounding.whole_model import RoundedModel, round_model
from .gate import Decision
from .plans import Planned, Solved, make_problem
from .roundings import Subject
from .run import Run
from .scoring import score
from .texts import Text

POINTS = 17  # of the report's own curve
MOST_POINTS = 40  # in report.json, of a finer curve or of one with many breakpoints
MOST_UNITS = 200  # that are measured one by one


def linear_bits(linears: Sequence[LinearInfo], assignment: Assignment) -> dict[str, float]:
    """Average bits of every linear; the experts of a block and projection share an entry."""
    groups: dict[str, list[LinearInfo]] = {}
    for info in linears:
        groups.setdefault(info.stack, []).append(info)
    return {name: average_bits(members, assignment) for name, members in groups.items()}


def swaps(solved: Solved, dearer: bool) -> list[dict[str, Any]]:
    """The units that would change next, the best first: with more bits (`dearer`), or with fewer.

    Where slabs are allocated, a unit is there once, with the best of its slabs.
    """
    items, entries = solved.problem.items, solved.problem.unit_of_items
    names = [entry.unit.name for entry in entries]
    names += [item.name for item in items[len(entries) :]]
    found = next_swaps(items, solved.allocation.choice, dearer, units=names)
    return [
        {
            "unit": items[s.item].name,
            "before": entries[s.item].options[s.before].name,
            "after": entries[s.item].options[s.after].name,
            "bits": s.bits,
            "loss": s.loss,
        }
        for s in found
    ]


def frontier_rows(run: Run, problem: Problem, points: int = POINTS) -> list[dict[str, Any]]:
    """What every budget buys; both ways of counting, and bytes, only where --curve asks for it."""

    def describe(allocation: Allocation) -> dict[str, Any]:
        assignment = problem.plan(allocation, "optimal", Budget()).assignment
        if run.settings.curve:
            return run.reached(assignment)
        return {"avg_bits": average_bits(run.linears, assignment)}

    return curve.rows(curve.frontier(problem.items, points), describe)


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_POINTS + 1 rows, the ends among them, with what a drawing takes."""
    step = -(-len(rows) // MOST_POINTS)
    kept = rows[::step] if (len(rows) - 1) % step == 0 else [*rows[::step], rows[-1]]
    keys = "avg_bits", "predicted_loss", "gap", "proven"
    return [{key: row[key] for key in keys} for row in kept]


def _mark(run: Run, name: str, plan: Plan) -> dict[str, Any]:
    bits = average_bits(run.linears, plan.assignment)
    return {"name": name, "avg_bits": bits, "predicted_loss": plan.data["predicted_loss"]}


def _describe(run: Run, plan: Plan, planned: Planned) -> dict[str, Any]:
    """Keys of report.json on the plan that ships and those that it was compared with."""
    found: dict[str, Any] = {"linear_bits": linear_bits(run.linears, plan.assignment)}
    for name, entry in planned.solved.items():
        if entry.plan is plan:
            found["upgrades"], found["downgrades"] = swaps(entry, True), swaps(entry, False)
        else:
            found.setdefault("baselines", []).append(_mark(run, name, entry.plan))
    if planned.curve:
        found["curve"] = _thinned(planned.curve)
    return found


def report(run: Run, sha256: str, planned: Planned, decision: Decision, text: Text) -> Report:
    """report.json as far as it is known before anything is packed."""
    plan, scores = decision.winner.plan, planned.scores
    rounding = dict(decision.outcome.told)
    if text.notes:
        rounding["notes"] = text.notes
    if decision.winner.rounding.uses_text:
        rounding |= text.calibration.describe()
    data = {
        "mixbits_report": VERSION,
        "command": without_folders(run.settings.command),
        "environment": environment(),
        "source": run.describe_source(sha256),
        "calibration": None if scores is None else scores.data["calibration"],
        # An edited plan still says what it was once made for.
        "budget": None if scores is None else plan.data["budget"],
        "menu": run.menu,
        "reached": run.reached(plan.assignment),
        "left_alone": run.coverage.groups(),
        "carried": len(run.source.weights.carried_parts),
        "kept": len(run.own.rounded_names(plan.assignment)),
        "rounding": rounding,
        "gate": {**text.gate.describe(), "candidates": decision.rows} if decision.rows else None,
        "predicted_loss": None if scores is None else plan.data["predicted_loss"],
        "bytes_before": sum(path.stat().st_size for path in run.source.weight_files()),
        **planned.found,
        **_describe(run, plan, planned),
    }
    return Report.of(data, "what this run found")


def circumstances(run: Run, decision: Decision, rounding: Rounding | None) -> Circumstances:
    """What advice on a bad verdict goes by; `rounding` is that of report.json."""
    plan = decision.winner.plan.assignment
    parts = [p for i in run.linears if i.name in plan for p in plan[i.name].parts(i.in_features)]
    used = {scheme.name: scheme for scheme, _ in parts}
    offered = [*used.values(), *([] if run.settings.plan else run.schemes)]
    seen = None
    if rounding and rounding.nsamples is not None:
        seen = rounding.nsamples * (rounding.seqlen or 0)
    return Circumstances(
        schemes=list(used.values()),
        avg_bits=average_bits(run.linears, plan),
        widest=max(s.storage_bits(128, 4096) / (128 * 4096) for s in offered or [BF16]),
        gated=bool(decision.rows),
        gate_possible=not run.settings.plan and run.settings.strategy == "optimal",
        tokens=seen,
    )


def write_curve(
    run: Run, folder: Path, plan: Plan, report: Report, rows: list[dict[str, Any]]
) -> None:
    """curve.csv and curve.svg, the latter with the plan and those it was compared with."""
    write_text(folder / "curve.csv", curve.to_csv(rows))
    plans = [Baseline.of(_mark(run, "this plan", plan)), *(report.baselines or [])]
    title = f"{Path(run.source.name).name}, {run.settings.comma('schemes')}"
    look = {"loss_name": f"predicted loss ({plan.data['method']})", "width": 720, "height": 400}
    plot = frontier.of_rows(rows, plans, **look)
    write_text(folder / "curve.svg", style.svg_file(plot, title))


def fidelity(
    run: Run, model: StreamedModel, problem: Problem, ids: Tensor, first: int = 0
) -> list[dict[str, Any]]:
    """`measured` of report.json: units alone in their cheapest scheme, rounded to nearest.

    Predicted loss, and mean KL per token on ids [sequences, length], from position `first` on; all
    units that are packed, or MOST_UNITS of them, evenly spaced.
    """
    items = problem.items
    cheapest = Allocation((0,) * len(items), 0, 0.0, 0.0)  # options come by rising cost
    recipes = problem.plan(cheapest, "cheapest", Budget()).assignment
    entries = [entry for entry in problem.units if entry.options[0].packed]
    count = min(MOST_UNITS, len(entries))
    entries = [entries[i * len(entries) // count] for i in range(count)]
    linears = [info for entry in entries for info in entry.unit.linears]
    rounded = round_model(model, linears, {i.name: recipes[i.name] for i in linears}, "rtn")
    sums = [0.0] * count
    batches = ids.split(run.settings.batch_size)
    advance = steps(count * len(ids), len(model.blocks))
    for batch in batches:
        reference = model.logits(batch)
        for number, entry in enumerate(entries):
            alone = {info.name: rounded[info.name] for info in entry.unit.linears}
            quantized = RoundedModel(model, entry.unit.linears, recipes, alone)
            kls = logits_kl(reference, quantized.logits(batch), batch, first)
            sums[number] += float(kls.sum())
            advance(len(batch))
    return [
        {
            "unit": entry.unit.name,
            "scheme": entry.options[0].name,
            "predicted": sum(item.losses[0] for item in entry.items),
            "measured": total / len(ids),
        }
        for entry, total in zip(entries, sums, strict=True)
    ]


def _split_in_two(sequences: Sequences) -> list[Sequences]:
    middle = len(sequences.ids) // 2
    return [sequences[:middle], sequences[middle:]]


def arrangements_of(run: Run, scores: Scores, device: torch.device) -> dict[str, Arrangement]:
    """How the columns were arranged that the scores are of."""
    arranged = {}
    for info in run.linears:
        order, rotated = scores.order(info.name), scores.rotated(info.name)
        if order is not None or rotated:
            columns = None if order is None else torch.tensor(order, device=device)
            arranged[info.name] = Arrangement(columns, rotated)
    return arranged


def diagnose(run: Run, subject: Subject, planned: Planned, text: Text) -> dict[str, Any]:
    """Keys of report.json: `measured` and its `rank_correlation`, and `stability`."""
    solved = planned.first
    scores = solved.problem.scores
    streamed = subject.streamed
    pairs = fidelity(run, streamed, solved.problem, text.gate.ids, text.gate.judged_from)
    arranged = arrangements_of(run, scores, streamed.device)
    method, sha256 = scores.data["method"], scores.data["model"]["sha256"]
    slabs = run.settings.slabs
    halves = [
        make_problem(run, score(run, streamed, half, method, arranged, sha256), slabs).items
        for half in _split_in_two(text.calibration)
    ]
    return {
        "measured": pairs,
        "rank_correlation": spearman(
            [pair["predicted"] for pair in pairs], [pair["measured"] for pair in pairs]
        ),
        "stability": stability(solved.problem.items, halves, solved.allocation.cost),
    }
