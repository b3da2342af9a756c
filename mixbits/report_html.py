"""report.html: what a run did and why, as one page that needs nothing else.

A pure function of what the other files hold: report.json, plan.json and scores.json. These keys
of the report, each optional, have a section each:

    linear_bits  {linear: average bits}
    curve        rows of `curve.rows`, with avg_bits
    baselines    [{"name", "avg_bits", "predicted_loss"}]
    search       {"max_kl", "tolerance", "measured": [{"avg_bits", "kl"}]}: for the smallest model
    measured     [{"unit", "scheme", "predicted", "measured"}]: KL of one unit in one scheme
    upgrades, downgrades   [{"unit", "before", "after", "bits", "loss"}]: `diagnostics.next_swaps`
    gate         {"candidates": rows of `gate.Choice`}, the one that ships first
    stability    `diagnostics.stability`
    evaluation, stages     as `quantize` writes them

No script, no picture, no font is loaded: the style is inline, the charts are SVG.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from . import verdict
from .charts import HeatMap, Html, Mark, Plot, interval, plan_kind, symbol, text
from .diagnostics import spearman
from .formats import UsageError, parse_scheme
from .report import average_name, size
from .report_style import STYLE

Data = Mapping[str, Any]


# --- pieces ----------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(value: Any, digits: str = ".4g") -> str:
    return f"{value:{digits}}" if _is_number(value) else "-"


def _plus_minus(value: Any, stderr: Any, digits: str = ".4f") -> str:
    shown = _number(value, digits)
    return f"{shown} ± {stderr:{digits}}" if _is_number(stderr) else shown


def _table(head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """A table that scrolls sideways where it must, with a shadow where there is more."""
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{text(c)}</td>" for c in row) + "</tr>" for row in rows)
    return Html(
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _section(title: str, *parts: str) -> Html:
    return Html(f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>")


def _note(sentence: object) -> Html:
    return Html(f"<p>{text(sentence)}</p>")


def _figure(chart: str, wide: bool = False) -> Html:
    """A chart; one that is `wide` says on a narrow screen that it scrolls."""
    hint = '<span class="sideways">wider than this screen: scroll sideways →</span>' * wide
    return Html(f'{hint}<div class="scroll">{chart}</div>')


_UNIT = re.compile(r"(?<=\d) (?=[kMG]?B\b|%|bits?\b)")


def _together(words: object) -> str:
    """Numbers stay on a line with their units."""
    return _UNIT.sub("\u00a0", str(words))


# --- summary ---------------------------------------------------------------------------------


def _card(name: str, value: str, more: str = "") -> str:
    detail = f"<small>{text(_together(more))}</small>" if more else ""
    shown = text(_together(value))
    return f'<div class="card"><span>{text(name)}</span><b>{shown}</b>{detail}</div>'


def _cards(report: Data) -> Html:
    reached, held = report.get("reached") or {}, _held_out(report)
    after = report.get("bytes_after") or reached.get("predicted_bytes")
    before = report.get("bytes_before") or after
    cards = []
    if after and before:
        more = f"{after / before:.0%} of {size(before)}"
        cards.append(_card("weight files", size(after), more))
    if _is_number(reached.get("avg_bits")):
        without = _number(reached.get("avg_bits_without_scales"), ".4f")
        more = f"{without} without scales"
        cards.append(_card("bits per weight", f"{reached['avg_bits']:.4f}", more))
    if _is_number(held.get("kl")):
        more = "nats per token" + _error(held, "kl", ".4f")
        cards.append(_card("KL divergence", f"{held['kl']:.4f}", more))
    if _is_number(held.get("perplexity")):
        more = f"from {_number(held.get('perplexity_reference'), '.3f')}"
        more += _error(held, "perplexity", ".3f")
        cards.append(_card("perplexity", f"{held['perplexity']:.3f}", more))
    if _is_number(held.get("top1_agreement")):
        more = "of likeliest tokens" + _error(held, "top1_agreement", ".2%")
        cards.append(_card("agreement", f"{held['top1_agreement']:.2%}", more))
    errors = any("±" in card for card in cards)
    note = _note(
        "± is a standard error, of how much figures vary between sequences: over much more text of "
        "this kind a figure would come out within twice that, in 19 of 20 cases."
    )
    return Html(f'<div class="cards">{"".join(cards)}</div>' + note * errors)


def _judgement(report: Data) -> str:
    """Whether it is good, in words; and what the plan was compared with."""
    said = verdict.lines(report.get("evaluation"))
    if not said:
        return ""
    candidates = (report.get("gate") or {}).get("candidates")
    compared = (
        f"Of {len(candidates)} candidates of this size, it was the best on other text."
        if candidates
        else "No other plan of this size was compared with it."
    )
    word, colon, figures = _together(said[0]).partition(":")
    rest = "".join(_note(_together(line)) for line in [*said[1:], compared])
    return f'<p class="verdict"><b>{text(word)}</b>{colon}{text(figures)}</p>{rest}'


def _sample(report: Data) -> str:
    evaluation = report.get("evaluation") or {}
    if not evaluation.get("sample"):
        return ""
    note = _note("What the quantized model makes of the prompt, drawn with the run's seed.")
    prompt, said = str(evaluation.get("prompt") or ""), str(evaluation["sample"])
    begins = len(prompt) if prompt and said.startswith(prompt) else 0
    shown = f"<pre><b>{text(said[:begins])}</b>{text(said[begins:])}</pre>"
    return _section("A sample", note, shown)


def _error(held: Data, name: str, digits: str) -> str:
    stderr = held.get(f"{name}_stderr")
    return f", ±\u00a0{stderr:{digits}}" if _is_number(stderr) else ""


def _held_out(report: Data) -> Data:
    return (report.get("evaluation") or {}).get("held_out") or {}


def _tasks(report: Data) -> str:
    evaluation = report.get("evaluation") or {}
    quantized, original = evaluation.get("tasks"), evaluation.get("original_tasks")
    if not quantized:
        return ""
    models = [m for m in (original, quantized) if m]
    rows = []
    for task, metrics in quantized["tasks"].items():
        for name in metrics:
            if not name.endswith("_stderr"):
                scores = [m["tasks"].get(task, {}) for m in models]
                cells = [_plus_minus(s.get(name), s.get(f"{name}_stderr")) for s in scores]
                rows.append([task, name, *cells])
    if len(quantized["tasks"]) > 1:
        cells = [_plus_minus(m.get("average"), m.get("average_stderr")) for m in models]
        rows.append([average_name(quantized), "acc", *cells])
    scored = evaluation.get("scored", "quantized")
    heads = ["task", "metric", *(["original"] if original else []), scored]
    return _section("Tasks", _table(heads, rows, "names2"))


def _how(report: Data, plan: Data) -> Html:
    """The command, and what it met."""
    facts: dict[str, Any] = {}
    source, held = report.get("source") or {}, _held_out(report)
    facts["model"] = f"{source.get('name', '-')} ({str(source.get('sha256', '-'))[:16]})"
    for name, value in (
        ("budget", report.get("budget")),
        ("calibration", report.get("calibration")),
        ("rounding", report.get("rounding")),
    ):
        if value:
            facts[name] = ", ".join(f"{k} {v}" for k, v in value.items() if v not in (None, []))
    if held.get("source"):
        facts["held-out text"] = held["source"]
    if scored := (report.get("evaluation") or {}).get("scored"):
        facts["scored"] = scored
    for key in ("strategy", "method", "weight_scale_mode", "act_scale_mode"):
        if plan.get(key):
            facts[key.replace("_", " ")] = plan[key]
    loss, bound = report.get("predicted_loss", plan.get("predicted_loss")), plan.get("lower_bound")
    if _is_number(loss) and _is_number(bound):
        least = f"no plan within the budget can have less than {bound:.4g}"
        proven = loss - bound <= 1e-9 * abs(loss)
        facts["predicted loss"] = f"{loss:.4g}; {'proven to be the least' if proven else least}"
    for key, value in (report.get("environment") or {}).items():
        if value is not None:
            facts[key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    terms = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in facts.items())
    command = f"<pre>{text(report['command'])}</pre>" if report.get("command") else ""
    return _section("How it was made", command, f"<dl>{terms}</dl>")


# --- heat maps -------------------------------------------------------------------------------

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)")


def _place(linear: str) -> tuple[int, str] | None:
    """`model.layers.3.mlp.experts.7.up_proj` -> (3, `experts.up_proj`); None outside blocks."""
    match = _BLOCK.search(linear)
    if match is None:
        return None
    parts = [part for part in match[2].split(".") if not part.isdigit()]
    return int(match[1]), ".".join(parts[1:] or parts)


def _cells(values: Mapping[str, float], weights: Mapping[str, int]) -> dict[Any, float]:
    """Weighted means over the linears of one (block, module); experts share a cell.

    Linears outside the blocks are keyed by their names.
    """
    sums: dict[Any, list[float]] = {}
    for name, value in values.items():
        weight = weights.get(name, 1)
        entry = sums.setdefault(_place(name) or name, [0.0, 0.0])
        entry[0] += value * weight
        entry[1] += weight
    return {place: total / weight for place, (total, weight) in sums.items()}


def _heat_map(
    name: str, values: Mapping[str, float], weights: Mapping[str, int], **look: Any
) -> str:
    found = _cells(values, weights)
    inside = {place: v for place, v in found.items() if isinstance(place, tuple)}
    outside = [f"{place} {v:{look['digits']}}" for place, v in found.items() if place not in inside]
    chart = HeatMap(name, inside, **look)
    drawn = _figure(chart.draw(), chart.wide) if inside else ""
    return drawn + (_note(f"Outside the blocks: {', '.join(outside)}.") if outside else "")


def _sensitivity(scores: Data) -> tuple[str, dict[str, float]]:
    """The scheme of fewest bits, and every linear's loss per weight in it."""
    linears = scores.get("linears") or {}
    names = list(next(iter(linears.values()))["scores"]) if linears else []
    if not names:
        return "", {}
    cheapest = min(names, key=lambda name: _storage_bits(name))
    return cheapest, {
        linear: row["scores"][cheapest] / math.prod(row["shape"])
        for linear, row in linears.items()
        if _is_number(row["scores"].get(cheapest))
    }


