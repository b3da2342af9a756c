"""Linears that the source has quantized in a format of ours: their codes and scales can stay.

A checkpoint such as gpt-oss, whose experts are MXFP4, or one of compressed-tensors, GPTQ or AWQ
integers, would lose by a second rounding. So each such linear is offered its own scheme, which
costs no loss, and wherever a plan gives it the format that it has, its own codes and scales are
packed, whatever rounds the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..formats.pack import Packed
from ..formats.schemes import Assignment, Format, Scheme, weight_only
from ..model.layout import LinearInfo
from ..model.units import Unit
from ..progress import steps
from .weights import Weights


def _is_format(scheme: Scheme, fmt: Format) -> bool:
    """Whether weights of a scheme are codes and scales of `fmt`, whatever rule makes scales."""
    weight = scheme.weight
    return weight is not None and replace(weight, scale_mode=fmt.scale_mode) == fmt


@dataclass(frozen=True)
class OwnCodes:
    """`formats`: linear -> the format that the source has it in, of those that can be kept."""

    weights: Weights | None = None
    linears: Mapping[str, LinearInfo] = field(default_factory=dict)
    formats: Mapping[str, Format] = field(default_factory=dict)

    @classmethod
    def find(cls, weights: Weights, linears: Sequence[LinearInfo]) -> OwnCodes:
        """Reads the values once, since not every scale is one of ours."""
        likely = [i for i in linears if weights.kept_format(i.name, i.is_expert) is not None]
        formats = {}
        advance = steps(len(likely))
        for info in likely:
            if (kept := weights.kept(info.name, info.is_expert)) is not None:
                formats[info.name] = kept.format
            advance()
        return cls(weights, {i.name: i for i in likely}, formats)

    def offer(
        self, units: Sequence[Unit], options: Sequence[Sequence[Scheme]], schemes: Sequence[Scheme]
    ) -> list[list[Scheme]]:
        """Options of every unit, with its own scheme where `schemes` has it and none is like it.

        A unit that is left one option has been decided on.
        """
        found = [list(option) for option in options]
        for unit, option in zip(units, found, strict=True):
            formats = {self.formats.get(info.name) for info in unit.linears}
            fmt = formats.pop() if len(formats) == 1 else None
            if fmt is None or len(option) == 1:
                continue
            if not any(_is_format(s, fmt) and s.activation is None for s in option):
                option += [s for s in schemes if _is_format(s, fmt) and s.activation is None]
        return found

    @property
    def schemes(self) -> list[Scheme]:
        """The linears' own schemes, each once."""
        found = [weight_only(fmt) for fmt in dict.fromkeys(self.formats.values())]
        return list({scheme.name: scheme for scheme in found}.values())

    def is_free(self, linear: str, scheme: Scheme) -> bool:
        """Whether a scheme changes nothing of a linear."""
        fmt = self.formats.get(linear)
        return fmt is not None and scheme.activation is None and _is_format(scheme, fmt)

    def rounded_names(self, assignment: Assignment) -> list[str]:
        """The linears to which a plan gives the format that they have."""
        chosen = {name: assignment.get(name) for name in self.formats}
        return [
            name
            for name, recipe in chosen.items()
            if recipe and recipe.scheme and _is_format(recipe.scheme, self.formats[name])
        ]

    def rounded(self, assignment: Assignment) -> dict[str, list[Packed]]:
        """Those linears as the source has them."""
        found: dict[str, list[Packed]] = {}
        for name in self.rounded_names(assignment):
            assert self.weights is not None
            kept = self.weights.kept(name, self.linears[name].is_expert)
            assert kept is not None
            found[name] = [kept.packed]
        return found


NO_CODES = OwnCodes()
