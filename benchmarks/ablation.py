"""What each part gains, beside AutoScheme: `python -m benchmarks.ablation MODEL --dataset TEXT`.

    python -m benchmarks.ablation stories3m --dataset tinystories.txt --csv ablation.csv
    python -m benchmarks.ablation demo --variants everything --bits 4.5

MODEL is a folder, or `demo` for the bundled model and its text. Variants go from AutoRound's
numerics (scales of the OCP rule, nearest rounding, one scheme for a linear) to everything on. All
are measured on the same tokens as AutoScheme's rows in `benchmarks/results/autoscheme.csv`
(`python -m benchmarks.autoscheme`), rounded in memory and compared on the same held-out
sequences; the bits are of elements only, as there. Printed are KL divergences in 1e-3 nats per
token, and each variant's ratios to AutoScheme with plain rounding, with its opt rounding, and
tuned. `--skip N` calibrates on other text: N sequences further on.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch import Tensor

from benchmarks.autoscheme import add_text_options
from benchmarks.records import Records
from benchmarks.text import Text, make_text
from mixbits.formats.arrange import Arrangement
from mixbits.formats.pack import Rounded
from mixbits.formats.schemes import Assignment, parse_scheme
from mixbits.measuring.evaluate import sequence_kl
from mixbits.measuring.scores import Scores
from mixbits.measuring.sensitivity import measure, sorted_columns
from mixbits.model.layout import find_linears, make_units
from mixbits.model.streaming import StreamedModel, gradient_dtype
from mixbits.pipeline.options import DISTILL_STEPS, REFINE_ROUNDS
from mixbits.pipeline.refine import Options, halves, refine
from mixbits.planning.allocate import Allocation, Item, total
from mixbits.planning.plan import Budget, Problem, average_bits, unit_options
from mixbits.report.tables import quiet, table
from mixbits.rounding.distill import distill, enough_text
from mixbits.rounding.signround import tune
from mixbits.rounding.whole_model import RoundedModel, round_model
from mixbits.source.source import open_source

ROUNDINGS = ("plain", "opt", "tuned")  # of AutoScheme's rows
AUTOSCHEME = Path(__file__).parent / "results" / "autoscheme.csv"


@dataclass(frozen=True)
class Variant:
    """Scale mode of activations, how columns are divided and arranged, how weights are rounded.

    `refined`: the plan is improved by measured KL (`--refine`).
    """

    act_scale_mode: str = "even"
    slabs: str = ""  # "", "shared" by the readers of one input, or "free"
    rotated: bool = False
    rounding: str = "rtn"
    correction: float = 0.0
    distilled: int = 0  # steps
    refined: bool = False


VARIANTS = {
    "layers, floor": Variant("floor"),
    "layers, floor, refined": Variant("floor", refined=True),
    "layers": Variant(),
    "layers, search": Variant(rounding="search"),
    "layers, gptq": Variant(rounding="gptq"),
    "layers, gptq corrected": Variant(rounding="gptq", correction=0.5),
    "layers, tuned": Variant(rounding="tuned"),  # by auto-round itself
    "layers, rotated, gptq corrected": Variant(rotated=True, rounding="gptq", correction=0.5),
    "slabs, floor": Variant("floor", "shared"),
    "free slabs, floor": Variant("floor", "free"),
    "slabs": Variant(slabs="shared"),
    "slabs, rotated": Variant(slabs="shared", rotated=True),
    "slabs, gptq corrected": Variant(slabs="shared", rounding="gptq", correction=0.5),
    "everything": Variant("even", "shared", True, "gptq", 0.5),
    "everything, free slabs": Variant("even", "free", True, "gptq", 0.5),
    "layers, distilled": Variant(rounding="gptq", correction=0.5, distilled=DISTILL_STEPS),
    "everything, distilled": Variant("even", "shared", True, "gptq", 0.5, DISTILL_STEPS),
    "everything, free slabs, distilled": Variant("even", "free", True, "gptq", 0.5, DISTILL_STEPS),
    "everything, free slabs, distilled twice as long": Variant(
        "even", "free", True, "gptq", 0.5, 2 * DISTILL_STEPS
    ),
}
KEY = ("model", "variant", "asked", "calibration_sha256")
COLUMNS = (*KEY, "kl", "kl_stderr", "bits_without_scales", "bits", "predicted", "round_seconds")


class Subject:
    """One model with its tokens."""

    def __init__(self, name: str, text: Text, skip: int) -> None:
        self.name, self.text = name, text
        self.source = open_source(text.model)
        model = self.source.load()
        self.model, self.linears = StreamedModel(model), find_linears(model)
        dataset = torch.from_numpy(np.load(text.dataset).astype(np.int64))
        count = len(np.load(text.calibration))
        self.ids = dataset[skip : skip + count]
        self.held_out = torch.from_numpy(np.load(text.held_out).astype(np.int64))
        self._scores: dict[Any, Scores] = {}
        self._enough: dict[int, Tensor] = {}

    def calibrated_on(self, ids: Tensor) -> Subject:
        """The same model, scored and rounded with other sequences."""
        other = copy.copy(self)
        other.ids, other._scores, other._enough = ids, {}, {}
        return other

    def scores(self, variant: Variant) -> tuple[Scores, list[Any], list[Any]]:
        """Scores for a variant's arrangement of columns, measured once, its units and options."""
        modes: Any = ("floor", variant.act_scale_mode)
        schemes = [parse_scheme(name, *modes) for name in ("MXFP4", "MXFP8")]
        divided = bool(variant.slabs)
        units = make_units(self.linears, variant.slabs == "shared", by_input=divided)
        key = variant.act_scale_mode, variant.slabs, variant.rotated
        if key not in self._scores:
            found: dict[str, Arrangement] = {}
            if divided:
                readers = [unit.linears for unit in units]
                found = sorted_columns(self.model, self.linears, readers, schemes[0], self.ids)
            for name in (i.name for i in self.linears if i.ffn_output):
                if variant.rotated:
                    found[name] = Arrangement(found[name].order if divided else None, True)
            slabs = measure(self.model, self.linears, schemes, self.ids, arrangements=found)
            about: tuple[Any, Any] = {"name": self.name, "sha256": ""}, {}
            self._scores[key] = Scores.build(slabs, self.linears, "fisher", modes, *about, found)
        return self._scores[key], units, unit_options(units, schemes, [])

    def refined(self, problem: Problem, start: Allocation, budget: Budget) -> Allocation:
        """A plan that is no worse on the second half of the sequences."""

        def solved(items: Sequence[Item]) -> Options:
            return replace(problem, items=items).allocate(budget, "optimal").choice

        meters = halves(self.model, problem, self.ids)
        found = refine(problem.items, start.choice, *meters, solved, REFINE_ROUNDS)
        return Allocation(found.plan, *total(problem.items, found.plan), start.lower_bound)

    def rounded(self, recipes: Assignment, variant: Variant) -> Rounded:
        """The linears' packed weights."""
        if variant.rounding == "tuned":
            model, tokenizer = self.source.load(), self.source.tokenizer()
            return tune(model, tokenizer, self.linears, recipes, self.ids)
        how = variant.rounding, self.ids, variant.correction
        rounded = round_model(self.model, self.linears, recipes, *how)
        return self.distilled(recipes, rounded, variant) if variant.distilled else rounded

    def distilled(self, recipes: Assignment, rounded: Rounded, variant: Variant) -> Rounded:
        """With the calibration text, and more that the model has written after it."""
        steps = variant.distilled
        if steps not in self._enough:
            self._enough[steps] = enough_text(self.source.load(), self.ids, steps)
        model = self.source.load()
        streamed = StreamedModel(model, gradient_dtype(self.source.dtype, "cpu"))
        return distill(streamed, self.linears, recipes, rounded, self._enough[steps], steps)

    def figures(self, variant: Variant, bits: float) -> dict[str, Any]:
        scores, units, options = self.scores(variant)
        budget = Budget(avg_bits=bits, ignore_scale_bits=True)
        problem = Problem.build(units, options, scores, True, bool(variant.slabs))
        allocation = problem.allocate(budget, "optimal")
        if variant.refined:
            allocation = self.refined(problem, allocation, budget)
        plan = problem.plan(allocation, "optimal", budget)
        recipes, start = plan.assignment, time.perf_counter()
        rounded = self.rounded(recipes, variant)
        seconds = time.perf_counter() - start
        quantized = RoundedModel(self.model, self.linears, recipes, rounded)
        kl = sequence_kl(self.model, quantized, self.held_out)
        return {
            "kl": float(kl.mean()),
            "kl_stderr": float(kl.std()) / math.sqrt(len(kl)),
            "bits_without_scales": average_bits(self.linears, recipes, True),
            "bits": average_bits(self.linears, recipes),
            "predicted": plan.data["predicted_loss"],
            "round_seconds": round(seconds, 2),
        }


