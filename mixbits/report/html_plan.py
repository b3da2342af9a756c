"""Sections of report.html on the plan: what other budgets buy, and whether it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from ..planning.stability import spearman
from .blocks import Block, Figure, Group, Note, Section, Table, together
from .charts import Mark, Plot, interval, plan_kind, symbol
from .frontier import frontier
from .report import Baseline, Candidate, Pair, Point, Report, Swap
from .tables import excess_loss, is_number, number, plus_minus, size

Data = Mapping[str, Any]


def predicted_loss(report: Report, plan: Data) -> Any:
    """That of the plan that ships; plan.json has it where the report does not."""
    known = "predicted_loss" in report.model_fields_set
    return report.predicted_loss if known else plan.get("predicted_loss")


# --- what every budget buys ---------------------------------------------------------------------


def budgets(report: Report, plan: Data) -> Section | None:
    chosen = Baseline(
        name="this plan",
        avg_bits=report.reached.avg_bits,
        predicted_loss=predicted_loss(report, plan),
    )
    plans = [
        p
        for p in [chosen, *(report.baselines or [])]
        if is_number(p.avg_bits) and is_number(p.predicted_loss)
    ]
    curve = report.curve or []
    plot = frontier([(point.avg_bits, point.predicted_loss) for point in curve], plans)
    if not plot.line:
        return None
    said = f"The best plan of every budget, from one measurement. {_proof(curve)}"
    blocks: list[Block] = [Note(said), Figure(plot.draw())]
    if plans:
        blocks.append(_compared(plans, chosen))
    return Section("What every budget buys", blocks + _other_budgets(report, plot.line, chosen))


def _compared(plans: Sequence[Baseline], chosen: Baseline) -> Table:
    base = chosen.predicted_loss or 0.0
    rows = [
        (
            symbol(plan_kind(plan.name)) + " " + plan.name,
            number(plan.avg_bits, ".4f"),
            number(loss := plan.predicted_loss or 0.0, "#.4g"),
            f"{loss / base:.2f} x" if is_number(base) and base > 0 else "-",
        )
        for plan in plans
    ]
    return Table(["plan", "bits", "predicted loss", "of this plan's"], rows)


def _proof(curve: Sequence[Point]) -> str:
    open_gaps = [point.gap for point in curve if not point.proven]
    if not open_gaps:
        return f"All {len(curve)} plans are proven optimal."
    worst = max(filter(is_number, open_gaps), default=0.0)
    return (
        f"{len(curve) - len(open_gaps)} of {len(curve)} plans are proven optimal, the others lie "
        f"within {worst:.2g} of the lower bound, as a share of their loss."
    )


def _other_budgets(
    report: Report, line: Sequence[tuple[float, float]], chosen: Baseline
) -> list[Block]:
    """What a budget of so many bits would give: along the curve, and as far off as here."""
    bits, loss = chosen.avg_bits, chosen.predicted_loss
    if not (is_number(bits) and is_number(loss) and loss > 0 and len(line) > 1):
        return []
    points = sorted(line)
    first, last = points[0][0], points[-1][0]
    steps = sorted({*(n / 2 for n in range(math.ceil(2 * first), math.floor(2 * last) + 1)), last})
    kl = (report.held_out.kl if report.held_out else None) or math.nan
    rows = []
    for at in steps:
        found = math.exp(_interpolated(at, [(x, math.log(y)) for x, y in points]))
        expected = f"{kl * found / loss:.3g}" if is_number(kl) else "-"
        rows.append((f"{at:.4g}", f"{found:#.3g}", expected, f"{found / loss:.2f} x"))
    note = Note(
        "What other budgets would give: the predicted loss, and the KL to expect if it is as far "
        f"from the prediction as here ({number(kl, '.3g')} measured, {loss:.3g} predicted)."
        if is_number(kl)
        else "What other budgets would give, as predicted."
    )
    heads = ["bits per weight", "predicted loss", "KL to expect", "of this plan's"]
    return [Group("With more or fewer bits", [note, Table(heads, rows)])]


def _interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    """y at x on the lines between points of rising x; beyond the ends, theirs."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * max(0.0, x - x0) / (x1 - x0 or 1.0)
    return points[-1][1]


# --- predictions --------------------------------------------------------------------------------


def predicted_and_measured(report: Report, plan: Data) -> Section | None:
    """The plan's predicted loss beside the KL that it has, where both are nats per token."""
    loss = predicted_loss(report, plan)
    if not is_number(loss) or plan.get("method", "fisher") != "fisher":
        return None
    measured = []
    if report.candidates:
        measured.append(("measured on the gate's text", number(report.candidates[0].kl, ".4f")))
    if (held := report.held_out) and is_number(held.kl):
        measured.append(("measured on held-out text", plus_minus(held.kl, held.kl_stderr)))
    if not measured:
        return None
    rows = [("predicted from the calibration text", f"{loss:.4f}"), *measured]
    note = Note(
        "KL divergence in nats per token. The prediction is of weights rounded to nearest, one "
        "linear at a time; error compensation makes it less, and errors that add up more."
    )
    return Section("Predicted and measured", [note, Table(["", "KL"], rows)])


