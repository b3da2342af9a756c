"""Seconds and peak memory of a stretch of code in this process (Linux)."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


def status_bytes(field: str) -> int:
    """A field of /proc/self/status: VmHWM, VmRSS, RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this benchmark needs Linux: /proc/self/status has no {field}")


@dataclass
class Meter:
    """`with Meter() as meter:` fills the fields in; they add up over several uses.

    cpu_seconds     of all threads: what a machine that is busy otherwise disturbs least
    peak_rss        largest resident size, mapped files and libraries included
    peak_anonymous  largest anonymous memory beyond what the process held at the start, so without
                    imports, the open model and mapped weights; sampled every 5 ms
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss: int = 0
    peak_anonymous: int = 0

    def __enter__(self) -> Meter:
        self._base = status_bytes("RssAnon")
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        self._watcher.start()
        self._start = time.perf_counter(), time.process_time()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            anonymous = status_bytes("RssAnon") - self._base
            self.peak_anonymous = max(self.peak_anonymous, anonymous)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]
        self._done.set()
        self._watcher.join()
        self.peak_rss = max(self.peak_rss, status_bytes("VmHWM"))

    def describe(self, prefix: str) -> dict[str, float]:
        """Columns of a CSV: seconds, and memory in MB (decimal)."""
        return {
            f"{prefix}_seconds": round(self.seconds, 3),
            f"{prefix}_cpu_seconds": round(self.cpu_seconds, 3),
            f"{prefix}_peak_rss_mb": round(self.peak_rss / 1e6, 1),
            f"{prefix}_peak_anonymous_mb": round(self.peak_anonymous / 1e6, 1),
        }
