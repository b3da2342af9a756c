"""What sections of report.html are made of. Here is what they say; the template says how it looks.

Text is escaped by the template, but what is `Markup`: charts and symbols.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from markupsafe import Markup


class Block:
    """A part of a section; `tag` is what the template calls its kind."""

    tag: ClassVar[str]


@dataclass(frozen=True)
class Note(Block):
    """A paragraph."""

    tag = "note"
    text: str


@dataclass(frozen=True)
class Table(Block):
    """Scrolls sideways where it must. `kind`: `names2` has names in two columns, `total` sums up
    in its last row.
    """

    tag = "table"
    head: Sequence[object]
    rows: Sequence[Sequence[object]]
    kind: str = ""


@dataclass(frozen=True)
class Figure(Block):
    """A chart; one that is `wide` says on a narrow screen that it scrolls."""

    tag = "figure"
    chart: Markup
    wide: bool = False


@dataclass(frozen=True)
class Code(Block):
    """Text as it stands; what was `given` comes first, in bold."""

    tag = "code"
    text: str
    given: str = ""


@dataclass(frozen=True)
class Facts(Block):
    """Names and what they are: a list of definitions."""

    tag = "facts"
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Group(Block):
    """Blocks under a small heading, or `beside` each other."""

    tag = "group"
    title: str
    blocks: Sequence[Block]
    beside: bool = False


@dataclass(frozen=True)
class Section:
    """Blocks under a heading of the page."""

    title: str
    blocks: Sequence[Block]


_UNIT = re.compile(r"(?<=\d) (?=[kMG]?B\b|%|bits?\b)")


def together(words: object) -> str:
    """Numbers stay on a line with their units."""
    return _UNIT.sub("\u00a0", str(words))
