"""CPU kernels against everybody else's: `python -m benchmarks.kernels.cpu`.

Sections (--sections, all by default):

    decode    M = 1, all shapes, every peer: GB/s of packed weights, share of read bandwidth
    prefill   M = 128, one shape, every peer: GFLOP/s
    formats   M = 1 and 256, one shape: weights of all widths beside MXFP4's, in bytes per second,
              and 8-bit activations beside 4-bit ones
    sweep     M = 1 to 512, one shape, against decoding the weight and calling torch, in one dtype
    rounding  fake quantization, packing, dequantization and statistics, share of bandwidth

Weights are rotated: every contender has as many copies of its own as exceed four times the
last-level cache, so that every call finds its weight in memory. Contenders take turns, a few calls
each. Freed memory is kept, so that results lie in pages that were touched before. Medians, with
the 20th and 80th percentile. The yardsticks, reading and copying a large array with the same
threads, take their turns too. Peers that cannot run are named with the reason.
"""

from __future__ import annotations

import os

# Before torch is imported. Threads that spin between two calls slow the next one down as soon as
# anything else wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.contender import Peer, Rotation, mixbits_peer, nbytes
from benchmarks.peers.cpu import (
    available_fake_quantizers,
    available_peers,
    dequantize_then_torch,
    torch_linear,
)
from benchmarks.tools.shapes import parse_shapes
from benchmarks.tools.timing import (
    copy_bandwidth,
    interleave,
    keep_freed_memory,
    machine,
    percentile,
    read_bandwidth,
    write_csv,
)
from mixbits import ops
from mixbits.backends import cpu
from mixbits.formats.schemes import parse_scheme
from mixbits.report.tables import table

CACHE = 32 << 20  # bytes of last-level cache that four times of are rotated through
SWEEP = [1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 64, 128, 256, 512]
# Of the section `formats`, each beside the first.
WIDTHS = ["MXFP4A16", "NVFP4A16", "W3A16G32", "W5A16G32", "W6A16G32", "MXFP6A16", "W8A16G32"]
BOTH_SIDES = ["MXFP4", "MXFP4xMXINT8", "W4G32xMXINT8", "W6G32xMXINT8", "W8G32xMXINT8"]
SCHEMES = "MXFP4,MXFP8,MXFP4A16,MXFP8A16,W4A16,W8A16,W2A16"
Row = dict[str, Any]


def own_peers(schemes: Sequence[str]) -> list[Peer]:
    """Every scheme with bfloat16 tokens, those of integers in their 8-bit mode too."""
    peers = [mixbits_peer(scheme, torch.bfloat16) for scheme in schemes]
    integer = [s for s in schemes if s.endswith("A16") and "MXFP8" not in s]
    peers += [mixbits_peer(scheme, torch.bfloat16, True) for scheme in integer]
    return peers + [mixbits_peer(s, torch.float32) for s in schemes if s in ("MXFP4A16", "W4A16")]


# --- matmul --------------------------------------------------------------------------------------


