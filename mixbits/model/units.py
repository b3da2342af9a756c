"""What the allocation decides on: a *unit* is one linear, or several that must agree.

Patterns name units and linears on the command line: shell wildcards, or regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import UsageError
from .layout import LinearInfo, split_expert_name


@dataclass(frozen=True)
class Unit:
    """What takes one scheme: linears that must agree, in the model's order."""

    name: str
    linears: tuple[LinearInfo, ...]


def _unit_name(info: LinearInfo, fuse: bool, per_expert: bool, by_input: bool) -> str:
    parent, _, leaf = info.name.rpartition(".")
    if info.is_expert and not per_expert:
        parent = split_expert_name(info.name)[0]
        if not by_input:
            return parent
    if fuse and info.shared:
        return f"{parent}.{'+'.join(info.shared)}"
    return f"{parent}.{leaf}"


def make_units(
    linears: Iterable[LinearInfo],
    fuse: bool = False,
    per_expert: bool = False,
    by_input: bool = False,
) -> list[Unit]:
    """Group linears into units, in the model's order.

    fuse        linears that read one input agree, as engines that fuse them require: q/k/v, and
                gate/up.
    per_expert  every expert's linear is free; otherwise all experts of a block agree.
    by_input    but not their gate and up projections with their down projections, whose inputs
                are others: the linears of a unit then have as many columns.
    """
    groups: dict[str, list[LinearInfo]] = {}
    for info in linears:
        name = _unit_name(info, fuse, per_expert, by_input)
        if by_input and name in groups and groups[name][0].in_features != info.in_features:
            name = info.name  # it reads something else
        groups.setdefault(name, []).append(info)
    return [Unit(name, tuple(members)) for name, members in groups.items()]


def name_matches(name: str, pattern: str) -> bool:
    """Whether a wildcard, or a regular expression after `re:`, names it. Raises re.error."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def match_units(units: Sequence[Unit], pattern: str, option: str = "--keep") -> list[int]:
    """Indices of the units that a pattern, given as `option`, names.

    A pattern is a shell wildcard over unit or linear names (`*.down_proj`), or a regular
    expression after `re:`. Raises UsageError where nothing matches.
    """

    try:
        found = [
            index
            for index, unit in enumerate(units)
            if any(name_matches(n, pattern) for n in (unit.name, *(i.name for i in unit.linears)))
        ]
    except re.error as error:
        raise UsageError(f"{option} {pattern!r} is not a regular expression: {error}") from error
    if not found:
        meant = f"*.{pattern}"
        inner = any(fnmatchcase(i.name, meant) for unit in units for i in unit.linears)
        hint = f"; '{meant}' would" if inner else ""
        raise UsageError(f"{option} {pattern!r} matches no unit, such as {units[0].name}{hint}")
    return found


def ignore(
    linears: Sequence[LinearInfo], patterns: Sequence[str], left: Sequence[str] = ()
) -> list[LinearInfo]:
    """The linears that no `--ignore` pattern names. Raises UsageError where none is left.

    A pattern may as well name one of `left`, which are left alone anyway.
    """
    units = make_units(linears, per_expert=True)
    ignored: set[int] = set()
    for pattern in patterns:
        try:
            ignored.update(match_units(units, pattern, "--ignore"))
        except UsageError as error:
            is_pattern = not isinstance(error.__context__, re.error)
            if not is_pattern or not any(name_matches(name, pattern) for name in left):
                raise
    kept = [info for i, unit in enumerate(units) if i not in ignored for info in unit.linears]
    if not kept:
        raise UsageError(f"--ignore must leave a linear: got {' '.join(patterns)}, which name all")
    return kept
