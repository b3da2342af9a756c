"""A CSV of figures that grows row by row, so that a benchmark can be stopped and run again."""

from __future__ import annotations

import csv
import datetime
import functools
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "auto-round", "lm-eval")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


@functools.cache
def provenance() -> dict[str, str]:
    """Date, commit, machine and versions: what a figure was measured with."""
    from mixbits.report.clock import environment

    where = environment()
    run = functools.partial(subprocess.run, capture_output=True, text=True)
    commit = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    code = [".", ":!benchmarks/results"]  # the file that is being written is no code
    if run(["git", "status", "--porcelain", "--untracked-files=no", *code]).stdout:
        commit += "-dirty"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": where["gpu"] or f"{_cpu_name()}, {where['cpus']} cores",
        **{name: _version(name) for name in PACKAGES},
    }


class Records:
    """Rows of one CSV with fixed `columns`; `key` are the columns that name a row."""

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str]) -> None:
        self.path, self.key = path, tuple(key)
        self.columns = [*columns, *provenance()]
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if reader.fieldnames != self.columns:
                    raise SystemExit(
                        f"{path} must have the columns {self.columns}: got {reader.fieldnames}"
                    )
                self.rows = list(reader)

    def find(self, **values: Any) -> dict[str, str] | None:
        """The row whose key columns have these values; the last one if there are several."""
        if set(values) != set(self.key):
            raise ValueError(f"a row is named by {self.key}: got {tuple(values)}")
        wanted = {name: str(value) for name, value in values.items()}
        found = [r for r in self.rows if all(r[k] == v for k, v in wanted.items())]
        return found[-1] if found else None

    def append(self, row: dict[str, Any]) -> dict[str, str]:
        """Write one row at once; columns that it lacks stay empty."""
        full = {**dict.fromkeys(self.columns, ""), **row, **provenance()}
        unknown = set(full) - set(self.columns)
        if unknown:
            raise ValueError(f"{self.path} has no columns {sorted(unknown)}")
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(full)
        self.rows.append({name: str(value) for name, value in full.items()})
        return self.rows[-1]
