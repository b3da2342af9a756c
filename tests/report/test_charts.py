"""Charts: levels and ticks, every value in the picture, nothing outside of it."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from mixbits.report.charts import HeatMap, Mark, Plot, interval, levels, symbol, ticks


def parse(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def test_levels_run_from_the_least_to_the_largest() -> None:
    assert levels([4.25, 8.25, 6.25]) == [0, 8, 4]
    assert levels([1e-9, 1e-7, 1e-5, 0.0], logarithmic=True) == [0, 4, 8, 0]
    assert levels([3.0, 3.0]) == levels([3.0, 3.0], logarithmic=True) == [4, 4]
    assert levels([0.0, 0.0], logarithmic=True) == [0, 0]
    assert levels([]) == []


@pytest.mark.parametrize(
    ("low", "high", "logarithmic", "expected"),
    [
        (4.1, 8.3, False, [5, 6, 7, 8]),
        (0.0, 1.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (4.25, 4.25, False, [4.25]),
        (1e-5, 0.2, True, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
        (0.9, 4.0, True, [1, 2, 3]),
        (1e-20, 1.0, True, [1e-20, 1e-17, 1e-14, 1e-11, 1e-8, 1e-5, 1e-2]),
    ],
)
def test_ticks_are_round_and_few(
    low: float, high: float, logarithmic: bool, expected: list[float]
) -> None:
    assert ticks(low, high, logarithmic) == pytest.approx(expected)


@pytest.mark.parametrize("blocks", [1, 2, 24, 25, 80, 200])
def test_a_heat_map_shows_every_cell_once_and_inside(blocks: int) -> None:
    cells = {(b, m): 4.25 + (b % 5) for b in range(blocks) for m in ("q_proj", "experts.up_proj")}
    del cells[blocks - 1, "q_proj"]
    svg = parse(HeatMap("bits", cells, "bits", "blue", ".2f").draw())
    width, height = (float(svg.attrib[k]) for k in ("width", "height"))
    titles = [title.text for title in svg.iter("title")]
    assert sorted(titles) == sorted(
        f"block {b}, {m}: {value:.2f} bits" for (b, m), value in cells.items()
    )
    boxes = []
    for rect in svg.iter("rect"):
        x, y, w, h = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        boxes.append((x, y, w, h))
    for a, b in itertools.combinations(boxes[-60:], 2):
        apart = a[0] + a[2] <= b[0] + 0.1 or b[0] + b[2] <= a[0] + 0.1
        assert apart or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
    if blocks > 1:
        shown = [t.text for t in svg.iter("text") if "small" in t.attrib.get("class", "")]
        assert {"0", str(blocks - 1), "4.25"} <= set(shown)


def test_a_point_lies_where_its_axes_say() -> None:
    marks = [Mark(x, y, 0, f"{x} {y}") for x in (4.0, 6.0, 8.0) for y in (0.01, 0.1, 1.0)]
    svg = parse(Plot("p", "bits", "loss", marks).draw())
    places = {}
    for path in svg.iter("path"):
        match = re.fullmatch(r"translate\((\S+) (\S+)\)", path.attrib["transform"])
        assert match
        places[path[0].text] = float(match[1]), float(match[2])
    # Linear across, logarithmic up: the middles lie in the middle.
    assert places["6.0 0.1"] == pytest.approx(
        [(a + b) / 2 for a, b in zip(places["4.0 0.01"], places["8.0 1.0"], strict=True)], abs=0.2
    )
    assert places["4.0 1.0"][1] < places["4.0 0.01"][1]
    labels = {t.text: float(t.attrib["x"]) for t in svg.iter("text")}
    assert labels["6"] == pytest.approx(places["6.0 0.1"][0], abs=0.2)


@pytest.mark.parametrize(
    "plot",
    [
        Plot("one", "x", "y", [Mark(4.25, 0.5, 7, "alone")]),
        Plot("line", "x", "y", line=[(4.0, 1.0), (8.0, 1e-3)]),
        Plot("equal", "x", "y", [Mark(1e-9, 3.0, 1, "a")], diagonal=True, log_x=True),
        Plot("log", "x", "y", [Mark(1e-3, 1.0, 1, "a"), Mark(1.0, 1.0, 1, "b")], log_x=True),
    ],
    ids=lambda plot: plot.name,
)
def test_plots_of_little_stay_inside(plot: Plot) -> None:
    drawn = plot.draw()
    assert not re.search(r"nan|inf", drawn)
    for path in parse(drawn).iter("path"):
        x, y = map(float, re.findall(r"-?[\d.]+", path.attrib["transform"]))
        assert 0 <= x <= plot.width and 0 <= y <= plot.height


def test_an_interval_covers_its_ends() -> None:
    svg = parse(interval(-0.5, 0.25, 1.0, -1.0, 2.0))
    zero, span = list(svg.iter("line"))
    circle = svg.find("circle")
    assert circle is not None
    ends = float(span.attrib["x1"]), float(span.attrib["x2"])
    assert ends[0] < float(zero.attrib["x1"]) < float(circle.attrib["cx"]) < ends[1]
    assert math.isclose(sum(ends) / 2, float(circle.attrib["cx"]), abs_tol=0.1)
    assert "0.25, between -0.5 and 1" in svg.attrib["aria-label"]
    assert parse(interval(0, 0, 0, 0, 0)) is not None


def test_what_is_no_markup_is_escaped() -> None:
    bad = '<script>"&'
    for chart in (
        HeatMap(bad, {(0, bad): 1.0}, bad, "blue", ".2f").draw(),
        Plot(bad, bad, bad, [Mark(1, 1, 0, bad)]).draw(),
    ):
        assert "<script" not in chart
        assert bad in "".join(parse(chart).itertext())
    assert parse(symbol(3)).find("path") is not None
