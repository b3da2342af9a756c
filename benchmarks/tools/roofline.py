"""The roofline plot of `benchmarks.kernels.cpu`: GFLOP/s over operations per byte of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Simulated layers and the two-step multiplication are far below, and would hide the others.
_LEFT_OUT = ("dequantize", "auto_round")


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Rows of the matmul sections -> a PNG; a line joins what one contender did at several M.

    Says so, and does nothing, without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        print(f"skipped: {path} (matplotlib is not installed)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if not row["contender"].startswith(_LEFT_OUT)]
    figure, axes = pyplot.subplots(figsize=(11, 6), layout="constrained")
    contenders = sorted({row["contender"] for row in rows})
    colors = {
        "own": iter(pyplot.get_cmap("tab20").colors),
        "peer": iter(pyplot.get_cmap("Dark2").colors * 3),
    }
    for name in contenders:
        best: dict[float, float] = {}  # of all shapes, at each intensity
        for row in rows:
            if row["contender"] == name:
                at = round(row["gflop_per_s"] / row["gb_per_s"], 1)
                best[at] = max(best.get(at, 0.0), row["gflop_per_s"])
        own = name.startswith("mixbits")
        style = {"marker": "o", "linestyle": "-"} if own else {"marker": "x", "linestyle": ":"}
        color = next(colors["own" if own else "peer"])
        axes.plot(*zip(*sorted(best.items()), strict=True), label=name, color=color, **style)
    slope = sorted(row["read_gb_per_s"] for row in rows)[len(rows) // 2]
    top = max(row["gflop_per_s"] for row in rows)
    axes.plot([0.4, top / slope, 4000], [0.4 * slope, top, top], color="0.7", zorder=0)
    axes.annotate(f"reading, {slope:.0f} GB/s", (0.45, 0.6 * slope), color="0.4", rotation=40)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", ylabel="GFLOP/s")
    axes.set_title(title, fontsize=8)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
