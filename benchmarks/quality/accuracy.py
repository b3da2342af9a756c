"""KL on held-out text for every strategy and budget: `python -m benchmarks.quality.accuracy MODEL`.

    python -m benchmarks.quality.accuracy MODEL --dataset text.txt --bits 4.25,4.5,5,6

Measures once per method, allocates every budget from it, packs each plan to disk, loads it back
and compares with the original. Prints a table in 1e-3 nats per token and appends to a CSV, with
the machine, the date and the commit.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import mixbits
from mixbits.checkpoint.folder import predicted_bytes
from mixbits.checkpoint.saving import save
from mixbits.command import quiet
from mixbits.formats.schemes import Scheme, parse_scheme
from mixbits.measuring.evaluate import compare
from mixbits.measuring.scores import Scores
from mixbits.measuring.sensitivity import METHODS, measure
from mixbits.measuring.text import Sequences, load_sequences
from mixbits.model.layout import LinearInfo, find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.model.units import Unit, make_units
from mixbits.planning.plan import Budget, Plan, average_bits, solve, unit_options
from mixbits.report.clock import environment
from mixbits.report.tables import table
from mixbits.source.source import Source, open_source

BASELINES = ("uniform", "head", "tail", "random")


class Subject:
    """One model with its text and its linears."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.source: Source = open_source(args.model)
        self.model = self.source.load()
        self.linears: list[LinearInfo] = find_linears(self.model)
        self.units: list[Unit] = make_units(self.linears, fuse=args.fuse)
        self.schemes: list[Scheme] = [parse_scheme(name) for name in args.schemes.split(",")]
        counts = args.nsamples, args.eval_nsamples, args.seqlen
        vocab = self.source.config.get_text_config().vocab_size
        pair = load_sequences(args.dataset, self.source.tokenizer(), vocab, *counts)
        self.calibration: Sequences = pair[0]
        self.held_out: Sequences = pair[1]

    def scores(self, method: str) -> Scores:
        streamed = StreamedModel(self.model)
        slabs = measure(streamed, self.linears, self.schemes, self.calibration.ids, method)
        name = {"name": self.source.name, "sha256": self.source.sha256()}
        calibration = self.calibration.describe()
        return Scores.build(slabs, self.linears, method, ("floor", "floor"), name, calibration)

    def packed_kl(self, plan: Plan) -> dict[str, float]:
        """Pack to disk, load, compare: figures of `evaluate.compare`, and the file size."""
        with tempfile.TemporaryDirectory() as folder:
            modes = {k: plan.data[k] for k in ("weight_scale_mode", "act_scale_mode")}
            path, model = Path(folder), self.model
            size = save(path, self.source, model, self.linears, plan.assignment, modes)
            quantized = StreamedModel(mixbits.load(path))
            figures = compare(StreamedModel(model), quantized, self.held_out.ids)
        return {**figures, "bytes": size, "predicted_bytes": self.predicted(plan)}

    def predicted(self, plan: Plan) -> int:
        return predicted_bytes(self.model, self.linears, plan.assignment, self.source.dtype)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    subject = Subject(args)
    scores = {method: subject.scores(method) for method in METHODS}
    runs = [(m, m, "optimal") for m in METHODS] + [(s, "fisher", s) for s in BASELINES]
    options = unit_options(subject.units, subject.schemes, [])
    rows = []
    for bits in args.bits.split(","):
        budget = Budget(avg_bits=float(bits), ignore_scale_bits=args.ignore_scale_bits)
        for label, method, strategy in runs:
            plan = solve(subject.units, options, scores[method], budget, strategy)
            reached = {
                name: average_bits(subject.linears, plan.assignment, ignore)
                for name, ignore in (("bits", False), ("bits_without_scales", True))
            }
            row = {"model": subject.source.path.name, "schemes": args.schemes, "asked": bits}
            rows.append({**row, "strategy": label, **reached, **subject.packed_kl(plan)})
            print(f"{label:>10} {bits:>5}: {rows[-1]['kl'] * 1e3:7.1f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.accuracy")
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--schemes", default="MXFP4,MXFP8")
    parser.add_argument("--bits", default="4.25,4.5,5,6")
    parser.add_argument("--count-scales", dest="ignore_scale_bits", action="store_false")
    parser.add_argument("--fuse", action="store_true")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--eval-nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--csv", type=Path, help="append the figures here")
    args = parser.parse_args()
    quiet()
    rows = run(args)
    bits = args.bits.split(",")
    heading = [f"{rows[0]['model']}, {args.schemes}", *bits]
    lines = [heading]
    for strategy in dict.fromkeys(r["strategy"] for r in rows):
        mine = [r for r in rows if r["strategy"] == strategy]
        lines.append(
            [strategy, *(f"{r['kl'] * 1e3:.1f} ± {r['kl_stderr'] * 1e3:.1f}" for r in mine)]
        )
    print("\nKL to the original, 1e-3 nats per token")
    print(table(lines))
    if args.csv is not None:
        write_csv(args.csv, rows)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    where = environment()
    extra = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "device": where["gpu"] or f"{where['machine']}, {where['cpus']} cores",
        "torch": where["torch"],
    }
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *extra], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**row, **extra} for row in rows)


if __name__ == "__main__":
    main()