def measure_matmul(
    peers: Sequence[Peer],
    shape: tuple[int, int],
    tokens: int,
    threads: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    enough: float = 3.0,
) -> list[Row]:
    """One row per peer for x [tokens, K] times [N, K]."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(rows // 8, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator)
    rotations = {peer.name: Rotation(peer, tile, rows, x, threads, 4 * CACHE) for peer in peers}
    read, copy = read_bandwidth(), copy_bandwidth()
    calls: dict[str, Callable[[int], object]] = {"read": read, "copy": copy}
    seconds = interleave({**calls, **rotations}, rounds, clock, enough)
    bandwidth = read.bytes / percentile(seconds["read"], 50)
    result = []
    for name, rotation in rotations.items():
        median = percentile(seconds[name], 50)
        done = rotation.multiplication
        result.append(
            {
                "N": rows,
                "K": columns,
                "M": tokens,
                "contender": name,
                "ms": 1e3 * median,
                "ms_p20": 1e3 * percentile(seconds[name], 20),
                "ms_p80": 1e3 * percentile(seconds[name], 80),
                "gb_per_s": done.weight_bytes / median / 1e9,
                "share_of_read": done.weight_bytes / median / bandwidth,
                "gflop_per_s": 2 * tokens * rows * columns / median / 1e9,
                "relative_error": done.relative_error(),
                "read_gb_per_s": bandwidth / 1e9,
                "note": done.note,
            }
        )
    return result


def add_ratios(rows: list[Row]) -> None:
    """How many times faster each of ours is than each peer, in columns `x <peer>`."""
    others = {
        row["contender"]: row["ms"] for row in rows if not row["contender"].startswith("mixbits")
    }
    for row in rows:
        if row["contender"].startswith("mixbits"):
            row.update({f"x {name}": ms / row["ms"] for name, ms in others.items()})


def print_matmul(rows: list[Row], compare: Sequence[str]) -> None:
    first = rows[0]
    names = [name for name in compare if any(f"x {name}" in row for row in rows)]
    print(
        f"\nM={first['M']} N={first['N']} K={first['K']}, reading {first['read_gb_per_s']:.1f} GB/s"
    )
    head = ["contender", "ms", "p20-p80", "GB/s", "of read", "GFLOP/s", "error"]
    beside = [key for key in first if key.endswith(" of first")]
    cells = [[*head, *beside, *(f"x {name}" for name in names)]]
    for row in rows:
        cells.append(
            [
                row["contender"],
                f"{row['ms']:.3f}",
                f"{row['ms_p20']:.3f}-{row['ms_p80']:.3f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['share_of_read']:.0%}",
                f"{row['gflop_per_s']:.0f}",
                f"{row['relative_error']:.1e}",
                *(f"{row[key]:.2f}" for key in beside),
                *(f"{row[f'x {n}']:.2f}" if f"x {n}" in row else "" for n in names),
            ]
        )
    print(table(cells), flush=True)


def run_matmul(
    peers: Sequence[Peer], shape: tuple[int, int], tokens: int, args: argparse.Namespace
) -> list[Row]:
    rounds = max(7, args.rounds // (1 + tokens // 32))
    rows = measure_matmul(peers, shape, tokens, args.threads, rounds)
    add_ratios(rows)
    print_matmul(rows, COMPARE)
    gc.collect()
    return rows


COMPARE = ["torch float32", "torch bfloat16", "ggml MXFP4", "ggml Q4_0", "ggml Q4_K", "ggml Q8_0"]


def formats(args: argparse.Namespace) -> list[Row]:
    """Weights of every width meet one token, those whose tokens are rounded many, too."""
    shape, rows = parse_shapes(args.prefill_shape)[0], []
    for schemes, tokens, figure in (
        (WIDTHS, 1, "gb_per_s"),
        (BOTH_SIDES, 1, "gb_per_s"),
        (BOTH_SIDES, 256, "gflop_per_s"),
    ):
        peers = [mixbits_peer(scheme, torch.bfloat16) for scheme in schemes]
        clock = time.process_time if args.cpu_time else time.perf_counter
        found = measure_matmul(peers, shape, tokens, args.threads, args.rounds, clock, enough=10.0)
        for row in found:
            row[f"{figure} of first"] = row[figure] / found[0][figure]
        print_matmul(found, [])
        rows += found
        gc.collect()
    return rows


def sweep(args: argparse.Namespace) -> list[Row]:
    """Every scheme and dtype against decoding the weight and calling torch."""
    shape, rows = parse_shapes(args.prefill_shape)[0], []
    cells = [["M", *(f"{s} {d}" for d in ("bfloat16", "float32") for s in args.schemes)]]
    for tokens in SWEEP:
        cell = [str(tokens)]
        for dtype in (torch.bfloat16, torch.float32):
            for scheme in args.schemes:
                peers = [mixbits_peer(scheme, dtype), dequantize_then_torch(scheme, dtype)]
                found = measure_matmul(peers, shape, tokens, args.threads, 5)
                add_ratios(found)
                rows += found
                cell.append(f"{found[0][f'x {peers[1].name}']:.2f}")
        cells.append(cell)
    print(f"\ntimes faster than dequantize + torch, N={shape[0]} K={shape[1]}")
    print(table(cells), flush=True)
    return rows


# --- rounding ------------------------------------------------------------------------------------


# A call, the bytes that it must move, and the yardstick that they are compared with.
Rounding = tuple[Callable[[int], object], int, str]


def rounding_calls(
    elements: int,
    device: str = "cpu",
    backend: str | None = None,
    schemes: Sequence[str] = ("MXFP4", "MXFP8", "W4A16"),
) -> dict[str, Rounding]:
    """Name -> call; the statistics are those of `schemes`."""
    columns = 4096
    x = torch.randn(elements // columns, columns, device=device).bfloat16()
    gradient = torch.randn_like(x)
    row, column = torch.rand(len(x), device=device), torch.rand(columns, device=device)
    calls: dict[str, Rounding] = {}
    for name in ("MXFP4", "MXFP8", "W4A16", "W8A16"):
        fmt = parse_scheme(name).weight
        assert fmt is not None
        packed = ops.quantize_pack(x, fmt, backend)
        size = nbytes(*packed)
        calls[f"fake_quantize {name}"] = (
            lambda _, f=fmt: ops.fake_quantize(x, f, backend),
            2 * x.nbytes,
            "copy",
        )
        calls[f"quantize_pack {name}"] = (
            lambda _, f=fmt: ops.quantize_pack(x, f, backend),
            x.nbytes + size,
            "copy",
        )
        calls[f"dequantize {name}"] = (
            lambda _, f=fmt, p=packed: ops.dequantize(p, f, columns, torch.bfloat16, backend),
            x.nbytes + size,
            "copy",
        )
    formats = [parse_scheme(name).weight for name in schemes]
    calls[f"fisher_statistics, {len(formats)} schemes"] = (
        lambda _: ops.fisher_statistics(x, row, column, formats, backend),
        x.nbytes,
        "read",
    )
    calls[f"gradient_statistics, {len(formats)} schemes"] = (
        lambda _: ops.gradient_statistics(x, gradient, formats, backend),
        2 * x.nbytes,
        "read",
    )
    calls[f"square_sums, {len(formats)} schemes"] = (
        lambda _: ops.square_sums(x, formats, backend),
        x.nbytes,
        "read",
    )
    return calls


def peer_rounding_calls(elements: int) -> dict[str, Rounding]:
    """Other people's fake quantization, as far as it can run here."""
    calls: dict[str, Rounding] = {}
    x = torch.randn(elements // 4096, 4096).bfloat16()
    for quantizer, reason in available_fake_quantizers():
        if reason is not None:
            print(f"skipped: {quantizer.name} ({reason})")
            continue
        function = quantizer.load()
        calls[f"fake quantization of {quantizer.name}"] = (
            lambda _, f=function: f(x),
            2 * x.nbytes,
            "copy",
        )
    return calls


def rounding(args: argparse.Namespace) -> list[Row]:
    calls = {**rounding_calls(args.elements), **peer_rounding_calls(args.elements)}
    read, copy = read_bandwidth(), copy_bandwidth()
    seconds = interleave(
        {"read": read, "copy": copy, **{name: call[0] for name, call in calls.items()}},
        max(5, args.rounds // 3),
    )
    best = {y.name: y.bytes / percentile(seconds[y.name], 50) for y in (read, copy)}
    own = percentile(seconds["fake_quantize MXFP4"], 50)
    rows: list[Row] = []
    for name, (_, size, yardstick) in calls.items():
        median = percentile(seconds[name], 50)
        rows.append(
            {
                "contender": name,
                "elements": args.elements,
                "ms": 1e3 * median,
                "ms_p20": 1e3 * percentile(seconds[name], 20),
                "ms_p80": 1e3 * percentile(seconds[name], 80),
                "gb_per_s": size / median / 1e9,
                f"share_of_{yardstick}": size / median / best[yardstick],
                f"{yardstick}_gb_per_s": best[yardstick] / 1e9,
            }
        )
        if name.startswith("fake quantization of"):
            rows[-1]["x fake_quantize MXFP4"] = median / own
    print(
        f"\n{args.elements} elements, bfloat16; read {best['read'] / 1e9:.1f} GB/s, "
        f"copy {best['copy'] / 1e9:.1f} GB/s"
    )
    cells = [["", "ms", "GB/s", "share", "ours is faster by"]]
    for row in rows:
        share = next(f"{v:.0%} of {k[9:]}" for k, v in row.items() if k.startswith("share_of_"))
        ratio = row.get("x fake_quantize MXFP4")
        cells.append(
            [
                row["contender"],
                f"{row['ms']:.2f}",
                f"{row['gb_per_s']:.1f}",
                share,
                "" if ratio is None else f"{ratio:.1f}",
            ]
        )
    print(table(cells), flush=True)
    return rows


# --- command line --------------------------------------------------------------------------------


def usable_peers(threads: int) -> list[Peer]:
    peers = []
    for peer, reason in available_peers(threads):
        if reason is None:
            peers.append(peer)
        else:
            print(f"skipped: {peer.name} ({reason})")
    return peers


def run(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    plain = [torch_linear(torch.float32), torch_linear(torch.bfloat16)]
    peers = plain
    if not args.no_peers and {"decode", "prefill"} & set(args.sections):
        peers = usable_peers(args.threads)
    own = own_peers(args.schemes)
    if "decode" in args.sections:
        for shape in parse_shapes(args.shapes):
            rows += run_matmul([*own, *peers], shape, 1, args)
    if "prefill" in args.sections:
        rows += run_matmul([*own, *peers], parse_shapes(args.prefill_shape)[0], 128, args)
    if "formats" in args.sections:
        rows += formats(args)
    if "sweep" in args.sections:
        rows += sweep(args)
    if "rounding" in args.sections:
        rows += rounding(args)
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = lambda text: text.split(",")  # noqa: E731
    sections = "decode,prefill,formats,sweep,rounding"
    parser.add_argument("--sections", type=words, default=words(sections), help=sections)
    parser.add_argument("--shapes", default="llama-3.1-8b,qwen3-8b,ideal", help="names, or NxK")
    parser.add_argument("--prefill-shape", default="4096x4096", help="of prefill and sweep")
    parser.add_argument("--schemes", type=words, default=words(SCHEMES), help=SCHEMES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=31, help="fewer where M is large")
    parser.add_argument("--elements", type=int, default=1 << 26, help="of the rounding section")
    parser.add_argument("--isa", choices=cpu.available_isas(), help="instruction set to force")
    parser.add_argument("--no-peers", action="store_true", help="compare with torch only")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="section formats, with --threads 1: seconds of the CPU, for machines that others use",
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--png", type=Path, help="roofline plot (needs matplotlib)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.isa:
        cpu.set_isa(args.isa)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(machine())
    rows = run(args)
    if args.csv:
        write_csv(args.csv, rows)
    if args.png:
        from benchmarks.tools.roofline import plot

        plot([row for row in rows if "gflop_per_s" in row], args.png, machine())


if __name__ == "__main__":
    main()
