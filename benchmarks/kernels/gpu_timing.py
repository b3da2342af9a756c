"""Timing on a GPU: CUDA graphs, a budget of seconds, and rows that are written as they come.

Everything also runs on a CPU, without graphs, so that it can be tried where there is no GPU.
"""

from __future__ import annotations

import csv
import datetime
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.tools.timing import percentile
from mixbits import __version__

Case = TypeVar("Case")
Call = Callable[[int], object]
WARM_UP = 3  # calls before a capture: kernels are compiled, workspaces allocated


class Budget:
    """Seconds that a benchmark may take, from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def take(self, cases: Sequence[Case]) -> Iterator[Case]:
        """The cases, until the next would probably not end in time: one as long as the longest."""
        longest = 0.0
        for done, case in enumerate(cases):
            if self.left() <= longest:
                print(f"out of time: {len(cases) - done} of {len(cases)} cases left out")
                return
            start = self._clock()
            yield case
            longest = max(longest, self._clock() - start)


class AppendedRows:
    """A CSV file that holds each row as soon as it is known."""

    def __init__(self, path: Path | None, columns: Sequence[str], about: Mapping[str, str]) -> None:
        self.path, self.columns, self.about = path, [*columns, *about], dict(about)
        self.rows: list[dict[str, Any]] = []
        if path is not None and not (path.exists() and path.stat().st_size):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(dict(zip(self.columns, self.columns, strict=True)))

    def append(self, row: Mapping[str, Any]) -> None:
        unknown = set(row) - set(self.columns)
        assert not unknown, unknown
        self.rows.append(dict(row))
        short = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
        self._write({**short, **self.about})

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def about(device: torch.device) -> dict[str, str]:
    """What a row must say of its origin. MIXBITS_COMMIT helps where git is not there to ask."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    is_cuda = device.type == "cuda"
    commit = _output("git", "describe", "--always", "--dirty", "--exclude", "*")
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton_version,
        "mixbits": __version__,
        "commit": os.environ.get("MIXBITS_COMMIT") or commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


class Timer:
    """Calls 0 .. count - 1 of one contender, one after the other; a CUDA graph where possible."""

    def __init__(self, call: Call, count: int, device: torch.device) -> None:
        self.count, self.device, self.note = count, device, ""
        self._run: Callable[[], object] = lambda: [call(i) for i in range(count)]
        for i in range(WARM_UP):
            call(i % count)
        if device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run()
        except RuntimeError as error:
            self.note = f"no CUDA graph: {str(error).splitlines()[0][:80]}"
            torch.cuda.synchronize(self.device)
            return
        self._graph = graph  # its memory must live as long as its replays
        self._run = graph.replay
        self._run()

    def sample(self) -> float:
        """Seconds per call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            self._run()
            return (time.perf_counter() - start) / self.count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / self.count


def interleaved(timers: Mapping[str, Timer], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each timer, `rounds` times, in turns: what disturbs one disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.sample())
    return seconds


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in microseconds."""
    names = {"us": 50, "us_p20": 20, "us_p80": 80}
    return {name: 1e6 * percentile(seconds, percent) for name, percent in names.items()}


def yardsticks(device: torch.device, size: int) -> dict[str, tuple[Call, int]]:
    """Reading and copying `size` bytes: name -> (call, bytes moved)."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return {
        "read": (lambda _: source.sum(), size),
        "copy": (lambda _: target.copy_(source), 2 * size),
    }


def bandwidths(device: torch.device, rounds: int, size: int = 1 << 30) -> dict[str, float]:
    """Bytes per second of reading and copying, with arrays far larger than the cache."""
    calls = yardsticks(device, size)
    timers = {name: Timer(call, 4, device) for name, (call, _) in calls.items()}
    seconds = interleaved(timers, rounds)
    return {name: calls[name][1] / percentile(seconds[name], 50) for name in calls}