def peers(path: Path, model: str) -> dict[tuple[str, str], float]:
    """(rounding, bits) -> KL of AutoScheme's MXFP4 and MXFP8 rows."""
    with path.open(newline="") as file:
        return {
            (row["rounding"], f"{float(row['asked']):g}"): float(row["kl"])
            for row in csv.DictReader(file)
            if row["model"] == model and row["schemes"] == "MXFP4,MXFP8"
        }


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def print_table(records: Records, model: str, sha256: str, bits: Sequence[str]) -> None:
    """KL of every variant, and the geometric means of its ratios to AutoScheme."""
    theirs = peers(AUTOSCHEME, model)
    rows = [[f"{model}, 1e-3 nats", *bits, "to plain", "worst", "to opt", "to tuned"]]
    for rounding in ROUNDINGS:
        cells = [theirs.get((rounding, b)) for b in bits]
        shown = [f"{kl * 1e3:.1f}" if kl else "-" for kl in cells]
        rows.append([f"AutoScheme, {rounding}", *shown, "", "", "", ""])
    for name in VARIANTS:
        keys = [
            {"model": model, "variant": name, "asked": b, "calibration_sha256": sha256}
            for b in bits
        ]
        found = [records.find(**key) for key in keys]
        if not any(found):
            continue
        ours = {b: float(row["kl"]) for b, row in zip(bits, found, strict=True) if row}
        ratios = {
            rounding: [
                kl / theirs[rounding, b] for b, kl in ours.items() if (rounding, b) in theirs
            ]
            for rounding in ROUNDINGS
        }
        plain = ratios["plain"]
        means = [f"{geometric_mean(plain):.3f}", f"{max(plain, default=math.nan):.3f}"]
        others = [f"{geometric_mean(ratios[rounding]):.3f}" for rounding in ROUNDINGS[1:]]
        cells = [f"{ours[b] * 1e3:.1f}" if b in ours else "-" for b in bits]
        rows.append([name, *cells, *means, *others])
    print("\n" + table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation")
    add_text_options(parser)
    parser.add_argument("--bits", default="4.25,4.5,5,6,7")
    parser.add_argument(
        "--variants", help=f"of: {'; '.join(VARIANTS)} (default: none that is tuned or distilled)"
    )
    parser.add_argument("--skip", type=int, default=0, help="sequences (at most 32)")
    parser.add_argument("--csv", type=Path, default=Path("ablation.csv"))
    args = parser.parse_args()
    quiet()
    quick = [n for n, v in VARIANTS.items() if v.rounding != "tuned" and not v.distilled]
    names = args.variants.split(";") if args.variants else quick
    names = [name.strip() for name in names]
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"--variants must be of {'; '.join(VARIANTS)}: got {sorted(unknown)}")
    bits = args.bits.split(",")
    with tempfile.TemporaryDirectory() as folder:
        counts = args.nsamples, args.eval_nsamples
        text = make_text(args.model, Path(folder), args.dataset, counts, args.seqlen, args.marker)
        model = "demo" if args.model == "demo" else Path(args.model).resolve().name
        subject = Subject(model, text, args.skip)
    sha256 = text.calibration_sha256[:16] + (f"+{args.skip}" if args.skip else "")
    records = Records(args.csv, COLUMNS, KEY)
    for name in names:
        for b in bits:
            key = {"model": model, "variant": name, "asked": b, "calibration_sha256": sha256}
            if records.find(**key) is None:
                row = records.append({**key, **subject.figures(VARIANTS[name], float(b))})
                print(f"{name:<34} {b:>5} {float(row['kl']) * 1e3:8.1f}", flush=True)
    print_table(records, model, sha256, bits)


if __name__ == "__main__":
    main()
