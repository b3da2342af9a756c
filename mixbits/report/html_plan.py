"""Sections of report.html on the plan: what other budgets buy, and whether it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ..planning.stability import spearman
from . import html_pieces as pieces
from .charts import Html, Mark, Plot, interval, plan_kind, symbol, text
from .html_pieces import Data
from .tables import size


def budgets(report: Data, plan: Data) -> str:
    reached = report.get("reached") or {}
    chosen = {
        "name": "this plan",
        "avg_bits": reached.get("avg_bits"),
        "predicted_loss": report.get("predicted_loss", plan.get("predicted_loss")),
    }
    named = [
        (plan_kind(m["name"]), m)
        for m in [chosen, *(report.get("baselines") or [])]
        if pieces.is_number(m["avg_bits"]) and pieces.is_number(m["predicted_loss"])
    ]
    line = [
        (row["avg_bits"], row["predicted_loss"])
        for row in report.get("curve") or []
        if pieces.is_number(row.get("avg_bits")) and row["predicted_loss"] > 0
    ]
    marks = [
        Mark(
            m["avg_bits"],
            m["predicted_loss"],
            kind,
            f"{m['name']}: {m['avg_bits']:.4f} bits, predicted loss {m['predicted_loss']:.4g}",
        )
        for kind, m in named
        if m["predicted_loss"] > 0
    ]
    if not line:
        return ""
    base = chosen["predicted_loss"] if pieces.is_number(chosen["predicted_loss"]) else 0.0
    rows = [
        (
            Html(f"{symbol(kind)} {text(m['name'])}"),
            f"{m['avg_bits']:.4f}",
            f"{m['predicted_loss']:#.4g}",
            f"{m['predicted_loss'] / base:.2f} x" if base > 0 else "-",
        )
        for kind, m in named
    ]
    plot = Plot("the curve", "bits per weight, everything counted", "predicted loss", marks, line)
    said = f"The best plan of every budget, from one measurement. {_proof(report['curve'])}"
    legend = (
        pieces.table(["plan", "bits", "predicted loss", "of this plan's"], rows) if rows else ""
    )
    others = _other_budgets(report, line, chosen)
    return pieces.section(
        "What every budget buys", pieces.note(said), pieces.figure(plot.draw()), legend, others
    )


def _other_budgets(report: Data, line: Sequence[tuple[float, float]], chosen: Data) -> str:
    """What a budget of so many bits would give: along the curve, and as far off as here."""
    bits, loss = chosen["avg_bits"], chosen["predicted_loss"]
    if not (pieces.is_number(bits) and pieces.is_number(loss) and loss > 0 and len(line) > 1):
        return ""
    points = sorted(line)
    first, last = points[0][0], points[-1][0]
    steps = sorted({*(n / 2 for n in range(math.ceil(2 * first), math.floor(2 * last) + 1)), last})
    kl = pieces.held_out(report).get("kl") or math.nan
    rows = []
    for at in steps:
        found = math.exp(_interpolated(at, [(x, math.log(y)) for x, y in points]))
        expected = f"{kl * found / loss:.3g}" if pieces.is_number(kl) else "-"
        rows.append((f"{at:.4g}", f"{found:#.3g}", expected, f"{found / loss:.2f} x"))
    note = pieces.note(
        "What other budgets would give: the predicted loss, and the KL to expect if it is as far "
        f"from the prediction as here ({pieces.number(kl, '.3g')} measured, {loss:.3g} predicted)."
        if pieces.is_number(kl)
        else "What other budgets would give, as predicted."
    )
    heads = ["bits per weight", "predicted loss", "KL to expect", "of this plan's"]
    return f"<h3>With more or fewer bits</h3>{note}{pieces.table(heads, rows)}"


def _interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    """y at x on the lines between points of rising x; beyond the ends, theirs."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * max(0.0, x - x0) / (x1 - x0 or 1.0)
    return points[-1][1]


def predicted_and_measured(report: Data, plan: Data) -> str:
    """The plan's predicted loss beside the KL that it has, where both are nats per token."""
    loss = report.get("predicted_loss", plan.get("predicted_loss"))
    held, gate = pieces.held_out(report), report.get("gate") or {}
    if not pieces.is_number(loss) or plan.get("method", "fisher") != "fisher":
        return ""
    measured = []
    if gate.get("candidates"):
        kl = pieces.number(gate["candidates"][0]["kl"], ".4f")
        measured.append(("measured on the gate's text", kl))
    if pieces.is_number(held.get("kl")):
        kl = pieces.plus_minus(held["kl"], held.get("kl_stderr"))
        measured.append(("measured on held-out text", kl))
    if not measured:
        return ""
    rows = [("predicted from the calibration text", f"{loss:.4f}"), *measured]
    note = pieces.note(
        "KL divergence in nats per token. The prediction is of weights rounded to nearest, one "
        "linear at a time; error compensation makes it less, and errors that add up more."
    )
    return pieces.section("Predicted and measured", note, pieces.table(["", "KL"], rows))


