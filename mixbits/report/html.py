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
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..formats.schemes import parse_scheme
from . import html_pieces as pieces
from . import html_plan as report_plan
from . import verdict
from .charts import HeatMap, Html, text
from .html_pieces import Data
from .html_style import STYLE
from .tables import average_name, size

# --- summary ---------------------------------------------------------------------------------


def _card(name: str, value: str, more: str = "") -> str:
    detail = f"<small>{text(pieces.together(more))}</small>" if more else ""
    shown = text(pieces.together(value))
    return f'<div class="card"><span>{text(name)}</span><b>{shown}</b>{detail}</div>'


def _cards(report: Data) -> Html:
    reached, held = report.get("reached") or {}, pieces.held_out(report)
    after = report.get("bytes_after") or reached.get("predicted_bytes")
    before = report.get("bytes_before") or after
    cards = []
    if after and before:
        more = f"{after / before:.0%} of {size(before)}"
        cards.append(_card("weight files", size(after), more))
    if pieces.is_number(reached.get("avg_bits")):
        without = pieces.number(reached.get("avg_bits_without_scales"), ".4f")
        more = f"{without} without scales"
        cards.append(_card("bits per weight", f"{reached['avg_bits']:.4f}", more))
    if pieces.is_number(held.get("kl")):
        more = "nats per token" + _error(held, "kl", ".4f")
        cards.append(_card("KL divergence", f"{held['kl']:.4f}", more))
    if pieces.is_number(held.get("perplexity")):
        more = f"from {pieces.number(held.get('perplexity_reference'), '.3f')}"
        more += _error(held, "perplexity", ".3f")
        cards.append(_card("perplexity", f"{held['perplexity']:.3f}", more))
    if pieces.is_number(held.get("top1_agreement")):
        more = "of likeliest tokens" + _error(held, "top1_agreement", ".2%")
        cards.append(_card("agreement", f"{held['top1_agreement']:.2%}", more))
    errors = any("±" in card for card in cards)
    note = pieces.note(
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
    word, colon, figures = pieces.together(said[0]).partition(":")
    rest = "".join(pieces.note(pieces.together(line)) for line in [*said[1:], compared])
    return f'<p class="verdict"><b>{text(word)}</b>{colon}{text(figures)}</p>{rest}'


def _sample(report: Data) -> str:
    evaluation = report.get("evaluation") or {}
    if not evaluation.get("sample"):
        return ""
    note = pieces.note("What the quantized model makes of the prompt, drawn with the run's seed.")
    prompt, said = str(evaluation.get("prompt") or ""), str(evaluation["sample"])
    begins = len(prompt) if prompt and said.startswith(prompt) else 0
    shown = f"<pre><b>{text(said[:begins])}</b>{text(said[begins:])}</pre>"
    return pieces.section("A sample", note, shown)


def _error(held: Data, name: str, digits: str) -> str:
    stderr = held.get(f"{name}_stderr")
    return f", ±\u00a0{stderr:{digits}}" if pieces.is_number(stderr) else ""


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
                cells = [pieces.plus_minus(s.get(name), s.get(f"{name}_stderr")) for s in scores]
                rows.append([task, name, *cells])
    if len(quantized["tasks"]) > 1:
        cells = [pieces.plus_minus(m.get("average"), m.get("average_stderr")) for m in models]
        rows.append([average_name(quantized), "acc", *cells])
    scored = evaluation.get("scored", "quantized")
    heads = ["task", "metric", *(["original"] if original else []), scored]
    return pieces.section("Tasks", pieces.table(heads, rows, "names2"))


def _how(report: Data, plan: Data) -> Html:
    """The command, and what it met."""
    facts: dict[str, Any] = {}
    source, held = report.get("source") or {}, pieces.held_out(report)
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
    if pieces.is_number(loss) and pieces.is_number(bound):
        least = f"no plan within the budget can have less than {bound:.4g}"
        proven = loss - bound <= 1e-9 * abs(loss)
        facts["predicted loss"] = f"{loss:.4g}; {'proven to be the least' if proven else least}"
    for key, value in (report.get("environment") or {}).items():
        if value is not None:
            facts[key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    terms = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in facts.items())
    command = f"<pre>{text(report['command'])}</pre>" if report.get("command") else ""
    return pieces.section("How it was made", command, f"<dl>{terms}</dl>")


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
    drawn = pieces.figure(chart.draw(), chart.wide) if inside else ""
    return drawn + (pieces.note(f"Outside the blocks: {', '.join(outside)}.") if outside else "")


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
        if pieces.is_number(row["scores"].get(cheapest))
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
        parts += pieces.section(
            "Where the bits went",
            pieces.note("Bits per weight of every linear; blocks from left to right."),
            _heat_map("bits per weight", report["linear_bits"], weights, **look),
        )
    scheme, per_weight = _sensitivity(scores)
    if per_weight:
        unit = {"fisher": "nats per weight"}.get(str(scores.get("method")), "per weight")
        look = {"unit": unit, "ramp": "orange", "digits": ".1e", "logarithmic": True}
        parts += pieces.section(
            "Where it hurts",
            pieces.note(f"Predicted loss of {scheme}, the smallest scheme, for each weight."),
            _heat_map("sensitivity", per_weight, weights, **look),
        )
    return parts


# --- time and memory ------------------------------------------------------------------------


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
    return pieces.section("Time and memory", pieces.table(heads, rows, "total"))


# --- the page --------------------------------------------------------------------------------


def render(report: Data, plan: Data | None = None, scores: Data | None = None) -> str:
    """The page, from the contents of report.json, plan.json and scores.json. See the module."""
    plan, scores = plan or {}, scores or {}
    name = str((report.get("source") or {}).get("name") or "model").rstrip("/").rpartition("/")[2]
    bits = (report.get("reached") or {}).get("avg_bits")
    title = f"{name} at {bits:.2f} bits" if pieces.is_number(bits) else name
    sections = (
        _sample(report),
        _tasks(report),
        _maps(report, scores),
        report_plan.budgets(report, plan),
        report_plan.predicted_and_measured(report, plan),
        report_plan.search(report),
        report_plan.candidates(report),
        report_plan.fidelity(report),
        report_plan.swaps(report),
        report_plan.stability(report),
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
