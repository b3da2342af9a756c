"""What a run took, and on what: stages with their seconds and peak memory, versions and machine."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import printable
from ..progress import Progress, duration, say


def _reset_peak() -> None:
    """Let the kernel's peak-memory counter start again (Linux; harmless elsewhere)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_memory() -> int:
    """Largest resident size in bytes since `_reset_peak`, mapped weight files included."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Clock:
    """Names, seconds and peak memory of the stages, printed as they go: a table of contents.

    `progress` is the whole run's, and is told which stage it is in.
    """

    names: Sequence[str]
    progress: Progress = field(default_factory=lambda: Progress({}))
    rows: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def run(self, name: str, what: str) -> Iterator[None]:
        """Time what runs within, and print its name, `what` it works on, and its duration."""
        number = self.names.index(name) + 1
        say(f"[{number}/{len(self.names)}] {name:<12} {printable(what)}")
        _reset_peak()
        start = time.perf_counter()
        with self.progress.stage(name):
            yield
        seconds = time.perf_counter() - start
        say(f"      {duration(seconds)}")
        row = {"stage": name, "seconds": round(seconds, 2), "peak_memory_bytes": _peak_memory()}
        if torch.cuda.is_available():
            row["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.rows.append(row)


def environment() -> dict[str, Any]:
    """Versions, machine, and backends: what a figure was measured with."""
    import transformers

    from .. import __version__, ops

    return {
        "mixbits": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backends": [name for name, why in ops.backends().items() if why is None],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