def fidelity(report: Report) -> Section | None:
    pairs = [p for p in report.measured or [] if is_number(p.predicted) and is_number(p.measured)]
    if not pairs:
        return None
    schemes = list(dict.fromkeys(p.scheme for p in pairs))
    marks = _points(pairs, schemes)
    hidden = len(pairs) - len(marks)
    said = "Each point is one unit stored in one scheme, all others left alone; dashed: equal."
    said += f" {hidden} of {len(pairs)} are not above 0, and not drawn." if hidden else ""
    plot = Plot(
        "predicted against measured",
        "predicted loss",
        "measured KL, nats per token",
        marks,
        diagonal=True,
        log_x=True,
        width=460,
        height=400,
    )
    chart = [Figure(plot.draw())] if marks else []
    beside = Group("", [*chart, _correlations(pairs, schemes)], beside=True)
    return Section("Can the prediction be trusted?", [Note(said), beside])


def _points(pairs: Sequence[Pair], schemes: Sequence[str]) -> list[Mark]:
    """Those that logarithmic axes have."""
    return [
        Mark(
            p.predicted,
            p.measured,
            schemes.index(p.scheme) + 1,
            f"{p.unit} in {p.scheme}: predicted {p.predicted:.3g}, measured {p.measured:.3g}",
        )
        for p in pairs
        if p.predicted and p.measured and p.predicted > 0 and p.measured > 0
    ]


def _correlations(pairs: Sequence[Pair], schemes: Sequence[str]) -> Table:
    groups = [
        (symbol(i + 1) + " " + s, [p for p in pairs if p.scheme == s])
        for i, s in enumerate(schemes)
    ]
    groups += [(Markup("all"), list(pairs))] if len(schemes) > 1 else []
    rows = []
    for name, group in groups:
        ranks = spearman([p.predicted or 0.0 for p in group], [p.measured or 0.0 for p in group])
        rows.append((name, len(group), number(ranks, ".3f")))
    return Table(["scheme", "units", "rank correlation"], rows)


def stability(report: Report) -> Section | None:
    found = report.stability
    if not found:
        return None
    said = (
        "Planned from either half of the calibration text alone, "
        f"{number(found.same_units, '.1%')} of the units and {number(found.same_bits, '.1%')} of "
        "the bits come out the same. By all of the text, these plans lose "
        f"{excess_loss(found)} against the best."
    )
    return Section("Stability", [Note(said)])


# --- other plans --------------------------------------------------------------------------------


def swaps(report: Report) -> Section | None:
    more = _swapped("What more bits would buy", report.upgrades, "larger by", "saved per MB")
    fewer = _swapped("What fewer bits would cost", report.downgrades, "smaller by", "lost per MB")
    note = Note("The next changes, the best first; loss as predicted, in nats per token.")
    found = [*more, *fewer]
    return Section("Next upgrades and downgrades", [note, *found]) if found else None


def _swapped(title: str, found: Sequence[Swap] | None, change: str, gain: str) -> list[Block]:
    rows = [
        (
            s.unit,
            f"{s.before} → {s.after}",
            together(size(abs(s.bits) / 8)),
            f"{abs(s.loss):#.3g}",
            f"{-s.loss / s.bits * 8e6:#.3g}",
        )
        for s in found or []
    ]
    table = Table(["unit", "change", change, "loss", gain], rows, "names2")
    return [Group(title, [table])] if rows else []


def candidates(report: Report) -> Section | None:
    rows = report.candidates
    if not rows:
        return None
    behind = [_interval(row) for row in rows]
    ends = [0.0, *(x for known in behind if known for x in known)]
    table = []
    for index, (row, known) in enumerate(zip(rows, behind, strict=True)):
        table.append(
            (
                row.name if index else Markup('{} <em class="chosen">chosen</em>').format(row.name),
                number(row.kl, ".5f"),
                f"{known[1]:+.5f}" if known else "-",
                f"{known[0]:+.5f} to {known[2]:+.5f}" if known else "-",
                interval(*known, min(ends), max(ends)) if known else "",
            )
        )
    heads = ["candidate", "KL", "difference", "confidence interval", ""]
    note = Note("Measured on held-out text, sequence by sequence, against the one chosen.")
    return Section("Candidates", [note, Table(heads, table)])


def _interval(row: Candidate) -> tuple[float, float, float] | None:
    """By how much it is worse than the best: least, mean and most."""
    if not (is_number(row.behind) and is_number(row.interval)):
        return None
    return row.behind - row.interval, row.behind, row.behind + row.interval


def search(report: Report) -> Section | None:
    search = report.search
    if not search or not search.measured:
        return None
    tried = sorted(search.measured, key=lambda m: m.avg_bits or 0.0)
    limit = search.max_kl or 0.0
    rows = [
        (
            number(m.avg_bits, ".4f"),
            number(m.kl, ".5f"),
            "yes" if is_number(m.kl) and m.kl <= limit else "no",
        )
        for m in tried
    ]
    said = (
        f"The smallest plan whose KL is at most {limit:g} on the gate's text, each one rounded and "
        f"measured; the search ends at {number(search.tolerance, 'g')} bits per weight."
    )
    heads = ["bits per weight", "KL", "good enough"]
    return Section("How small it can be", [Note(said), Table(heads, rows)])
