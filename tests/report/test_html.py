"""report.html: every figure is really in it, nothing is loaded, nothing is let through."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import pytest

from mixbits.planning import curve, stability
from mixbits.planning.allocate import Item, allocate
from mixbits.report import charts, frontier, html
from mixbits.report.report import Baseline, Report
from mixbits.report.style import svg_file

VOID = {"meta", "br", "hr", "img", "link"}


def render(report: dict[str, Any], *others: Any) -> str:
    return html.render(Report.of(report), *others)


class Page(HTMLParser):
    """Text per section, attributes, and whether every tag that opens is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("\n".join(self.words).split())


def linear_names(blocks: int, experts: int = 0) -> list[str]:
    names = []
    for block in range(blocks):
        names += [f"model.layers.{block}.self_attn.{p}_proj" for p in "qkvo"]
        if experts:
            names += [
                f"model.layers.{block}.mlp.experts.{e}.{p}_proj"
                for e in range(experts)
                for p in ("gate", "up", "down")
            ]
        else:
            names += [f"model.layers.{block}.mlp.{p}_proj" for p in ("gate", "up", "down")]
    return [*names, "lm_head"]


def evaluated() -> dict[str, Any]:
    """What a report says of a made-up model's quality."""
    held_out = {"source": "text.txt", "kl": 0.04321, "kl_stderr": 0.0012, "perplexity": 7.2134,
                "perplexity_stderr": 0.081, "perplexity_reference": 7.0115,
                "perplexity_reference_stderr": 0.07, "top1_agreement": 0.9317,
                "top1_agreement_stderr": None}  # fmt: skip
    return {
        "held_out": held_out,
        "verdict": {"word": "good", "border": "fair", "advice": "Take <more> text.",
                    "sentence": "Good, at the border of fair: perplexity is 1.029 times 5 %."},
        "prompt": "def f(", "sample": "def f(x):\n    return <x>",
        "tasks": {"tasks": {"lambada": {"acc": 0.7412, "acc_stderr": 0.0061}}, "average": 0.7},
        "original_tasks": {"tasks": {"lambada": {"acc": 0.7655}}, "average": 0.7655},
    }  # fmt: skip


def swapped(names: list[str], items: list[Item], choice: Sequence[int]) -> dict[str, Any]:
    """The next upgrades and downgrades of a plan."""
    return {
        key: [
            {"unit": names[s.item], "before": "MXFP4", "after": "MXFP8", "bits": s.bits,
             "loss": s.loss}
            for s in stability.next_swaps(items, choice, key == "upgrades")
        ]
        for key in ("upgrades", "downgrades")
    }  # fmt: skip


