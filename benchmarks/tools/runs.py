"""Run `python -m mixbits.quantize` in a process of its own, and read what it reports."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.autoscheme import FIGURES


def quantize(model: str, out: Path, words: Sequence[str], only: bool = False) -> dict[str, Any]:
    """report.json of a run into `out`; `only` stops at scores and plan.

    Raises RuntimeError with the command and the end of what it printed if it fails.
    """
    command = [sys.executable, "-m", "mixbits.quantize", model, "--out", str(out), *words]
    command += ["--solve-only"] if only else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-800:]}")
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def average_accuracy(tasks: dict[str, dict[str, float]]) -> float | None:
    """Mean acc over tasks, as the published tables have it."""
    values = [metrics["acc"] for metrics in tasks.values() if "acc" in metrics]
    return sum(values) / len(values) if values else None


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row out of report.json."""
    evaluation, reached = report["evaluation"], report["reached"]
    row = {
        "bits": reached["avg_bits"],
        "bits_without_scales": reached["avg_bits_without_scales"],
        "bytes": report["bytes_after"],
        **{k: evaluation["held_out"][k] for k in FIGURES},
    }
    if "tasks" in evaluation:
        row["tasks"] = json.dumps(evaluation["tasks"]["tasks"])
        row["average_acc"] = average_accuracy(evaluation["tasks"]["tasks"])
        row["documents"] = json.dumps(evaluation["tasks"]["documents"])
    return row


def costs(stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Time and memory of measuring and of everything, out of a report's stages."""
    measured = next(s for s in stages if s["stage"] == "measure")
    return {
        "measure_seconds": measured["seconds"],
        "measure_peak_rss_mb": round(measured["peak_memory_bytes"] / 1e6, 1),
        "all_seconds": round(sum(s["seconds"] for s in stages), 2),
        "all_peak_rss_mb": round(max(s["peak_memory_bytes"] for s in stages) / 1e6, 1),
        "stages": json.dumps(stages),
    }
