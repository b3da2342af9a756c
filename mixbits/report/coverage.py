"""How much of a model takes part: what its decoder blocks hold beside the linears, and why.

Counted are parameters of two dimensions and more in the decoder blocks. A share is one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..model.layout import LeftAlone, LinearInfo, Survey
from ..model.units import name_matches
from .tables import size

LEAST_SHARE = 0.5  # of a budget: with less, what it says is not true of the model
_WORTH_SAYING = 0.0005


@dataclass(frozen=True)
class Coverage:
    """What a survey found, and what --ignore names of it."""

    found: Survey
    ignored: Sequence[str] = ()

    @property
    def elements(self) -> int:
        in_blocks = sum(i.numel for i in self.found.linears if i.block is not None)
        return in_blocks + sum(one.numel for one in self.found.left)

    def share(self, linears: Sequence[LinearInfo]) -> float:
        """Of `linears`, as far as they are in decoder blocks."""
        return sum(i.numel for i in linears if i.block is not None) / max(1, self.elements)

    def groups(self) -> list[dict[str, Any]]:
        """`left_alone` of report.json: what is of one class and left for one reason."""
        rows = [
            {
                "class": kind,
                "why": why,
                "tensors": len(members),
                "weights": sum(one.numel for one in members),
                "share": sum(one.numel for one in members) / self.elements,
                "first": members[0].name,
                "is_router": members[0].is_router,
            }
            for (kind, why), members in self._members().items()
        ]
        return sorted(rows, key=lambda row: -row["weights"])

    def _members(self) -> dict[tuple[str, str], list[LeftAlone]]:
        groups: dict[tuple[str, str], list[LeftAlone]] = {}
        for one in self.found.left:
            groups.setdefault((one.kind, one.why), []).append(one)
        return groups

    def lines(self, nbytes: Callable[[LeftAlone], int]) -> list[str]:
        """One for each group that is worth saying; `nbytes` are those of one as it is stored."""
        members = self._members()
        return [
            f"{size(sum(map(nbytes, members[row['class'], row['why']])))} in {_tensors(row)}, "
            f"{row['share']:.1%} of the weights, are left as they are: {row['why']}"
            for row in self._told()
        ]

    def _told(self) -> list[dict[str, Any]]:
        return [r for r in self.groups() if not r["is_router"] and r["share"] >= _WORTH_SAYING]

    def check(self, budget: str) -> None:
        """Raises UsageError if most weights take no part, but for those that --ignore names."""
        named = sum(one.numel for one in self.found.left if self._is_named(one))
        counted = self.elements - named
        quantizable = sum(i.numel for i in self.found.linears if i.block is not None)
        if quantizable >= LEAST_SHARE * counted:
            return
        rows = self._told() or self.groups()  # routers are many, if nothing else is
        others = "; ".join(f"{_tensors(r)}: {r['why']}" for r in rows[:3])
        raise UsageError(
            f"{budget} must speak of at least half of the weights in the decoder blocks: got "
            f"{quantizable / counted:.0%}, for the others are left as they are ({others}); "
            "--allow-partial quantizes the rest all the same"
        )

    def _is_named(self, one: LeftAlone) -> bool:
        return any(matches_left(one, pattern) for pattern in self.ignored)


def matches_left(one: LeftAlone, pattern: str) -> bool:
    """Whether a pattern names a parameter that is left alone, or the module that holds it."""
    return any(name_matches(n, pattern) for n in (one.name, one.name.rpartition(".")[0]))


def _tensors(row: dict[str, Any]) -> str:
    count = row["tensors"]
    what = "tensor" if count == 1 else "tensors"
    return f"{count} {what} of {row['class']} ({row['first']}{' ...' if count > 1 else ''})"
