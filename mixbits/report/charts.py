"""Charts as SVG text, for the page, for files and for notebooks: heat maps, curves, intervals.

Colours are CSS classes (`q0`..`q8` are the levels of a heat map, `c0`..`c5` kinds of points), so
that whoever shows a chart decides how it looks (`style`). Kinds of points differ in shape too.
Every mark carries its figures as a `<title>`, which browsers show and readers hear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 720  # of a heat map, in units that a page scales
WIDE = 620  # from here on it scrolls on a phone; what is smaller is made to fit
LEVELS = 9
_PLANS = {"this plan": 0, "uniform": 1, "head": 2, "tail": 3, "optimal": 4}
_BAND = 24  # blocks side by side in a heat map; more continue below
_LETTER = 6.4  # width of a letter, about


def _svg(width: float, height: float, parts: Sequence[str], label: str, kind: str = "") -> Markup:
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _write(x: float, y: float, value: object, anchor: str = "start", kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{mark}>{escape(value)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


# --- heat map --------------------------------------------------------------------------------


def levels(values: Sequence[float], logarithmic: bool = False) -> list[int]:
    """A level 0..8 per value, from the least to the largest; the middle one if all are equal.

    On a logarithmic scale what is not above 0 has the lowest level.
    """
    usable = [v for v in values if v > 0 or not logarithmic]
    scaled = [math.log(v) if logarithmic else v for v in usable]
    low, high = min(scaled, default=0.0), max(scaled, default=0.0)

    def level(value: float) -> int:
        if logarithmic and value <= 0:
            return 0
        if high == low:
            return LEVELS // 2
        share = ((math.log(value) if logarithmic else value) - low) / (high - low)
        return min(LEVELS - 1, int(share * LEVELS))

    return [level(value) for value in values]


@dataclass(frozen=True)
class HeatMap:
    """Values of (block, module); `ramp` names the colours, `unit` follows a value in titles."""

    name: str
    cells: Mapping[tuple[int, str], float]
    unit: str
    ramp: str
    digits: str  # format of a value in a title
    logarithmic: bool = False

    @property
    def wide(self) -> bool:
        """Whether it would be too small to read on a phone's screen, if it were made to fit."""
        return self._width(len({block for block, _ in self.cells})) > WIDE

    def _width(self, blocks: int) -> float:
        across = -(-blocks // -(-blocks // _BAND)) if blocks else 0
        left = 8 + _LETTER * max((len(module) for _, module in self.cells), default=0)
        legend = left + 14 * LEVELS + _LETTER * (len(self.unit) + 30)
        return min(WIDTH, max(legend, left + 52.0 * across))

    def draw(self) -> Markup:
        """Modules down, blocks across, in bands of at most 24 blocks, with a legend."""
        blocks = sorted({block for block, _ in self.cells})
        modules = list(dict.fromkeys(module for _, module in self.cells))
        found = dict(
            zip(self.cells, levels(list(self.cells.values()), self.logarithmic), strict=True)
        )
        bands = -(-len(blocks) // _BAND)
        across = -(-len(blocks) // bands)
        left = 8 + _LETTER * max(map(len, modules))
        side = min(52.0, (WIDTH - left) / across)
        parts, top = self._legend(left), 30.0
        for start in range(0, len(blocks), across):
            for column, block in enumerate(blocks[start : start + across]):
                x = left + (column + 0.5) * side
                parts.append(_write(x, top + 8, block, "middle", "small"))
            top += 12
            for module in modules:
                parts.append(_write(left - 6, top + 13, module, "end"))
                for column, block in enumerate(blocks[start : start + across]):
                    if (block, module) in found:
                        x = left + column * side
                        parts.append(self._cell(x, top, side, block, module, found[block, module]))
                top += 19
            top += 14
        kind = f"heat {self.ramp}{' wide' * self.wide}"
        return _svg(self._width(len(blocks)), top - 8, parts, self.name, kind)

    def _cell(self, x: float, y: float, side: float, block: int, module: str, level: int) -> str:
        value = self.cells[block, module]
        title = f"block {block}, {module}: {value:{self.digits}} {self.unit}"
        shape = f'<rect x="{x:.1f}" y="{y}" width="{side - 1:.1f}" height="18" class="q{level}">'
        cell = f"{shape}<title>{escape(title)}</title></rect>"
        if self.logarithmic:  # exponents do not fit
            return cell
        middle = x + side / 2 - 0.5
        return cell + _write(middle, y + 12.5, f"{value:#.3g}", "middle", f"small on{level}")

    def _legend(self, left: float) -> list[str]:
        values = [v for v in self.cells.values() if v > 0 or not self.logarithmic]
        low, high = (f"{f(values, default=0.0):{self.digits}}" for f in (min, max))
        if low == high:
            return [_write(left, 12, f"{low} {self.unit} everywhere")]
        x = left + 4 + _LETTER * len(low)
        parts = [_write(left, 12, low)]
        for level in range(LEVELS):
            parts.append(
                f'<rect x="{x + 14 * level}" y="3" width="14" height="11" class="q{level}"/>'
            )
        scale = ", logarithmic" if self.logarithmic else ""
        parts.append(_write(x + 14 * LEVELS + 6, 12, f"{high} {self.unit}{scale}"))
        return parts


# --- axes ------------------------------------------------------------------------------------


def ticks(low: float, high: float, logarithmic: bool = False, most: int = 7) -> list[float]:
    """Round values within [low, high]: at most `most` steps of 1, 2 or 5; powers of ten in logs."""
    if logarithmic:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        stride = max(1, -(-(last - first + 1) // most))
        powers = [10.0**e for e in range(first, last + 1, stride)]
        if len(powers) > 2:
            return powers
        between = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 3, 5)]
        return [v for v in between if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= most)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Mark:
    """A point of a chart; `kind` picks its shape and colour."""

    x: float
    y: float
    kind: int
    title: str


_SHAPES = [  # paths around the origin, within 6 units
    "M0-7L2-2.2 7-2 3 1.2 4.4 6.2 0 3.3-4.4 6.2-3 1.2-7-2-2-2.2Z",  # star
    "M-4.5-4.5h9v9h-9Z",
    "M0-5.5L5.5 4.5h-11Z",
    "M0 5.5L5.5-4.5h-11Z",
    "M0-6L6 0 0 6-6 0Z",
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z",
]
KINDS = len(_SHAPES)


def plan_kind(name: str) -> int:
    """The kind of point that a plan of that name always is."""
    return _PLANS.get(name, KINDS - 1)


def _shape(kind: int, x: float, y: float, title: str = "") -> str:
    """A point's shape around (x, y)."""
    number = kind % KINDS
    told = f"<title>{escape(title)}</title>" if title else ""
    place = f"translate({x:.1f} {y:.1f})"
    return f'<path transform="{place}" d="{_SHAPES[number]}" class="c{number}">{told}</path>'


def symbol(kind: int, size: float = 16) -> Markup:
    """A point's shape alone, for the table that explains a chart."""
    path = f'<path d="{_SHAPES[kind % KINDS]}" class="c{kind % KINDS}"/>'
    return Markup(
        f'<svg viewBox="-8 -8 16 16" width="{size}" height="{size}" aria-hidden="true">{path}</svg>'
    )


@dataclass(frozen=True)
class Plot:
    """Points, and a line through points, over axes; y is logarithmic, x if asked for.

    `legend` has the names of kinds of points, and is drawn in the upper right corner.
    """

    name: str
    x_name: str
    y_name: str
    marks: Sequence[Mark] = ()
    line: Sequence[tuple[float, float]] = ()
    diagonal: bool = False  # a dashed line y = x, and equal axes
    log_x: bool = False
    dots: bool = False  # at the points of the line
    legend: Sequence[tuple[int, str]] = ()
    width: float = 580
    height: float = 330

    def draw(self) -> Markup:
        """Everything must be above 0 on a logarithmic axis."""
        x0, x1, y0, y1 = self._limits()
        left, right, top, bottom = 62.0, self.width - 12, 24.0, self.height - 40

        def across(x: float) -> float:
            f = math.log if self.log_x else float
            return left + (f(x) - f(x0)) / (f(x1) - f(x0)) * (right - left)

        def up(y: float) -> float:
            share = (math.log(y) - math.log(y0)) / (math.log(y1) - math.log(y0))
            return bottom - share * (bottom - top)

        parts = [_write(left, 12, self.y_name, "start", "axis")]
        parts.append(_write((left + right) / 2, self.height - 6, self.x_name, "middle", "axis"))
        for y in ticks(y0, y1, logarithmic=True):
            parts.append(_line(left, up(y), right, up(y), "grid"))
            parts.append(_write(left - 6, up(y) + 3.5, f"{y:g}", "end"))
        for x in ticks(x0, x1, self.log_x):
            parts.append(_line(across(x), top, across(x), bottom, "grid"))
            parts.append(_write(across(x), bottom + 15, f"{x:.6g}", "middle"))
        if self.diagonal:
            parts.append(_line(across(x0), up(x0), across(x1), up(x1), "dashed"))
        if self.line:
            path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in self.line)
            parts.append(f'<polyline points="{path}" class="curve"/>')
        if self.dots:
            parts += [
                f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" class="c5"/>'
                for x, y in self.line
            ]
        parts += [_shape(m.kind, across(m.x), up(m.y), m.title) for m in self.marks]
        parts += self._draw_legend(right, top)
        return _svg(self.width, self.height, parts, self.name, "plot")

    def _draw_legend(self, right: float, top: float) -> list[str]:
        left = right - 24 - _LETTER * max((len(name) for _, name in self.legend), default=0)
        parts = []
        for row, (kind, name) in enumerate(self.legend):
            y = top + 14 + 18 * row
            parts += [_shape(kind, left, y), _write(left + 12, y + 4, name)]
        return parts

    def _limits(self) -> tuple[float, float, float, float]:
        xs = [m.x for m in self.marks] + [x for x, _ in self.line] or [1.0]
        ys = [m.y for m in self.marks] + [y for _, y in self.line] or [1.0]
        if self.diagonal:
            xs = ys = xs + ys
        (x0, x1), (y0, y1) = ((min(v), max(v)) for v in (xs, ys))
        y0, y1 = y0 / 1.25, y1 * 1.25
        if self.diagonal:
            return y0, y1, y0, y1
        if self.log_x:
            return x0 / 1.25, x1 * 1.25, y0, y1
        pad = 0.03 * (x1 - x0) or 0.5
        return x0 - pad, x1 + pad, y0, y1


def interval(low: float, value: float, high: float, least: float, most: float) -> Markup:
    """A value with its interval on an axis from `least` to `most`, 0 marked."""
    width, height = 170.0, 18.0
    span = (most - least) or 1.0

    def across(v: float) -> float:
        return 6 + (v - least) / span * (width - 12)

    parts = []
    if least <= 0 <= most:
        parts.append(_line(across(0), 0, across(0), height, "dashed"))
    parts.append(_line(across(low), 9, across(high), 9, "range"))
    parts.append(f'<circle cx="{across(value):.1f}" cy="9" r="4" class="c1"/>')
    label = f"{value:.4g}, between {low:.4g} and {high:.4g}"
    return _svg(width, height, parts, label, "interval")
