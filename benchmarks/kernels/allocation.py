"""The allocation of a 70B model's slabs: `python -m benchmarks.kernels.allocation`.

One item is what decides about 32 input columns: of every linear on its own (194,560 items), or of
all linears that read one input (133,120). Costs are those of the model's shapes in MX formats,
scales counted; losses are drawn: log-normal per slab, about a quarter per bit. Prints seconds,
from arrays to plan, the gap to the lower bound, whether the plan is proven optimal, and the
process' peak memory, which Python, numpy, the items and a whole curve are part of. `--odd` adds
up to 1000 bits to every cost, so that costs share no divisor: the hard case.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from mixbits.planning.allocate import STRATEGIES, allocate
from mixbits.planning.curve import frontier
from mixbits.planning.knapsack import Items

BLOCKS = 80
# Llama-3.1-70B: rows that meet one slab of columns, and the columns.
FREE = [
    *((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192)),  # q, k, v, o
    *((28672, 8192), (28672, 8192), (8192, 28672)),  # gate, up, down
]
SHARED = [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]  # q/k/v, o, gate/up, down
SCHEMES = {2: (4, 8), 5: (2, 3, 4, 6, 8)}  # bits of an element


def make_items(
    readers: list[tuple[int, int]], bits: tuple[int, ...], odd: bool, seed: int = 0
) -> Items:
    """Items [slabs] with an option for each width of an element."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([np.full(columns // 32, n) for n, columns in readers * BLOCKS])
    widths = np.array(bits)
    costs = rows[:, None] * (32 * widths + 8)
    if odd:
        costs = costs + rng.integers(0, 1000, costs.shape)
    spread = np.exp(rng.normal(0, 2, (len(rows), 1)) + rng.normal(0, 0.3, costs.shape))
    return Items(costs.astype(np.int64), rows[:, None] * spread * 4.0**-widths)


T = TypeVar("T")


def timed(run: Callable[..., T], *arguments: object) -> tuple[str, T]:
    """Seconds on the wall and of this process on a core, and the result."""
    wall, own = time.perf_counter(), time.process_time()
    result = run(*arguments)
    wall, own = time.perf_counter() - wall, time.process_time() - own
    return f"{wall:6.2f} s ({own:5.2f} s of CPU)", result


def peak_memory() -> float:
    """Largest resident size of this process so far, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def solve(items: Items, share: float) -> str:
    """One budget, at this share of the way from the lowest to the highest."""
    lowest, highest = items.cost_range()
    budget = lowest + int((highest - lowest) * share)
    seconds, plan = timed(allocate, items, budget)
    assert plan.cost <= budget
    proof = "proven" if plan.proven else "not proven"
    return f"  budget at {share:4.0%}  {seconds}   gap {plan.gap:.1e}  {proof}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.allocation")
    parser.add_argument("--odd", action="store_true", help="costs without a common divisor")
    parser.add_argument("--points", type=int, default=33, help="of the curve (%(default)s)")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}")
    print("seconds from arrays to plan, those of a relaxation and its sort included")
    for what, readers in (("shared", SHARED), ("free", FREE)):
        for count, bits in SCHEMES.items():
            items = make_items(readers, bits, args.odd)
            print(f"{len(items):,} items ({what}), {count} schemes")
            for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.99):
                print(solve(items, share), flush=True)
            budget = sum(items.cost_range()) // 2
            for name in STRATEGIES[1:]:
                seconds, _ = timed(allocate, items, budget, name)
                print(f"  {name:<14}  {seconds}")
            seconds, points = timed(frontier, items, args.points)
            worst = max(point.allocation.gap for point in points)
            print(f"  curve of {len(points):<4}   {seconds}   gap {worst:.1e} at most")
            print(f"  peak memory so far {peak_memory():,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