def made_up(blocks: int = 4, experts: int = 0) -> tuple[dict[str, Any], ...]:
    """A report, a plan and scores, as `quantize` would write them."""
    names = linear_names(blocks, experts)
    losses = [(1 + 7 * i % 13) * 1e-4 for i in range(len(names))]
    items = [Item(n, (4250, 8250), (x, x / 50)) for n, x in zip(names, losses, strict=True)]
    weights = 1000 * len(names)
    plan = allocate(items, 5 * weights)
    rows = curve.rows(curve.frontier(items, 9), lambda p: {"avg_bits": p.cost / weights})
    report = {
        "command": "python -m mixbits.quantize ./tiny --avg-bits 5",
        "environment": {"mixbits": "0.1.0", "torch": "2.13.0", "gpu": None, "backends": ["cpu"]},
        "source": {"name": "./models/tiny-llama", "sha256": "0123456789abcdef" * 4},
        "calibration": {"dataset": "text.txt", "nsamples": 64},
        "budget": {"avg_bits": 5.0},
        "reached": {"avg_bits": 4.9876, "avg_bits_without_scales": 4.7376, "predicted_bytes": 1},
        "predicted_loss": plan.loss,
        "bytes_before": 16_000_000,
        "bytes_after": 5_120_000,
        "evaluation": evaluated(),
        "stages": [
            {"stage": "measure", "seconds": 312.44, "peak_memory_bytes": 11_200_000_000},
            {"stage": "write", "seconds": 8.06, "peak_memory_bytes": 9_000_000_000},
        ],
        "linear_bits": {n: (4.25, 8.25)[c] for n, c in zip(names, plan.choice, strict=True)},
        "curve": rows,
        "baselines": [{"name": "tail", "avg_bits": 4.95, "predicted_loss": 0.0123}],
        "measured": [
            {"unit": n, "scheme": "MXFP4", "predicted": x, "measured": x * x}
            for n, x in zip(names, losses, strict=True)
        ],
        "search": {"max_kl": 0.05, "kl": 0.04321, "tolerance": 0.02, "measured": [
            {"avg_bits": 4.9876, "kl": 0.04321}, {"avg_bits": 4.9712, "kl": 0.05123}]},
        "gate": {"candidates": [
            {"name": "slab", "kl": 0.04321},
            {"name": "layer", "kl": 0.05432, "behind": 0.01111, "interval": 0.002},
        ]},
        "stability": {"same_units": 0.953, "same_bits": 0.967, "excess_loss": [0.0041, 0.0063]},
        **swapped(names, items, plan.choice),
    }  # fmt: skip
    plan_data = {"strategy": "optimal", "method": "fisher", "predicted_loss": 0.02,
                 "lower_bound": 0.9 * plan.loss}  # fmt: skip
    scores = {
        "method": "fisher",
        "linears": {
            n: {"shape": [10, 100], "scores": {"MXFP8": x / 50, "MXFP4": x}}
            for n, x in zip(names, losses, strict=True)
        },
    }
    return report, plan_data, scores


def test_every_figure_is_in_the_page() -> None:
    report, plan, scores = made_up()
    page = Page(render(report, plan, scores))
    for figure in (
        *("tiny-llama at 4.99 bits", "5.12 MB", "32% of 16.00 MB", "4.9876", "4.7376"),
        *("0.0432", "± 0.0012", "7.213", "from 7.011", "93.17%"),
        *("0.7412 ± 0.0061", "0.7655", "lambada"),
        *("Outside the blocks: lm_head 4.25", "8.25 bits"),
        *("Predicted loss of MXFP4", "block 1, k_proj: 5.0e-07 nats per weight"),
        *(
            f"All {len(report['curve'])} plans are proven optimal.",
            "tail: 4.9500 bits, predicted loss 0.0123",
        ),
        *("slab chosen", "+0.01111", "+0.00911 to +0.01311"),
        *("KL is at most 0.05", "4.9712 0.05123 no 4.9876 0.04321 yes"),
        *("rank correlation", "1.000"),
        *("95.3%", "96.7%", "+0.41% and +0.63%"),
        *("312.4", "11.20 GB", "320.5"),
        *("python -m mixbits.quantize ./tiny --avg-bits 5", "0123456789abcdef", "nsamples 64"),
        *("strategy", "torch", "2.13.0"),
        *("Good, at the border of fair : perplexity is 1.029 times 5 %.", "Take <more> text."),
        *("Of 2 candidates of this size", "def f( x): return <x>", "± is a standard error"),
        *("predicted loss", f"can have less than {plan['lower_bound']:.4g}"),
        *("With more or fewer bits", "measured on the gate's text 0.0432"),
    ):
        assert figure in page.text, figure


def test_every_linear_has_its_cell() -> None:
    report, plan, scores = made_up()
    text = Page(render(report, plan, scores)).text
    bits = report["linear_bits"]
    assert set(bits.values()) == {4.25, 8.25}
    for name in linear_names(4)[:-1]:
        _, _, block, _, module = name.split(".")
        assert f"block {block}, {module}: {bits[name]:.2f} bits" in text


