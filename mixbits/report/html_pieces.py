"""Parts that sections of report.html are made of: tables, notes, figures, and numbers as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .charts import Html, text

Data = Mapping[str, Any]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: Any, digits: str = ".4g") -> str:
    return f"{value:{digits}}" if is_number(value) else "-"


def plus_minus(value: Any, stderr: Any, digits: str = ".4f") -> str:
    shown = number(value, digits)
    return f"{shown} ± {stderr:{digits}}" if is_number(stderr) else shown


def table(head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """A table that scrolls sideways where it must, with a shadow where there is more."""
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{text(c)}</td>" for c in row) + "</tr>" for row in rows)
    return Html(
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(title: str, *parts: str) -> Html:
    return Html(f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>")


def note(sentence: object) -> Html:
    return Html(f"<p>{text(sentence)}</p>")


def figure(chart: str, wide: bool = False) -> Html:
    """A chart; one that is `wide` says on a narrow screen that it scrolls."""
    hint = '<span class="sideways">wider than this screen: scroll sideways →</span>' * wide
    return Html(f'{hint}<div class="scroll">{chart}</div>')


_UNIT = re.compile(r"(?<=\d) (?=[kMG]?B\b|%|bits?\b)")


def together(words: object) -> str:
    """Numbers stay on a line with their units."""
    return _UNIT.sub("\u00a0", str(words))


def held_out(report: Data) -> Data:
    return (report.get("evaluation") or {}).get("held_out") or {}
