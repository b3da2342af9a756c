"""What the benchmarks share: the machine, the yardsticks, and medians of interleaved contenders."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mixbits.backends import cpu
from mixbits.report.clock import environment


def machine() -> str:
    """The machine and its setting in one line, for the head of a table."""
    model = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (li.split(":")[1].strip() for li in lines if li.startswith("model name")), model
        )
    about = environment()
    waiting = os.environ.get("OMP_WAIT_POLICY", "default")
    return (
        f"{model}, {about['cpus']} cores, {about['threads']} threads, OMP_WAIT_POLICY={waiting}, "
        f"torch {about['torch']}, mixbits {about['mixbits']} ({cpu.isa()})"
    )


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, so that results lie in pages that were touched before.

    A result of many megabytes gets fresh pages at every call otherwise, and on a virtual machine
    these may cost several times what any kernel takes to fill them.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped apart
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile: 50 is the median."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


class Yardstick:
    """Reading or copying an array far larger than any cache, with torch's number of threads."""

    def __init__(self, name: str, size: int, run: Callable[[], object]) -> None:
        self.name, self.bytes, self._run = name, size, run

    def __call__(self, number: int) -> None:
        self._run()


_LARGE = 256 << 20  # bytes


def read_bandwidth() -> Yardstick:
    """Reads each byte once."""
    data = torch.ones(_LARGE // 8, dtype=torch.int64)
    return Yardstick("read", data.nbytes, lambda: cpu.sum_words(data))


def copy_bandwidth() -> Yardstick:
    """memcpy: its bytes are those read and those written."""
    data = torch.ones(_LARGE // 8, dtype=torch.int64)
    target = torch.empty_like(data)
    return Yardstick("copy", 2 * data.nbytes, lambda: target.copy_(data))


_BURST = 5  # counted calls of a turn
_WARM = 0.05  # seconds of calls before them
_ENOUGH = 3.0  # seconds of a contender


def interleave(
    contenders: Mapping[str, Callable[[int], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    enough: float = _ENOUGH,
) -> dict[str, list[float]]:
    """Seconds of every counted call; `rounds` of them at most for each contender.

    Contenders take turns, so that what disturbs one disturbs all. A turn is a burst of calls, as
    in real use, whose beginning is not counted: threads that wake up share a core until the
    scheduler has spread them, and a core that slept does not reach memory at full speed at once.
    Each call gets its own number. `clock` gives seconds; a contender that has taken `enough` of
    them sits the rest out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    numbers = dict.fromkeys(contenders, 0)
    for _ in range(-(-rounds // _BURST)):
        for name, run in contenders.items():
            warm, counted = clock() + _WARM, 0
            while counted < _BURST and sum(seconds[name]) < enough:
                start = clock()
                run(numbers[name])
                numbers[name] += 1
                if start >= warm:
                    seconds[name].append(clock() - start)
                    counted += 1
    return seconds


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows with four digits, each with the machine."""
    about = machine()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*keys, "machine"], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**short, "machine": about})
