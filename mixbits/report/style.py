"""How reports look: the template and style sheets in `templates`, put into page, file or cell."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ..errors import printable
from .charts import Plot

_TITLE = 24  # height of the line above a chart in a file of its own
_CHARTS = "chart.css", "heat.css", "dark.css"


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(_read)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)


def _read(name: str) -> str:
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def render(name: str, **values: Any) -> str:
    """A template with values, which are escaped; half an emoji, which no file can hold, is `?`."""
    return encodable(_environment().get_template(name).render(values)) + "\n"


def encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def of_page() -> Markup:
    return Markup("".join(map(_read, (*_CHARTS, "page.css"))))


def fragment(*parts: Markup | str) -> str:
    """HTML that brings its style: for a cell of a notebook, or any page."""
    style, body = Markup("".join(map(_read, _CHARTS))), Markup("").join(parts)
    return encodable(Markup('<div class="mixbits"><style>{}</style>{}</div>').format(style, body))


def svg_file(plot: Plot, title: str) -> str:
    """A chart under a title as a file of its own, in light colours.

    Programs that are no browser know no variables in style sheets, so that none are left.
    """
    height = plot.height + _TITLE
    return encodable(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mixbits" width="{plot.width:g}" '
        f'height="{height:g}" viewBox="0 0 {plot.width:g} {height:g}">\n'
        f"<style>{_without_variables(_read('chart.css'))}</style>\n"
        f'<rect width="100%" height="100%" style="fill: {_variables()["--page"]}"/>\n'
        f'<text class="title" x="{plot.width / 2:g}" y="17" text-anchor="middle">'
        f"{escape(printable(title))}</text>\n"
        f'<g transform="translate(0 {_TITLE})">{plot.draw()}</g>\n</svg>\n'
    )


def _variables() -> dict[str, str]:
    """Of the style sheet's first rule: the light colours."""
    first = _read("chart.css").partition("}")[0]
    return dict(re.findall(r"(--\w+): ([^;]+);", first))


def _without_variables(css: str) -> str:
    known = _variables()
    return re.sub(r"var\((--\w+)\)", lambda m: known.get(m[1], m[0]), css)
