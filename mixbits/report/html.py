"""report.html: what a run did and why, as one page that needs nothing else.

A pure function of what the other files hold: report.json, plan.json and scores.json. Sections are
data (`blocks`), made here and in `html_plan`; the template lays them out. What a report does not
have, no section tells.

No script, no picture, no font is loaded: the style is inline, the charts are SVG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from . import html_plan, style, verdict
from .blocks import Block, Code, Facts, Figure, Note, Section, Table, together
from .maps import BITS, heat_map, scheme_bits
from .report import Evaluation, HeldOut, Report
from .tables import is_number, number, size, task_rows, text_lines, text_rows

Data = Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    name: str
    value: str
    more: str


@dataclass(frozen=True)
class Judgement:
    """The verdict: its word, and the rest of the sentence."""

    word: str
    figures: str


@dataclass(frozen=True)
class Page:
    """What the template shows: a header, cards with the figures that matter, and sections."""

    title: str
    verdict: Judgement | None
    judgement: list[Block]
    cards: list[Card]
    notes: list[Block]
    sections: list[Section]


# --- header -----------------------------------------------------------------------------------


def _title(report: Report) -> str:
    name = str((report.source and report.source.name) or "model").rstrip("/").rpartition("/")[2]
    bits = report.reached.avg_bits
    return f"{name} at {bits:.2f} bits" if is_number(bits) else name


def _judged(report: Report) -> tuple[Judgement | None, list[Block]]:
    """Whether it is good, in words; and what the plan was compared with."""
    said = verdict.lines(report.evaluation)
    if not said:
        return None, []
    compared = (
        f"Of {len(report.candidates)} candidates of this size, it was the best on other text."
        if report.candidates
        else "No other plan of this size was compared with it."
    )
    word, colon, figures = together(said[0]).partition(":")
    more = [*said[1:], *text_lines(report.evaluation), compared]
    notes: list[Block] = [Note(together(line)) for line in more]
    return Judgement(word, colon + figures), notes


def _cards(report: Report) -> list[Card]:
    return [
        Card(card.name, together(card.value), together(card.more))
        for card in [*_size_cards(report), *_score_cards(report.held_out or HeldOut())]
    ]


def _size_cards(report: Report) -> list[Card]:
    reached, cards = report.reached, []
    after = report.bytes_after or reached.predicted_bytes
    before = report.bytes_before or after
    if after and before:
        cards.append(Card("weight files", size(after), f"{after / before:.0%} of {size(before)}"))
    if is_number(reached.avg_bits):
        more = f"{number(reached.avg_bits_without_scales, '.4f')} without scales"
        cards.append(Card("bits per weight", f"{reached.avg_bits:.4f}", more))
    return cards


def _score_cards(held: HeldOut) -> list[Card]:
    cards = []
    if is_number(held.kl):
        more = "nats per token" + _error(held.kl_stderr, ".4f")
        cards.append(Card("KL divergence", f"{held.kl:.4f}", more))
    if is_number(held.perplexity):
        more = f"from {number(held.perplexity_reference, '.3f')}"
        more += _error(held.perplexity_stderr, ".3f")
        cards.append(Card("perplexity", f"{held.perplexity:.3f}", more))
    if is_number(held.top1_agreement):
        more = "of likeliest tokens" + _error(held.top1_agreement_stderr, ".2%")
        cards.append(Card("agreement", f"{held.top1_agreement:.2%}", more))
    return cards


def _error(stderr: Any, digits: str) -> str:
    return f", ±\u00a0{stderr:{digits}}" if is_number(stderr) else ""


_ERRORS = Note(
    "± is a standard error, of how much figures vary between sequences: over much more text of "
    "this kind a figure would come out within twice that, in 19 of 20 cases."
)

# --- sections -----------------------------------------------------------------------------------


def _sample(report: Report) -> Section | None:
    evaluation = report.evaluation or Evaluation()
    if not evaluation.sample:
        return None
    note = Note("What the quantized model makes of the prompt, drawn with the run's seed.")
    prompt, said = evaluation.prompt or "", evaluation.sample
    begins = len(prompt) if prompt and said.startswith(prompt) else 0
    return Section("A sample", [note, Code(said[begins:], said[:begins])])


def _tasks(report: Report) -> Section | None:
    rows = task_rows(report.evaluation or Evaluation())
    return Section("Tasks", [Table(rows[0], rows[1:], "names2")]) if rows else None


def _texts(report: Report) -> Section | None:
    rows = text_rows(report.evaluation)
    note = Note("What plan and rounding were made with, what chose among plans, and what judges.")
    return Section("Text by text", [note, Table(rows[0], rows[1:], "names2")]) if rows else None


def _map(title: str, told: str, name: str, *values: Any, **look: Any) -> Section:
    chart, outside = heat_map(name, *values, **look)
    drawn = [Figure(chart.draw(), chart.wide)] if chart else []
    return Section(title, [Note(told), *drawn, *([Note(outside)] if outside else [])])


def _bits(report: Report, weights: Mapping[str, int]) -> Section | None:
    if not report.linear_bits:
        return None
    told = "Bits per weight of every linear; blocks from left to right."
    values = report.linear_bits, weights
    return _map("Where the bits went", told, "bits per weight", *values, **BITS)


def _sensitivity(scores: Data, weights: Mapping[str, int]) -> Section | None:
    """Every linear's loss per weight in the scheme of fewest bits."""
    linears = scores.get("linears") or {}
    names = list(next(iter(linears.values()))["scores"]) if linears else []
    if not names:
        return None
    cheapest = min(names, key=_known_bits)
    per_weight = {
        linear: row["scores"][cheapest] / math.prod(row["shape"])
        for linear, row in linears.items()
        if is_number(row["scores"].get(cheapest))
    }
    if not per_weight:
        return None
    unit = {"fisher": "nats per weight"}.get(str(scores.get("method")), "per weight")
    look: dict[str, Any] = {"unit": unit, "ramp": "orange", "digits": ".1e", "logarithmic": True}
    told = f"Predicted loss of {cheapest}, the smallest scheme, for each weight."
    return _map("Where it hurts", told, "sensitivity", per_weight, weights, **look)