def _storage_bits(scheme: str) -> float:
    try:
        return parse_scheme(scheme).storage_bits(128, 4096)
    except UsageError:  # of a later version
        return math.inf


def _maps(report: Data, scores: Data) -> str:
    linears = scores.get("linears") or {}
    weights = {name: math.prod(row["shape"]) for name, row in linears.items()}
    parts = ""
    if report.get("linear_bits"):
        look: dict[str, Any] = {"unit": "bits", "ramp": "blue", "digits": ".2f"}
        parts += _section(
            "Where the bits went",
            _note("Bits per weight of every linear; blocks from left to right."),
            _heat_map("bits per weight", report["linear_bits"], weights, **look),
        )
    scheme, per_weight = _sensitivity(scores)
    if per_weight:
        unit = {"fisher": "nats per weight"}.get(str(scores.get("method")), "per weight")
        look = {"unit": unit, "ramp": "orange", "digits": ".1e", "logarithmic": True}
        parts += _section(
            "Where it hurts",
            _note(f"Predicted loss of {scheme}, the smallest scheme, for each weight."),
            _heat_map("sensitivity", per_weight, weights, **look),
        )
    return parts


# --- the curve, and what judges it -----------------------------------------------------------


def _curve(report: Data, plan: Data) -> str:
    reached = report.get("reached") or {}
    chosen = {
        "name": "this plan",
        "avg_bits": reached.get("avg_bits"),
        "predicted_loss": report.get("predicted_loss", plan.get("predicted_loss")),
    }
    named = [
        (plan_kind(m["name"]), m)
        for m in [chosen, *(report.get("baselines") or [])]
        if _is_number(m["avg_bits"]) and _is_number(m["predicted_loss"])
    ]
    line = [
        (row["avg_bits"], row["predicted_loss"])
        for row in report.get("curve") or []
        if _is_number(row.get("avg_bits")) and row["predicted_loss"] > 0
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
    base = chosen["predicted_loss"] if _is_number(chosen["predicted_loss"]) else 0.0
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
    legend = _table(["plan", "bits", "predicted loss", "of this plan's"], rows) if rows else ""
    others = _other_budgets(report, line, chosen)
    return _section("What every budget buys", _note(said), _figure(plot.draw()), legend, others)


def _other_budgets(report: Data, line: Sequence[tuple[float, float]], chosen: Data) -> str:
    """What a budget of so many bits would give: along the curve, and as far off as here."""
    bits, loss = chosen["avg_bits"], chosen["predicted_loss"]
    if not (_is_number(bits) and _is_number(loss) and loss > 0 and len(line) > 1):
        return ""
    points = sorted(line)
    first, last = points[0][0], points[-1][0]
    steps = sorted({*(n / 2 for n in range(math.ceil(2 * first), math.floor(2 * last) + 1)), last})
    kl = _held_out(report).get("kl") or math.nan
    rows = []
    for at in steps:
        found = math.exp(_interpolated(at, [(x, math.log(y)) for x, y in points]))
        expected = f"{kl * found / loss:.3g}" if _is_number(kl) else "-"
        rows.append((f"{at:.4g}", f"{found:#.3g}", expected, f"{found / loss:.2f} x"))
    note = _note(
        "What other budgets would give: the predicted loss, and the KL to expect if it is as far "
        f"from the prediction as here ({_number(kl, '.3g')} measured, {loss:.3g} predicted)."
        if _is_number(kl)
        else "What other budgets would give, as predicted."
    )
    heads = ["bits per weight", "predicted loss", "KL to expect", "of this plan's"]
    return f"<h3>With more or fewer bits</h3>{note}{_table(heads, rows)}"


def _interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    """y at x on the lines between points of rising x; beyond the ends, theirs."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * max(0.0, x - x0) / (x1 - x0 or 1.0)
    return points[-1][1]


def _predicted_and_measured(report: Data, plan: Data) -> str:
    """The plan's predicted loss beside the KL that it has, where both are nats per token."""
    loss = report.get("predicted_loss", plan.get("predicted_loss"))
    held, gate = _held_out(report), report.get("gate") or {}
    if not _is_number(loss) or plan.get("method", "fisher") != "fisher":
        return ""
    measured = []
    if gate.get("candidates"):
        kl = _number(gate["candidates"][0]["kl"], ".4f")
        measured.append(("measured on the gate's text", kl))
    if _is_number(held.get("kl")):
        kl = _plus_minus(held["kl"], held.get("kl_stderr"))
        measured.append(("measured on held-out text", kl))
    if not measured:
        return ""
    rows = [("predicted from the calibration text", f"{loss:.4f}"), *measured]
    note = _note(
        "KL divergence in nats per token. The prediction is of weights rounded to nearest, one "
        "linear at a time; error compensation makes it less, and errors that add up more."
    )
    return _section("Predicted and measured", note, _table(["", "KL"], rows))


def _proof(curve: Sequence[Data]) -> str:
    open_gaps = [row["gap"] for row in curve if not row.get("proven")]
    if not open_gaps:
        return f"All {len(curve)} plans are proven optimal."
    worst = max(filter(_is_number, open_gaps), default=0.0)
    return (
        f"{len(curve) - len(open_gaps)} of {len(curve)} plans are proven optimal, the others lie "
        f"within {worst:.2g} of the lower bound, as a share of their loss."
    )


def _fidelity(report: Data) -> str:
    pairs = [
        p
        for p in report.get("measured") or []
        if _is_number(p["predicted"]) and _is_number(p["measured"])
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
            _number(spearman(*([p[k] for p in group] for k in ("predicted", "measured"))), ".3f"),
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
    chart = _figure(plot.draw()) if marks else ""
    table = _table(["scheme", "units", "rank correlation"], rows)
    return _section(
        "Can the prediction be trusted?", _note(said), f'<div class="pair">{chart}{table}</div>'
    )


def _swaps(report: Data) -> str:
    parts = []
    for key, title, gain in (
        ("upgrades", "What more bits would buy", "saved per MB"),
        ("downgrades", "What fewer bits would cost", "lost per MB"),
    ):
        rows = [
            (
                s["unit"],
                f"{s['before']} → {s['after']}",
                _together(size(abs(s["bits"]) / 8)),
                f"{abs(s['loss']):#.3g}",
                f"{-s['loss'] / s['bits'] * 8e6:#.3g}",
            )
            for s in report.get(key) or []
        ]
        if rows:
            change = "larger by" if key == "upgrades" else "smaller by"
            table = _table(["unit", "change", change, "loss", gain], rows, "names2")
            parts.append(f"<div><h3>{text(title)}</h3>{table}</div>")
    note = _note("The next changes, the best first; loss as predicted, in nats per token.")
    return _section("Next upgrades and downgrades", note, *parts) if parts else ""


def _candidates(report: Data) -> str:
    rows = (report.get("gate") or {}).get("candidates") or []
    if not rows:
        return ""
    behind = [
        (row["behind"] - row["interval"], row["behind"], row["behind"] + row["interval"])
        if all(_is_number(row.get(k)) for k in ("behind", "interval"))
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
                _number(row.get("kl"), ".5f"),
                f"{known[1]:+.5f}" if known else "-",
                f"{known[0]:+.5f} to {known[2]:+.5f}" if known else "-",
                interval(*known, min(ends), max(ends)) if known else "",
            )
        )
    heads = ["candidate", "KL", "difference", "confidence interval", ""]
    note = _note("Measured on held-out text, sequence by sequence, against the one chosen.")
    return _section("Candidates", note, _table(heads, table))


def _search(report: Data) -> str:
    search = report.get("search") or {}
    if not search.get("measured"):
        return ""
    limit = search["max_kl"]
    rows = [
        (f"{m['avg_bits']:.4f}", _number(m["kl"], ".5f"), "yes" if m["kl"] <= limit else "no")
        for m in sorted(search["measured"], key=lambda m: m["avg_bits"])
    ]
    said = (
        f"The smallest plan whose KL is at most {limit:g} on held-out text, each one "
        f"rounded and measured; the search ends at {search['tolerance']:g} bits per weight."
    )
    heads = ["bits per weight", "KL", "good enough"]
    return _section("How small it can be", _note(said), _table(heads, rows))


def _stability(report: Data) -> str:
    found = report.get("stability")
    if not found:
        return ""
    excess = " and ".join(f"{x:+.2%}" for x in found["excess_loss"])
    said = (
        f"Planned from either half of the calibration text alone, {found['same_units']:.1%} of the "
        f"units and {found['same_bits']:.1%} of the bits come out the same. By all of the text, "
        f"these plans lose {excess} against the best."
    )
    return _section("Stability", _note(said))


def _stages(report: Data) -> str:
    stages = report.get("stages") or []
    if not stages:
        return ""
    gpu = any("peak_gpu_memory_bytes" in s for s in stages)
    rows = [
        (
            s["stage"],
            f"{s['seconds']:.1f}",
            size(s["peak_memory_bytes"]),
            *([size(s.get("peak_gpu_memory_bytes") or 0)] if gpu else []),
        )
        for s in stages
    ]
    total = sum(s["seconds"] for s in stages)
    peaks = [
        max(s.get(k) or 0 for s in stages) for k in ("peak_memory_bytes", "peak_gpu_memory_bytes")
    ]
    rows.append(("all", f"{total:.1f}", *map(size, peaks[: 1 + gpu])))
    heads = ["stage", "seconds", "peak memory", *(["peak GPU memory"] if gpu else [])]
    return _section("Time and memory", _table(heads, rows, "total"))


# --- the page --------------------------------------------------------------------------------


def render(report: Data, plan: Data | None = None, scores: Data | None = None) -> str:
    """The page, from the contents of report.json, plan.json and scores.json. See the module."""
    plan, scores = plan or {}, scores or {}
    name = str((report.get("source") or {}).get("name") or "model").rstrip("/").rpartition("/")[2]
    bits = (report.get("reached") or {}).get("avg_bits")
    title = f"{name} at {bits:.2f} bits" if _is_number(bits) else name
    sections = (
        _sample(report),
        _tasks(report),
        _maps(report, scores),
        _curve(report, plan),
        _predicted_and_measured(report, plan),
        _search(report),
        _candidates(report),
        _fidelity(report),
        _swaps(report),
        _stability(report),
        _stages(report),
        _how(report, plan),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<header><h1>{text(title)}</h1>{_judgement(report)}</header>{_cards(report)}"
        f'<div class="sections">{"".join(sections)}</div></main></body></html>\n'
    )
