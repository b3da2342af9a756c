"""What every budget buys, beside the baselines: `python -m benchmarks.quality.frontier DIR`.

    python -m benchmarks.quality.frontier mixbits-demo --svg docs/allocation.svg

DIR holds the scores.json and plan.json of `python -m mixbits.quantize`; no model is read. Every
linear is an item of its own, as without --fuse and --granularity slab. The drawing has the
frontier with the plan of DIR on it, and the head-first, tail-first and uniform plans of the same
budgets.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mixbits.formats.schemes import Scheme, parse_scheme
from mixbits.measuring.scores import read_json
from mixbits.planning.allocate import Item, allocate
from mixbits.planning.curve import frontier

POINTS = 65
# Line, marker and colour (Okabe and Ito's) of each baseline, so that they differ without colour.
STYLES = {"uniform": ("-", "#009e73"), "head": ("--", "#cc79a7"), "tail": (":", "#e69f00")}


def make_items(linears: dict[str, Any], schemes: dict[str, Scheme]) -> list[Item]:
    """One item for each linear of scores.json, in the model's order; costs in bits."""
    return [
        Item(
            name,
            tuple(scheme.storage_bits(*entry["shape"]) for scheme in schemes.values()),
            tuple(entry["scores"][scheme] for scheme in schemes),
        )
        for name, entry in linears.items()
    ]


def chosen(plan: dict[str, Any], items: list[Item], schemes: list[str]) -> tuple[int, float]:
    """Cost in bits and predicted loss of a plan with one scheme for a linear."""
    scheme_of = {name: unit["scheme"] for unit in plan["units"] for name in unit["linears"]}
    options = [schemes.index(scheme_of[item.name]) for item in items]
    pairs = list(zip(items, options, strict=True))
    return sum(i.costs[o] for i, o in pairs), sum(i.losses[o] for i, o in pairs)


def draw(items: list[Item], plan: tuple[int, float], weights: int, method: str, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib") from None

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mixbits"})
    from matplotlib import pyplot, ticker

    points = frontier(items, POINTS)
    best = [point.allocation for point in points]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(
        [a.cost / weights for a in best], [a.loss for a in best], color="#0072b2", label="optimal"
    )
    for name, (line, color) in STYLES.items():
        plans = [allocate(items, point.budget, name) for point in points]
        costs = [point.budget / weights for point in points]
        step = "steps-post" if name == "uniform" else "default"
        losses = [a.loss for a in plans]
        axes.plot(costs, losses, line, color=color, drawstyle=step, label=name)
    axes.plot(plan[0] / weights, plan[1], "*", color="#d55e00", markersize=13, label="plan.json")
    axes.set(yscale="log", ylabel=f"predicted loss, nats per token ({method})")
    axes.set_xlabel("bits per weight, everything counted")
    axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(color="0.9", which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.frontier")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--svg", type=Path, default=Path("allocation.svg"))
    args = parser.parse_args()
    scores = read_json(args.folder / "scores.json", "mixbits_scores")
    plan = read_json(args.folder / "plan.json", "mixbits_plan")
    names = list(next(iter(scores["linears"].values()))["scores"])
    items = make_items(scores["linears"], {name: parse_scheme(name) for name in names})
    weights = sum(
        rows * columns for rows, columns in (e["shape"] for e in scores["linears"].values())
    )
    draw(items, chosen(plan, items, names), weights, scores["method"], args.svg)


if __name__ == "__main__":
    main()