def test_plans_that_are_not_proven_are_counted() -> None:
    report, *_ = made_up()
    report["curve"][2] |= {"proven": False, "gap": 2e-5}
    count = len(report["curve"])
    text = Page(render(report)).text
    assert f"{count - 1} of {count} plans are proven optimal" in text
    assert "within 2e-05 of the lower bound" in text


def test_swaps_are_listed_with_what_they_save() -> None:
    report, plan, scores = made_up()
    text = Page(render(report, plan, scores)).text
    for key in ("upgrades", "downgrades"):
        for swap in report[key]:
            rate = f"{-swap['loss'] / swap['bits'] * 8e6:#.3g}"
            row = f"{swap['unit']} MXFP4 → MXFP8 500 B {abs(swap['loss']):#.3g} {rate}"
            assert row in text


def test_nothing_is_loaded_and_nothing_runs() -> None:
    source = render(*made_up())
    page = Page(source)
    assert not {"script", "img", "link", "iframe", "object", "image", "use"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "xlink:href", "data", "background", "action"} & names
    assert not any(name.startswith("on") for name in names)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", source)


def test_it_suits_a_phone_the_dark_and_paper() -> None:
    source = render(*made_up())
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in source
    for rule in ("@media print", "prefers-color-scheme: dark", "overflow-x: auto", "columns: 2 "):
        assert rule in source
    page = Page(source)
    assert page.tags.count("table") <= source.count('<div class="scroll"><table')
    assert page.tags.count("h1") == page.tags.count("main") == 1
    used = set(re.findall(r"var\((--\w+)\)", source))
    assert used <= set(re.findall(r"(--\w+):", source))


def poison(data: Any) -> Any:
    """Every string, keys that are names included, with markup in it."""
    bad = '<script>alert("&")</script>\'>'
    if isinstance(data, str):
        return data + bad
    if isinstance(data, list):
        return [poison(v) for v in data]
    if isinstance(data, dict):
        named = any("." in key or key in ("lm_head", "lambada", "MXFP4") for key in data)
        return {(k + bad if named else k): poison(v) for k, v in data.items()}
    return data


def test_everything_is_escaped() -> None:
    source = render(*(poison(part) for part in made_up()))
    page = Page(source)
    assert "script" not in page.tags
    assert page.text.count("<script>alert") > 50
    assert "<script" not in source


@pytest.mark.parametrize(
    ("blocks", "experts", "largest"), [(1, 0, 60_000), (4, 8, 90_000), (200, 0, 800_000)]
)
def test_any_depth_and_experts(blocks: int, experts: int, largest: int) -> None:
    report, plan, scores = made_up(blocks, experts)
    source = render(report, plan, scores)
    page = Page(source)
    assert len(source) < largest
    name = "experts.down_proj" if experts else "down_proj"
    assert f"block {blocks - 1}, {name}: " in page.text
    cells = re.findall(r"block \d+, \S+: \S+ bits", page.text)
    assert len(cells) == len(set(cells)) == 7 * blocks  # experts share a cell


def test_a_cell_of_experts_holds_their_mean() -> None:
    bits = {f"model.layers.0.mlp.experts.{e}.up_proj": b for e, b in enumerate((4.25, 8.25, 8.25))}
    page = Page(render({"linear_bits": bits}))
    assert "block 0, experts.up_proj: 6.92 bits" in page.text
    shapes = {n: {"shape": [s, 10], "scores": {}} for n, s in zip(bits, (2, 1, 1), strict=True)}
    page = Page(render({"linear_bits": bits}, None, {"linears": shapes}))
    assert "block 0, experts.up_proj: 6.25 bits" in page.text


