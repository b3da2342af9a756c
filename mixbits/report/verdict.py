"""Is it good? One judgement in words, from what was measured on held-out text.

Two criteria, each with fixed limits, and the worse of them decides: the perplexity of the quantized
model as a multiple of the original's, and the share of positions at which both find the same token
likeliest (top-1 agreement). Perplexity alone hides what cancels on average; agreement alone does
not see how sure a model is. The limits separate what is published for llama.cpp's types, which
people know by use; docs/budget.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..formats.schemes import BF16, Scheme
from .report import Evaluation

# The worst that still has the name: perplexity as a multiple of the original's, top-1 agreement.
LEVELS: tuple[tuple[str, float, float], ...] = (
    ("near-lossless", 1.01, 0.95),
    ("good", 1.05, 0.90),
    ("fair", 1.15, 0.80),
    ("poor", 1.60, 0.65),
    ("unusable", math.inf, 0.0),
)
WORDS = tuple(word for word, _, _ in LEVELS)
NOT_JUDGED = "not judged"
BAD = WORDS.index("poor")  # from here on a line of advice follows
ENOUGH_TOKENS = 8192  # of calibration text, below which error compensation is not to be trusted
ACTIVATION_BITS = 4  # rounding activations to so few costs more than rounding weights does


@dataclass(frozen=True)
class Circumstances:
    """What a plan is made of, as far as advice may follow from it.

    `schemes` are those that the plan uses, `widest` the most bits per weight that one of those
    offered has; `tokens` of calibration text were rounded with, None where no text was.
    """

    schemes: Sequence[Scheme]
    avg_bits: float
    widest: float
    gated: bool
    gate_possible: bool = True
    tokens: int | None = None


def verdict(
    held_out: Mapping[str, Any] | None, circumstances: Circumstances | None = None
) -> dict[str, Any]:
    """`evaluation.verdict` of report.json: word, border, sentence, advice, and the figures.

    `held_out` is what `evaluate.compare` returns; without it nothing is judged. `border` is the
    neighbouring word that lies within one standard error, or None.
    """
    if not held_out:
        sentence = "Not judged: no held-out text was scored (--eval-nsamples)."
        return {"word": NOT_JUDGED, "border": None, "sentence": sentence, "advice": None}
    names = "perplexity_ratio", "top1_agreement"
    ratio, agreement = (_Figure.of(held_out, name) for name in names)
    level = _worst(ratio.value, agreement.value)
    border = _border(ratio, agreement, level)
    bad = level >= BAD and circumstances is not None
    return {
        "word": WORDS[level],
        "border": border,
        "sentence": _sentence(ratio, agreement, level, border),
        "advice": advice(circumstances) if bad and circumstances else None,
        **{key: held_out.get(key) for n in names for key in (n, f"{n}_stderr")},
    }


@dataclass(frozen=True)
class _Figure:
    """A measured value with its standard error, 0 where that is not known."""

    value: float
    stderr: float

    @classmethod
    def of(cls, held_out: Mapping[str, Any], name: str) -> _Figure:
        value, stderr = held_out[name], held_out.get(f"{name}_stderr")
        known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
        return cls(math.nan if value is None else value, float(stderr or 0.0) if known else 0.0)


def lines(evaluation: Evaluation | None) -> list[str]:
    """What is said of it: the sentence, and the advice if any. Of older reports nothing."""
    found = evaluation.verdict if evaluation else None
    return [said for said in (found.sentence, found.advice) if said] if found else []


def _level(value: float, within: Callable[[float, float, float], bool]) -> int:
    """The first level that holds `value`: what is not a number has the last."""
    found = (i for i, (_, most, least) in enumerate(LEVELS) if within(value, most, least))
    return next(found, len(LEVELS) - 1)


def _ratio_level(ratio: float) -> int:
    return _level(ratio, lambda value, most, _: value <= most)


def _agreement_level(agreement: float) -> int:
    return _level(agreement, lambda value, _, least: value >= least)


def _worst(ratio: float, agreement: float) -> int:
    return max(_ratio_level(ratio), _agreement_level(agreement))


def _border(ratio: _Figure, agreement: _Figure, level: int) -> str | None:
    """The neighbour that one standard error reaches; of two the worse."""
    for sign, step in ((1, 1), (-1, -1)):
        moved = ratio.value + sign * ratio.stderr, agreement.value - sign * agreement.stderr
        if (_worst(*moved) - level) * step > 0:
            return WORDS[level + step]
    return None


def _sentence(ratio: _Figure, agreement: _Figure, level: int, border: str | None) -> str:
    where = f", at the border of {border}" if border else ""
    by = [
        name
        for name, own in (
            ("the perplexity", _ratio_level(ratio.value)),
            ("the agreement", _agreement_level(agreement.value)),
        )
        if own == level
    ]
    why = f"; {by[0]} decides" if len(by) == 1 and level else ""
    return (
        f"{WORDS[level].capitalize()}{where}: perplexity is {_shown(ratio, 3)} times the "
        f"original's, and both find the same token likeliest at {_shown(agreement, 1, 100)} % of "
        f"positions{why}."
    )


def _shown(figure: _Figure, digits: int, factor: float = 1.0) -> str:
    value, stderr = figure.value * factor, figure.stderr * factor
    if not math.isfinite(value):
        return "more than can be told"
    if abs(value) >= 1000:
        return f"{value:.3g}"
    return f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr else "")


def advice(of: Circumstances) -> str:
    """What most likely helps, in one sentence: the first of these that applies."""
    rounded = [s.name for s in of.schemes if s.activation and s.activation.bits <= ACTIVATION_BITS]
    if rounded:
        return (
            f"{', '.join(rounded)} rounds activations to {ACTIVATION_BITS} bits: schemes that "
            "leave them in 16 bits lose less at the same size (--schemes MXFP4A16,MXFP8A16 or "
            "W4A16G64,W8A16G64)."
        )
    if of.tokens is not None and of.tokens < ENOUGH_TOKENS and not of.gated:
        return (
            f"The weights were rounded with {of.tokens:,} tokens of text, and no other way was "
            "compared: take more (--nsamples), leave the gate on, or round without text "
            "(--rounding search)."
        )
    if of.avg_bits + 0.25 < of.widest:
        more = min(of.avg_bits + 1, of.widest)
        return f"More bits lose less: --avg-bits {more:.3g}, or --curve to see what each buys."
    if not of.gated and of.gate_possible:
        return "No other plan was compared with this one: leave the gate on (no --gate 0)."
    if of.widest < BF16.element_bits:
        return "All linears have the widest scheme already: offer a wider one, such as BF16."
    return "The model hardly bears rounding: leave the linears that suffer most alone (--keep)."
