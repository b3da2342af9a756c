"""What a wider menu of schemes is worth: `python -m benchmarks.quality.menus MODEL`.

    python -m benchmarks.quality.menus smollm2 --dataset calib_c4.txt --held-out wikitext2.txt \\
        --menu before=MXFP4,MXFP8 --menu wide=cpu,w4a4 --avg-bits 4.5,5.25 --csv menus.csv

All schemes of all menus are measured once, together; then each menu's best plan, by whole linears,
is rounded and judged at the same stored bits as `benchmarks.quality.uniform` judges one scheme.
Printed are KL(original || quantized) in 1e-3 nats per token, and its share of the first menu's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mixbits
from benchmarks.quality.uniform import FIGURES, TEXT, Subject, key_of, make_parser
from benchmarks.tools.records import Records
from mixbits.command import quiet
from mixbits.formats.menus import expanded
from mixbits.report.tables import table

MENUS = (
    "before=MXFP4,MXFP8",
    "wide=cpu,w4a4",
    "W4+W8=W4A16G32,W8A16G32",
    "weights=weights-only",
)
KEY = ("model", "menu", "schemes", "avg_bits", "rotate", "rounding", *TEXT)
COLUMNS = (*KEY, "bits", *FIGURES)


Menu = tuple[str, tuple[str, ...]]  # its name, and its schemes


def menu(text: str) -> Menu:
    """What NAME=SCHEME,... stands for."""
    name, _, schemes = text.partition("=")
    return name, expanded(schemes.split(","))


def scores_of(args: argparse.Namespace, menus: Sequence[Menu]) -> mixbits.Scores:
    """All schemes of all menus, measured together on the calibration text."""
    every = tuple(dict.fromkeys(scheme for _, schemes in menus for scheme in schemes))
    how = {"nsamples": args.nsamples, "seqlen": args.seqlen, "rotate": args.rotate}
    return mixbits.measure(args.model, args.dataset, schemes=every, **how)


def main() -> None:
    parser = make_parser("quality.menus")
    parser.add_argument("--menu", type=menu, action="append", help="NAME=SCHEME,...")
    parser.add_argument("--avg-bits", default="4.5,4.75,5.25,6.25", help="stored")
    parser.add_argument("--rounding", default="search", help="rtn, search or gptq")
    parser.add_argument("--csv", type=Path, default=Path("menus.csv"))
    args = parser.parse_args()
    quiet()
    menus = args.menu or [menu(text) for text in MENUS]
    subject, records = Subject(args), Records(args.csv, COLUMNS, KEY)
    scores = scores_of(args, menus)
    rows = [["stored bits", *(name for name, _ in menus)]]
    for bits in map(float, args.avg_bits.split(",")):
        found: list[float] = []
        for name, schemes in menus:
            key = {**key_of(args), "menu": name, "schemes": " ".join(schemes)}
            key |= {"avg_bits": f"{bits:g}", "rounding": args.rounding}
            row = records.find(**key)
            if row is None:
                plan = mixbits.allocate(scores, avg_bits=bits, schemes=schemes)
                figures = subject.figures(plan.plan.assignment, args.rounding)
                row = records.append({**key, **figures})
            found.append(float(row["kl"]))
        rows.append([f"{bits:g}", *(f"{kl * 1e3:.1f} ({kl / found[0]:.2f})" for kl in found)])
        print(*rows[-1], flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
