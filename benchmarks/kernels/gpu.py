"""GPU kernels and models against torch's bfloat16: `python -m benchmarks.kernels.gpu`.

Sections (--sections, all by default):

    matmul       every scheme, backend and peer, MXFP4A16 with activations in 8-bit floats, and
                 cuBLAS bfloat16; shapes of real models and large square ones; M from 1 to 4096.
                 The error printed is that of the product, against float64 on the same weights
    rounding     fake quantization, packing and statistics: share of copy or read bandwidth
    sensitivity  a Llama-3.1-8B of random weights, 16 x 256 tokens, two schemes: seconds, memory
    generate     the same shape packed at 4.5 bits, against bfloat16, eager and with CUDA graphs

The cache is cold: each contender goes round 200 MB or more of copies of its weight. All calls are
replayed as CUDA graphs. Contenders take turns; figures are medians, with the 20th and 80th
percentile. What matters most is measured first, rows are written to --csv as they come, and
--seconds ends the run in time, whatever is missing by then.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.cpu import rounding_calls
from benchmarks.kernels.gpu_timing import (
    AppendedRows,
    Budget,
    Timer,
    about,
    bandwidths,
    interleaved,
    spread,
)
from benchmarks.peers.contender import Rotation
from benchmarks.peers.gpu import BASELINE, contenders
from benchmarks.tools.shapes import SHAPES, parse_shapes
from benchmarks.tools.timing import percentile
from mixbits import ops
from mixbits.report.tables import table

COLD_BYTES = 200 << 20
TOKENS = "1,4,16,64,128,256,1024,2048,4096"
SCHEMES = "MXFP4,MXFP8,W4A16,W8A16,W2A16"
JUDGED_TOKENS = (1, 16, 64, 128, 256, 2048)  # those that have a target come first
CHECKED = 256  # rows and tokens whose products are compared with float64
COLUMNS = [
    *("section", "contender", "scheme", "backend", "N", "K", "M", "us", "us_p20", "us_p80"),
    *("gb_per_s", "share_of_read", "share_of_copy", "gflop_per_s", "ratio", "relative_error"),
    *("tokens_per_s", "seconds", "peak_gpu_gb", "read_gb_per_s", "copy_gb_per_s", "note"),
]
Row = dict[str, Any]


def matmul_cases(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int]
) -> list[tuple[tuple[int, int], int]]:
    """(shape, M), the judged ones first: large shapes, then the others in their order. Pure."""
    ideal = SHAPES["ideal-gpu"]
    cases = [(shape, m) for shape in shapes for m in tokens]
    return sorted(cases, key=lambda case: (case[0] not in ideal, case[1] not in JUDGED_TOKENS))


def relative_error(rotation: Rotation) -> float:
    """|y - exact| / |exact| over some of the rows and tokens (Frobenius), exact being float64."""
    done = rotation.multiplication
    x, weight = done.x[:CHECKED], done.weight()[:CHECKED]
    exact = x.double() @ weight.double().T
    got = done(0)[:CHECKED, :CHECKED]
    return float((got.double() - exact).norm() / exact.norm())


def matmul_rows(
    shape: tuple[int, int],
    tokens: int,
    weight_bytes: dict[str, int],
    seconds: dict[str, list[float]],
    best: dict[str, float],
) -> dict[str, Row]:
    """What follows from the seconds of each contender, cuBLAS among them. Pure."""
    rows: dict[str, Row] = {}
    medians = {name: percentile(values, 50) for name, values in seconds.items()}
    for name, median in medians.items():
        rows[name] = {
            "section": "matmul",
            "contender": name,
            "N": shape[0],
            "K": shape[1],
            "M": tokens,
            **spread(seconds[name]),
            "gb_per_s": weight_bytes[name] / median / 1e9,
            "share_of_read": weight_bytes[name] / median / best["read"],
            "gflop_per_s": 2 * tokens * shape[0] * shape[1] / median / 1e9,
            "ratio": medians[BASELINE] / median,
            "read_gb_per_s": best["read"] / 1e9,
            "copy_gb_per_s": best["copy"] / 1e9,
        }
    return rows


def matmul(args: argparse.Namespace, out: AppendedRows, budget: Budget) -> None:
    device = torch.device(args.device)
    peers = contenders(args.schemes, args.backends, device)
    best = bandwidths(device, args.rounds, args.yardstick_bytes)
    for (rows, columns), tokens in budget.take(matmul_cases(args.shapes, args.tokens)):
        generator = torch.Generator(device).manual_seed(0)
        tile = torch.randn(rows // 8, columns, generator=generator, device=device)
        x = torch.randn(tokens, columns, generator=generator, device=device)
        rotations, timers, errors = {}, {}, {}
        for peer, _, _ in peers:
            rotations[peer.name] = Rotation(peer, tile, rows, x, 1, args.cold_bytes)
            errors[peer.name] = relative_error(rotations[peer.name])
            timers[peer.name] = Timer(rotations[peer.name], rotations[peer.name].copies, device)
        seconds = interleaved(timers, args.rounds)
        sizes = {name: r.multiplication.weight_bytes for name, r in rotations.items()}
        found = matmul_rows((rows, columns), tokens, sizes, seconds, best)
        for name, row in found.items():
            row["relative_error"] = errors[name]
        for peer, scheme, backend in peers:
            note = " ".join(
                filter(None, (rotations[peer.name].multiplication.note, timers[peer.name].note))
            )
            out.append({**found[peer.name], "scheme": scheme, "backend": backend, "note": note})
        print_matmul(list(found.values()))
        del rotations, timers
        free(device)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def print_matmul(rows: Sequence[Row]) -> None:
    first = rows[0]
    print(
        f"\nM={first['M']} N={first['N']} K={first['K']}, reading {first['read_gb_per_s']:.0f} GB/s"
    )
    cells = [["contender", "us", "p20-p80", "GB/s", "of read", "TFLOP/s", "x cuBLAS", "error"]]
    for row in rows:
        cells.append(
            [
                row["contender"],
                f"{row['us']:.1f}",
                f"{row['us_p20']:.1f}-{row['us_p80']:.1f}",
                f"{row['gb_per_s']:.0f}",
                f"{row['share_of_read']:.0%}",
                f"{row['gflop_per_s'] / 1e3:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['relative_error']:.1e}",
            ]
        )
    print(table(cells), flush=True)


def rounding(args: argparse.Namespace, out: AppendedRows, budget: Budget) -> None:
    """Each backend's elementwise operations, and its statistics of two schemes."""
    device = torch.device(args.device)
    best = bandwidths(device, args.rounds, args.yardstick_bytes)
    for backend in budget.take(args.backends):
        calls = rounding_calls(args.elements, args.device, backend, ("MXFP4", "MXFP8"))
        cells = [[backend, "us", "GB/s", "share"]]
        for name, (call, size, yardstick) in calls.items():
            timer = Timer(call, 2, device)
            seconds = [timer.sample() for _ in range(args.rounds)]
            median = percentile(seconds, 50)
            share = size / median / best[yardstick]
            out.append(
                {
                    "section": "rounding",
                    "contender": name,
                    "scheme": name.split()[-1],
                    "backend": backend,
                    **spread(seconds),
                    "gb_per_s": size / median / 1e9,
                    f"share_of_{yardstick}": share,
                    "read_gb_per_s": best["read"] / 1e9,
                    "copy_gb_per_s": best["copy"] / 1e9,
                    "note": timer.note,
                }
            )
            where = f"{share:.0%} of {yardstick}"
            cells.append([name, f"{1e6 * median:.0f}", f"{size / median / 1e9:.0f}", where])
            del timer
        print("\n" + table(cells), flush=True)
        del calls
        free(device)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """The roofline of all that was multiplied."""
    from benchmarks.tools.roofline import plot as draw

    chosen = [row for row in rows if row["section"] == "matmul"]
    if chosen:
        draw(chosen, path, title)