def test_what_is_missing_is_left_out() -> None:
    full = render(*made_up())
    headings = re.findall(r"<h2>(.*?)</h2>", full)
    assert len(headings) == len(set(headings)) == 13
    assert re.findall(r"<h2>(.*?)</h2>", render({})) == ["How it was made"]
    report, plan, scores = made_up()
    for absent in ("evaluation", "stages", "linear_bits", "curve", "measured", "gate", "search",
                   "stability", "environment", "calibration", "budget", "bytes_after"):  # fmt: skip
        Page(render({**report, absent: None}, plan, scores))
        Page(render({k: v for k, v in report.items() if k != absent}, plan, scores))
    assert "Where it hurts" not in render(report, plan)
    assert "Where it hurts" in render(report, plan, scores)


def test_numbers_that_are_none_do_not_break_it() -> None:
    report, plan, scores = made_up()
    report["evaluation"]["held_out"] |= {"kl_stderr": float("nan"), "perplexity": None}
    report["measured"][0]["measured"] = 0.0
    report["measured"][1]["measured"] = float("nan")
    report["gate"]["candidates"][1] |= {"interval": None}
    report["curve"][-1]["predicted_loss"] = 0.0
    for row in scores["linears"].values():
        row["scores"]["MXFP4"] = 0.0
    source = render(report, plan, scores)
    assert not re.search(r"\bnan\b|\binf\b", Page(source).text)
    assert "1 of 28 are not above 0" in Page(source).text
    assert "<b>7.213</b>" not in source


def test_other_budgets_lie_on_the_curve() -> None:
    """At a point of the curve its own loss, and the KL in the proportion that is found here."""
    report, plan, scores = made_up()
    rows = [{"avg_bits": b, "predicted_loss": x, "gap": 0.0, "proven": True}
            for b, x in ((4.25, 0.4), (5.0, 0.2), (6.0, 0.05), (8.25, 0.01))]  # fmt: skip
    report |= {"curve": rows, "predicted_loss": 0.2}
    report["reached"]["avg_bits"] = 5.0
    report["evaluation"]["held_out"]["kl"] = 0.3
    text = Page(render(report, plan, scores)).text
    for row in ("5 0.200 0.3 1.00 x", "6 0.0500 0.075 0.25 x", "5.5 0.100 0.15 0.50 x"):
        assert row in text
    del report["evaluation"]
    assert "5.5 0.100 - 0.50 x" in Page(render(report, plan, scores)).text


def test_a_report_without_a_verdict_has_no_judgement() -> None:
    report, plan, scores = made_up()
    del report["evaluation"]["verdict"]
    source = render(report, plan, scores)
    assert 'class="verdict"' not in source and "No other plan" not in source


def test_numbers_and_their_units_stay_together() -> None:
    source = render(*made_up())
    assert "<b>5.12\u00a0MB</b>" in source and "32% of 16.00\u00a0MB" in source


def test_a_chart_that_is_wider_than_a_phone_says_so() -> None:
    hint = "scroll sideways"
    assert hint not in render({"linear_bits": {"model.layers.0.mlp.up_proj": 4.25}})
    wide = {f"model.layers.{i}.mlp.up_proj": 4.25 + i for i in range(12)}
    assert hint in render({"linear_bits": wide})


def test_plans_have_one_look_on_page_and_picture() -> None:
    report, *others = made_up()
    source = render(report, *others)
    kind = charts.plan_kind("tail")
    color = re.findall(rf"--c{kind}: (#\w+);", source)[0]  # the first: in the light
    plot = frontier.of_rows(report["curve"], [Baseline.of(b) for b in report["baselines"]])
    picture = svg_file(plot, "a title")
    assert f'class="c{kind}"' in source and f'class="c{kind}"' in picture
    assert f".c{kind} {{ fill: {color}; }}" in picture
    kinds = [charts.plan_kind(n) for n in ("this plan", "uniform", "head", "tail", "optimal", "x")]
    assert kinds == list(range(charts.KINDS))


def test_half_an_emoji_does_not_break_it() -> None:
    source = render({"evaluation": {"sample": "so good \ud83d", "prompt": "\udcff"}})
    assert "so good ?" in source and source.encode("utf-8")
