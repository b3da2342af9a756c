"""Files and cells: the frontier as an SVG file, plans and frontiers as HTML that needs no page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from test_html import Page

from mixbits.errors import UsageError
from mixbits.planning.allocate import Allocation, Item
from mixbits.planning.curve import frontier, rows
from mixbits.report import frontier as drawing
from mixbits.report.notebook import bits_map, frontier_chart
from mixbits.report.report import Baseline
from mixbits.report.style import svg_file

THREE = [
    Item("a", (4, 8, 16), (9.0, 3.0, 0.0)),
    Item("b", (4, 8, 16), (5.0, 0.5, 0.0)),
    Item("c", (8,), (1.0,)),
]
MODES = {"weight_scale_mode": "rceil", "act_scale_mode": "rceil"}


def describe(plan: Allocation) -> dict[str, Any]:
    return {"avg_bits": plan.cost / 3}


def plan_of(*units: dict[str, Any]) -> dict[str, Any]:
    named = [{**u, "linears": dict.fromkeys(u["linears"], "all")} for u in units]
    return {"mixbits_plan": 1, **MODES, "slab_columns": 128, "units": named}


def check_alone(fragment: str) -> str:
    """Nothing is loaded, nothing runs, and no rule reaches what is outside."""
    page = Page(fragment)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not any(name in ("src", "href") or name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"https?:|url\(|@import", fragment)
    style = re.sub(r"/\*.*?\*/", "", fragment.split("<style>")[1].split("</style>")[0], flags=re.S)
    selectors = re.findall(r"([^{}]+)\{", style)
    assert selectors
    for selector in ",".join(selectors).split(","):
        assert selector.strip().startswith((".mixbits", "@media")), selector
    return page.text


def test_the_style_and_the_template_are_in_the_package() -> None:
    folder = resources.files("mixbits.report") / "templates"
    names = {"report.html", "chart.css", "heat.css", "dark.css", "page.css"}
    assert {entry.name for entry in folder.iterdir()} == names
    setup = Path(__file__).parents[2] / "setup.py"
    if setup.is_file():
        assert '"mixbits.report": ["templates/*"]' in setup.read_text(encoding="utf-8")


def test_a_plan_as_a_map() -> None:
    plan = plan_of(
        {"unit": "u", "scheme": "MXFP4", "linears": ["model.layers.0.mlp.up_proj"]},
        {"unit": "v", "slabs": {"MXFP8": "0-1,5", "MXFP4": "2-4"},
         "linears": ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"]},
        {"unit": "w", "scheme": "BF16", "linears": ["lm_head"]},
    )  # fmt: skip
    text = check_alone(bits_map(plan))
    for cell in ("block 0, up_proj: 4.25 bits", "block 1, gate_proj: 6.25 bits"):
        assert cell in text
    assert "Outside the blocks: lm_head 16.00." in text


@pytest.mark.parametrize(
    ("unit", "part"),
    [
        ({"scheme": "MXFP5"}, "MXFP5"),
        ({}, "must have either a scheme or slabs"),
        ({"slabs": {"MXFP4": "0-999999999"}}, "slabs must hold"),
    ],
)
def test_what_is_no_plan_is_refused(unit: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        bits_map(plan_of({"unit": "u", "linears": ["a.0.b"], **unit}))


def test_names_in_a_plan_are_text() -> None:
    bad = "model.layers.0.<script>alert('&')</script>"
    plan = plan_of({"unit": "u", "scheme": "MXFP4", "linears": [bad, "<b>"]})
    fragment = bits_map(plan)
    assert "<script" not in fragment and "<b>" not in fragment
    assert "<script>alert" in check_alone(fragment)


@pytest.mark.parametrize("described", [None, describe])
def test_a_frontier_as_a_chart(described: Any) -> None:
    table = rows(frontier(THREE), described)
    fragment = frontier_chart(table)
    text = check_alone(fragment)
    assert ("bits per weight" in text) == (described is not None) and "frontier" in text
    points = re.search(r'<polyline points="([^"]+)"', fragment)
    drawn = [row for row in table if row["predicted_loss"] > 0]
    assert points and len(points[1].split()) == len(drawn) == fragment.count("<circle")
    assert check_alone(frontier_chart([])) is not None


@pytest.mark.parametrize("described", [None, describe])
def test_the_frontier_is_a_file_that_anything_can_show(described: Any) -> None:
    """No variables, which browsers alone know; what has no place on the axes is left out."""
    plans = [
        Baseline(name="this plan", avg_bits=7.0, predicted_loss=4.0),
        Baseline(name="perfect", avg_bits=9.0, predicted_loss=0.0),
    ]
    table = rows(frontier(THREE), described)
    file = svg_file(drawing.of_rows(table, plans, loss_name="loss (fisher)"), "three <items>\x1b")
    picture = ElementTree.fromstring(file)
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(picture.attrib["width"]) >= 500
    told = [text.strip() for text in picture.itertext()]
    assert {"three <items>\ufffd", "this plan", "frontier", "loss (fisher)"} <= set(told)
    assert "perfect" not in told and "var(" not in file and file.count("http") == 1
    assert svg_file(drawing.of_rows([]), "nothing") != file