def sections() -> dict[str, Any]:
    from benchmarks.kernels.gpu_model import generate, sensitivity

    return {
        "matmul": matmul,
        "rounding": rounding,
        "sensitivity": sensitivity,
        "generate": generate,
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    names = "matmul,rounding,sensitivity,generate"
    shapes = "ideal-gpu,llama-3.1-8b,qwen3-8b,qwen3-32b"
    parser.add_argument("--sections", type=words, default=words(names), help=names)
    parser.add_argument("--shapes", type=parse_shapes, default=parse_shapes(shapes), help=shapes)
    parser.add_argument("--tokens", type=numbers, default=numbers(TOKENS), help=TOKENS)
    parser.add_argument("--schemes", type=words, default=words(SCHEMES), help=SCHEMES)
    parser.add_argument("--backends", type=words, default=["cuda", "triton"])
    parser.add_argument("--seconds", type=float, default=1200.0, help="for all sections together")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--elements", type=int, default=1 << 28, help="of the rounding section")
    parser.add_argument("--cold-bytes", type=int, default=COLD_BYTES, help="of copies of a weight")
    parser.add_argument("--yardstick-bytes", type=int, default=1 << 30)
    parser.add_argument("--layers", type=int, default=32, help="of the models")
    parser.add_argument("--width", type=int, default=4096, help="hidden size of the models")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before those generated")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv", type=Path, help="rows are appended to it")
    parser.add_argument("--png", type=Path, help="roofline plot (needs matplotlib)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no GPU: benchmarks.kernels.gpu measures one (--device cpu tries the program)"
        )
    known = ops.backends()
    for name in args.backends:
        if known[name] is not None:
            print(f"skipped: backend {name} ({known[name]})")
    args.backends = [name for name in args.backends if known[name] is None]
    origin = about(device)
    print(", ".join(f"{key} {value}" for key, value in origin.items() if value), flush=True)
    out, budget = AppendedRows(args.csv, COLUMNS, origin), Budget(args.seconds)
    run = sections()
    try:
        for name in args.sections:
            print(f"\n== {name}, {budget.left():.0f} s left", flush=True)
            run[name](args, out, budget)
            free(device)
    finally:
        if args.png:
            plot(out.rows, args.png, f"{origin['device']}, {origin['commit']}, {origin['date']}")


if __name__ == "__main__":
    main()
