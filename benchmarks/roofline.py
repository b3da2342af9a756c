"""The roofline plot of `benchmarks.cpu`: GFLOP/s over operations per byte of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Rows of the matmul sections -> a PNG. Says so, and does nothing, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print(f"skipped: {path} (matplotlib is not installed)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    families = sorted({row["contender"] for row in rows})
    for number, name in enumerate(families):
        points = [row for row in rows if row["contender"] == name]
        ours = name.startswith("mixbits")
        axes.plot(
            [row["gflop_per_s"] / row["gb_per_s"] for row in points],
            [row["gflop_per_s"] for row in points],
            linestyle="none",
            marker="o" if ours else "x",
            markersize=6,
            color=pyplot.get_cmap("tab20")(number % 20),
            label=name,
        )
    slope = sorted(row["read_gb_per_s"] for row in rows)[len(rows) // 2]
    top = max(row["gflop_per_s"] for row in rows)
    axes.plot([1, top / slope, 1000], [slope, top, top], color="0.6", zorder=0)
    axes.annotate(f"{slope:.0f} GB/s", (1.1, 1.2 * slope), color="0.4")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", ylabel="GFLOP/s")
    axes.set_title(title, fontsize=7)
    axes.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=150)
