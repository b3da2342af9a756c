"""What was asked of the GPU kernels, and found: `python -m benchmarks.kernels.gpu_summary`.

Reads the rows of benchmarks.kernels.gpu, and the stages of gpu_check.sh, and prints a line per
target: PASS, FAIL, or MISSING where nothing was measured. A ratio is to cuBLAS bfloat16 in the same
run, the worst over the shapes with N and K of 8192 or more, of the backend that is used by default.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.peers.contender import FP8
from mixbits.report.tables import table

LARGE = 8192
# M -> (MXFP4, MXFP8): times faster than cuBLAS bfloat16
RATIOS = {
    1: (3.2, 1.75),
    16: (3.0, 1.7),
    64: (2.2, 1.6),
    128: (1.4, 1.4),
    256: (0.9, 0.9),
    2048: (0.85, 0.85),
}
AIMS = {1: (3.5, 1.85), 16: (3.4, None), 64: (2.8, None), 256: (1.0, None), 2048: (0.93, None)}
FP8_TOKENS, FP8_RATIO = 2048, 1.4  # MXFP4A16 with activations in 8-bit floats: M, the same ratio
SAME_BITS = {"MXFP4": "W4A16", "MXFP8": "W8A16"}
INTEGERS = 0.95  # of the target of the MX format with as many bits
ROUNDING = 0.85  # fake quantization: of the bandwidth of copying
STATISTICS = 0.80  # of two schemes: of the bandwidth of reading
LLAMA_8B = "32 layers of 4096, 16 x 256 tokens"  # what the published figures are for
Row = dict[str, str]


class Line(NamedTuple):
    """One target: what, what is required, what was found (None: not measured), a remark."""

    what: str
    required: str
    found: str | None
    passed: bool
    remark: str = ""

    @property
    def verdict(self) -> str:
        return "MISSING" if self.found is None else "PASS" if self.passed else "FAIL"


def _at_least(what: str, required: float, found: Sequence[float], remark: str = "") -> Line:
    if not found:
        return Line(what, f"{required:g}", None, False)
    worst = min(found)
    return Line(what, f"{required:g}", f"{worst:.3g}", worst >= required, remark)


def _default_backend(rows: Iterable[Row]) -> str:
    names = {row["backend"] for row in rows}
    return next((name for name in ("cuda", "triton") if name in names), "cuda")


def _large(rows: Sequence[Row], scheme: str, backend: str, tokens: int) -> list[Row]:
    return [
        row
        for row in rows
        if (row["scheme"], row["backend"], row["M"]) == (scheme, backend, str(tokens))
        and min(int(row["N"]), int(row["K"])) >= LARGE
    ]


def fp8_line(rows: Sequence[Row]) -> Line:
    chosen = [row for row in rows if row["section"] == "matmul"]
    large = _large(chosen, FP8, "cuda", FP8_TOKENS)
    error = max((float(row["relative_error"]) for row in large), default=0.0)
    remark = f"relative error {error:.1e}" if large else ""
    what = f"{FP8}, M = {FP8_TOKENS}, cuda: times cuBLAS bfloat16"
    return _at_least(what, FP8_RATIO, [float(row["ratio"]) for row in large], remark)


def ratio_lines(rows: Sequence[Row]) -> list[Line]:
    chosen = [row for row in rows if row["section"] == "matmul"]
    backend = _default_backend(chosen)
    lines = []
    for tokens, targets in RATIOS.items():
        for column, (scheme, integer) in enumerate(SAME_BITS.items()):
            aim = AIMS.get(tokens, (None, None))[column]
            for name, required in (
                (scheme, targets[column]),
                (integer, round(INTEGERS * targets[column], 4)),
            ):
                large = _large(chosen, name, backend, tokens)
                reading = max((float(row["share_of_read"]) for row in large), default=0.0)
                remark = f"{reading:.0%} of read bandwidth" if tokens == 1 and large else ""
                if aim and name == scheme:
                    remark = f"aim {aim:g}" + (f", {remark}" if remark else "")
                found = [float(row["ratio"]) for row in large]
                what = f"{name}, M = {tokens}, {backend}: times cuBLAS bfloat16"
                lines.append(_at_least(what, required, found, remark))
    return lines


def bandwidth_lines(rows: Sequence[Row]) -> list[Line]:
    chosen = [row for row in rows if row["section"] == "rounding"]
    backend = _default_backend(chosen)
    mine = [row for row in chosen if row["backend"] == backend]
    lines = []
    for start, required, share in (
        ("fake_quantize", ROUNDING, "share_of_copy"),
        ("fisher_statistics, 2", STATISTICS, "share_of_read"),
        ("gradient_statistics, 2", STATISTICS, "share_of_read"),
    ):
        matching = [row for row in mine if row["contender"].startswith(start)]
        names = sorted({row["contender"] for row in matching}) or [start]
        for name in names:
            found = [float(row[share]) for row in matching if row["contender"] == name]
            of = share.replace("_", " ").removeprefix("share ")
            lines.append(_at_least(f"{name}, {backend}: share {of} bandwidth", required, found))
    return lines


def sensitivity_lines(rows: Sequence[Row]) -> list[Line]:
    """Beside the published figures of AutoScheme for the same model shape: 60 s and 18 GB."""
    chosen = [
        row
        for row in rows
        if row["section"] == "sensitivity"
        and row["note"].startswith(LLAMA_8B)
        and row["device"] != "cpu"
    ]
    lines = []
    for what, column, limit, unit in (
        ("seconds", "seconds", 60.0, "s"),
        ("peak GPU memory", "peak_gpu_gb", 18.0, "GB"),
    ):
        values = [float(row[column]) for row in chosen if row[column]]
        found = f"{min(values):.3g} {unit}" if values else None
        passed = bool(values) and min(values) <= limit
        required = f"{limit:g} {unit} (AutoScheme, published)"
        lines.append(Line(f"sensitivity: {what}", required, found, passed))
    return lines


def stage_lines(stages: Sequence[Row]) -> list[Line]:
    """Stages of gpu_check.sh: name, exit code, seconds; a code of 124 is a timeout."""
    lines = []
    for row in stages:
        code = row["code"]
        state = {"0": "done", "124": "timed out", "137": "timed out", "skipped": None}.get(
            code, f"exit code {code}"
        )
        lines.append(Line(row["stage"], "done", state, code == "0", f"{row['seconds']} s"))
    return lines


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files that exist."""
    rows: list[Row] = []
    for path in paths:
        if path.is_file():
            with path.open(newline="") as file:
                rows += csv.DictReader(file)
    return rows


def summary(rows: Sequence[Row], stages: Sequence[Row]) -> list[Line]:
    return [
        *stage_lines(stages),
        *ratio_lines(rows),
        fp8_line(rows),
        *bandwidth_lines(rows),
        *sensitivity_lines(rows),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.gpu_summary", description=__doc__
    )
    parser.add_argument("csv", nargs="*", type=Path, help="written by benchmarks.kernels.gpu")
    parser.add_argument("--stages", type=Path, help="written by gpu_check.sh: stage,code,seconds")
    args = parser.parse_args(argv)
    rows = read(args.csv)
    lines = summary(rows, read([args.stages] if args.stages else []))
    origins = {(row["device"], row["commit"], row["date"]) for row in rows}
    for origin in sorted(origins):
        print(", ".join(origin))
    cells = [["", "target", "required", "found", ""]]
    for line in lines:
        cells.append([line.verdict, line.what, line.required, line.found or "", line.remark])
    print(table(cells))
    count = {name: sum(line.verdict == name for line in lines) for name in _VERDICTS}
    print(", ".join(f"{number} {name}" for name, number in count.items()))


_VERDICTS = ("PASS", "FAIL", "MISSING")

if __name__ == "__main__":
    main()