def _proof(curve: Sequence[Data]) -> str:
    open_gaps = [row["gap"] for row in curve if not row.get("proven")]
    if not open_gaps:
        return f"All {len(curve)} plans are proven optimal."
    worst = max(filter(pieces.is_number, open_gaps), default=0.0)
    return (
        f"{len(curve) - len(open_gaps)} of {len(curve)} plans are proven optimal, the others lie "
        f"within {worst:.2g} of the lower bound, as a share of their loss."
    )


def fidelity(report: Data) -> str:
    pairs = [
        p
        for p in report.get("measured") or []
        if pieces.is_number(p["predicted"]) and pieces.is_number(p["measured"])
    ]
    if not pairs:
        return ""
    schemes = list(dict.fromkeys(p["scheme"] for p in pairs))
    marks = [
        Mark(
            p["predicted"],
            p["measured"],
            schemes.index(p["scheme"]) + 1,
            f"{p['unit']} in {p['scheme']}: predicted {p['predicted']:.3g}, "
            f"measured {p['measured']:.3g}",
        )
        for p in pairs
        if p["predicted"] > 0 and p["measured"] > 0
    ]
    groups = [
        (s, [p for p in pairs if p["scheme"] == s], symbol(i + 1)) for i, s in enumerate(schemes)
    ]
    groups += [("all", pairs, Html(""))] if len(schemes) > 1 else []
    rows = [
        (
            Html(f"{shape} {text(name)}"),
            len(group),
            pieces.number(
                spearman(*([p[k] for p in group] for k in ("predicted", "measured"))), ".3f"
            ),
        )
        for name, group, shape in groups
    ]
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
    hidden = len(pairs) - len(marks)
    said = "Each point is one unit stored in one scheme, all others left alone; dashed: equal."
    said += f" {hidden} of {len(pairs)} are not above 0, and not drawn." if hidden else ""
    chart = pieces.figure(plot.draw()) if marks else ""
    table = pieces.table(["scheme", "units", "rank correlation"], rows)
    return pieces.section(
        "Can the prediction be trusted?",
        pieces.note(said),
        f'<div class="pair">{chart}{table}</div>',
    )


def swaps(report: Data) -> str:
    parts = []
    for key, title, gain in (
        ("upgrades", "What more bits would buy", "saved per MB"),
        ("downgrades", "What fewer bits would cost", "lost per MB"),
    ):
        rows = [
            (
                s["unit"],
                f"{s['before']} → {s['after']}",
                pieces.together(size(abs(s["bits"]) / 8)),
                f"{abs(s['loss']):#.3g}",
                f"{-s['loss'] / s['bits'] * 8e6:#.3g}",
            )
            for s in report.get(key) or []
        ]
        if rows:
            change = "larger by" if key == "upgrades" else "smaller by"
            table = pieces.table(["unit", "change", change, "loss", gain], rows, "names2")
            parts.append(f"<div><h3>{text(title)}</h3>{table}</div>")
    note = pieces.note("The next changes, the best first; loss as predicted, in nats per token.")
    return pieces.section("Next upgrades and downgrades", note, *parts) if parts else ""


def candidates(report: Data) -> str:
    rows = (report.get("gate") or {}).get("candidates") or []
    if not rows:
        return ""
    behind = [
        (row["behind"] - row["interval"], row["behind"], row["behind"] + row["interval"])
        if all(pieces.is_number(row.get(k)) for k in ("behind", "interval"))
        else None
        for row in rows
    ]
    ends = [0.0, *(x for known in behind if known for x in known)]
    table = []
    for number, (row, known) in enumerate(zip(rows, behind, strict=True)):
        mark = Html("" if number else ' <em class="chosen">chosen</em>')
        table.append(
            (
                Html(f"{text(row['name'])}{mark}"),
                pieces.number(row.get("kl"), ".5f"),
                f"{known[1]:+.5f}" if known else "-",
                f"{known[0]:+.5f} to {known[2]:+.5f}" if known else "-",
                interval(*known, min(ends), max(ends)) if known else "",
            )
        )
    heads = ["candidate", "KL", "difference", "confidence interval", ""]
    note = pieces.note("Measured on held-out text, sequence by sequence, against the one chosen.")
    return pieces.section("Candidates", note, pieces.table(heads, table))


def search(report: Data) -> str:
    search = report.get("search") or {}
    if not search.get("measured"):
        return ""
    limit = search["max_kl"]
    rows = [
        (f"{m['avg_bits']:.4f}", pieces.number(m["kl"], ".5f"), "yes" if m["kl"] <= limit else "no")
        for m in sorted(search["measured"], key=lambda m: m["avg_bits"])
    ]
    said = (
        f"The smallest plan whose KL is at most {limit:g} on the gate's text, each one "
        f"rounded and measured; the search ends at {search['tolerance']:g} bits per weight."
    )
    heads = ["bits per weight", "KL", "good enough"]
    return pieces.section("How small it can be", pieces.note(said), pieces.table(heads, rows))


def stability(report: Data) -> str:
    found = report.get("stability")
    if not found:
        return ""
    excess = " and ".join(f"{x:+.2%}" for x in found["excess_loss"])
    said = (
        f"Planned from either half of the calibration text alone, {found['same_units']:.1%} of the "
        f"units and {found['same_bits']:.1%} of the bits come out the same. By all of the text, "
        f"these plans lose {excess} against the best."
    )
    return pieces.section("Stability", pieces.note(said))