def _known_bits(scheme: str) -> float:
    try:
        return scheme_bits(scheme)
    except UsageError:  # of a later version
        return math.inf


def _stages(report: Report) -> Section | None:
    stages = report.stages or []
    if not stages:
        return None
    gpu = any(s.peak_gpu_memory_bytes is not None for s in stages)
    rows = [
        (
            s.stage,
            f"{s.seconds:.1f}",
            size(s.peak_memory_bytes),
            *([size(s.peak_gpu_memory_bytes or 0)] if gpu else []),
        )
        for s in stages
    ]
    peaks = [
        max(s.peak_memory_bytes for s in stages),
        max(s.peak_gpu_memory_bytes or 0 for s in stages),
    ]
    total = sum(s.seconds for s in stages)
    rows.append(("all", f"{total:.1f}", *map(size, peaks[: 1 + gpu])))
    heads = ["stage", "seconds", "peak memory", *(["peak GPU memory"] if gpu else [])]
    return Section("Time and memory", [Table(heads, rows, "total")])


def _how(report: Report, plan: Data) -> Section:
    """The command, and what it met."""
    command = [Code(report.command)] if report.command else []
    return Section("How it was made", [*command, Facts(_facts(report, plan))])


def _facts(report: Report, plan: Data) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    name = sha256 = "-"
    if source := report.source:
        name, sha256 = source.name or "-", source.sha256 or "-"
    facts["model"] = f"{name} ({sha256[:16]})"
    for key, of in (
        ("budget", report.budget),
        ("calibration", report.calibration and report.calibration.data()),
        ("rounding", report.rounding and report.rounding.data()),
    ):
        if of:
            facts[key] = ", ".join(f"{k} {v}" for k, v in of.items() if v not in (None, []))
    if (held := report.held_out) and held.source:
        facts["held-out text"] = held.source
    if report.evaluation and "scored" in report.evaluation.model_fields_set:
        facts["scored"] = report.evaluation.scored
    for key in ("strategy", "method", "weight_scale_mode", "act_scale_mode"):
        if plan.get(key):
            facts[key.replace("_", " ")] = plan[key]
    loss, bound = html_plan.predicted_loss(report, plan), plan.get("lower_bound")
    if is_number(loss) and is_number(bound):
        least = f"no plan within the budget can have less than {bound:.4g}"
        proven = loss - bound <= 1e-9 * abs(loss)
        facts["predicted loss"] = f"{loss:.4g}; {'proven to be the least' if proven else least}"
    for key, value in (report.environment.data() if report.environment else {}).items():
        if value is not None:
            facts[key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return facts


# --- the page -------------------------------------------------------------------------------------


def _page(report: Report, plan: Data, scores: Data) -> Page:
    judgement, compared = _judged(report)
    cards = _cards(report)
    weights = {n: math.prod(row["shape"]) for n, row in (scores.get("linears") or {}).items()}
    sections = (
        _sample(report),
        _tasks(report),
        _bits(report, weights),
        _sensitivity(scores, weights),
        html_plan.budgets(report, plan),
        html_plan.predicted_and_measured(report, plan),
        html_plan.search(report),
        html_plan.candidates(report),
        _texts(report),
        html_plan.fidelity(report),
        html_plan.swaps(report),
        html_plan.stability(report),
        _stages(report),
        _how(report, plan),
    )
    return Page(
        _title(report),
        judgement,
        compared,
        cards,
        [_ERRORS] if any("±" in card.more for card in cards) else [],
        [section for section in sections if section],
    )


def render(report: Report, plan: Data | None = None, scores: Data | None = None) -> str:
    """The page, from the contents of report.json, plan.json and scores.json. See the module."""
    page = _page(report.as_read(), plan or {}, scores or {})
    return style.render("report.html", page=page, style=style.of_page())
