"""What becomes of linears that no token of the text reached: they would look free of charge.

An expert takes what its peers have on average; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from ..errors import UsageError
from ..model.layout import LinearInfo

Record = TypeVar("Record")  # what a method keeps of a linear


def fill_idle(
    records: dict[str, Record],
    linears: Sequence[LinearInfo],
    reached: Collection[str],
    mean: Callable[[Sequence[Record]], Record],
) -> None:
    """Give experts that no gradient reached, in `records`, the `mean` of those of their peers.

    Raises UsageError for a linear that has no peer which was reached.
    """
    _check_reached(linears, reached)
    for active, idle in _idle_experts(linears, reached):
        records.update(dict.fromkeys(idle, mean([records[name] for name in active])))


def _idle_experts(
    linears: Sequence[LinearInfo], reached: Collection[str]
) -> list[tuple[list[str], list[str]]]:
    """Of every projection of a block's experts: those that were reached, and those that were not.

    The latter, where there are any, take what the former have on average. Otherwise they would look
    free of charge, and any text outside the calibration would pay.
    """
    groups: dict[str, list[str]] = {}
    for info in linears:
        if info.peers is not None:
            groups.setdefault(info.peers, []).append(info.name)
    parts = [
        ([n for n in names if n in reached], [n for n in names if n not in reached])
        for names in groups.values()
    ]
    return [(active, idle) for active, idle in parts if idle]


def _pattern_of(info: LinearInfo) -> str:
    """What --ignore calls a linear and those like it: all experts of a block, or one projection."""
    if info.peers is not None:
        return f"{info.peers.rpartition('.')[0]}.*"
    return f"*.{info.name.rpartition('.')[2]}"


def _check_reached(linears: Sequence[LinearInfo], reached: Collection[str]) -> None:
    """Raises UsageError for a linear that no gradient reached: it would look free of charge.

    Not for an expert that one of its peers can stand for.
    """
    seen = {i.peers for i in linears if i.name in reached} - {None}
    idle = [i for i in linears if i.name not in reached and i.peers not in seen]
    if idle:
        patterns = dict.fromkeys(map(_pattern_of, idle))
        options = " ".join(f"--ignore '{pattern}'" for pattern in patterns)
        raise UsageError(
            f"linears must be called to be measured: got {len(idle)} that no token of the text "
            "reached, or whose weights the model uses in another way; take more text, or leave "
            f"them as they are: {options} ({idle[0].name})"
        )
