"""What each part gains, beside AutoScheme: `python -m benchmarks.quality.ablation MODEL`.

    python -m benchmarks.quality.ablation stories3m --dataset tinystories.txt --csv ablation.csv
    python -m benchmarks.quality.ablation demo --variants everything --bits 4.5

MODEL is a folder, or `demo` for the bundled model and its text. Variants go from AutoRound's
numerics (scales of the OCP rule, nearest rounding, one scheme for a linear) to everything on. All
are measured on the same tokens as AutoScheme's rows in `benchmarks/results/autoscheme.csv`
(`python -m benchmarks.peers.autoscheme`), rounded in memory and compared on the same held-out
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
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from benchmarks.peers.autoscheme import add_text_options
from benchmarks.tools.records import Records
from benchmarks.tools.text import Text, make_text
from mixbits.command import quiet
from mixbits.measuring.evaluate import sequence_kl
from mixbits.measuring.scores import Scores
from mixbits.measuring.text import Sequences
from mixbits.pipeline import texts
from mixbits.pipeline.candidates import contest
from mixbits.pipeline.plans import Planned, make_plans, refine_plan
from mixbits.pipeline.process import make_subject, with_device
from mixbits.pipeline.roundings import Subject as Rounded
from mixbits.pipeline.rules import settled
from mixbits.pipeline.run import Run, prepare
from mixbits.pipeline.scoring import measure
from mixbits.pipeline.settings import DISTILL_STEPS, REFINE_ROUNDS, TUNE_STEPS
from mixbits.planning.plan import average_bits
from mixbits.report.tables import table
from mixbits.rounding.whole_model import RoundedModel
from mixbits.source.source import open_source

ROUNDINGS = ("plain", "opt", "tuned")  # of AutoScheme's rows
AUTOSCHEME = Path(__file__).parents[1] / "results" / "autoscheme.csv"


# Settings of `python -m mixbits.quantize`, beside schemes, a budget and text.
NEAREST = {"rounding": "rtn", "act_scale_mode": "even"}
FLOOR = {**NEAREST, "act_scale_mode": "floor"}
SLABS = {"granularity": "slab"}
FREE = {**SLABS, "free_slabs": True}
ROTATED = {"rotate": "ffn"}
GPTQ = {"rounding": "gptq", "correction": 0.5}
EVERYTHING = {**GPTQ, **SLABS, **ROTATED}
VARIANTS: dict[str, dict[str, Any]] = {
    "layers, floor": FLOOR,
    "layers, floor, refined": {**FLOOR, "refine": REFINE_ROUNDS},
    "layers": NEAREST,
    "layers, search": {"rounding": "search"},
    "layers, gptq": {"rounding": "gptq", "correction": 0.0},
    "layers, gptq corrected": GPTQ,
    "layers, tuned": {**NEAREST, "tune": TUNE_STEPS},  # by auto-round itself
    "layers, rotated, gptq corrected": {**GPTQ, **ROTATED},
    "slabs, floor": {**FLOOR, **SLABS},
    "free slabs, floor": {**FLOOR, **FREE},
    "slabs": {**NEAREST, **SLABS},
    "slabs, rotated": {**NEAREST, **SLABS, **ROTATED},
    "slabs, gptq corrected": {**GPTQ, **SLABS},
    "everything": EVERYTHING,
    "everything, free slabs": {**EVERYTHING, **FREE},
    "layers, distilled": {**GPTQ, "distill": DISTILL_STEPS},
    "everything, distilled": {**EVERYTHING, "distill": DISTILL_STEPS},
    "everything, free slabs, distilled": {**EVERYTHING, **FREE, "distill": DISTILL_STEPS},
    "everything, free slabs, distilled twice as long": {
        **EVERYTHING,
        **FREE,
        "distill": 2 * DISTILL_STEPS,
    },
}
KEY = ("model", "variant", "asked", "calibration_sha256")
COLUMNS = (*KEY, "kl", "kl_stderr", "bits_without_scales", "bits", "predicted", "round_seconds")


class Subject:
    """One model with its tokens: sequences to calibrate with, to choose by, and to judge by."""

    def __init__(self, name: str, text: Text, skip: int) -> None:
        self.name = name
        self.source = open_source(text.model)
        self.model = self.source.load()
        dataset = torch.from_numpy(np.load(text.dataset).astype(np.int64))
        count = len(np.load(text.calibration))
        self.ids = dataset[skip : skip + count]
        self.gate = self.ids[:0]
        self.held_out = torch.from_numpy(np.load(text.held_out).astype(np.int64))
        self._scores: dict[Any, Scores] = {}

    def with_text(self, ids: torch.Tensor, gate: torch.Tensor, held_out: torch.Tensor) -> Subject:
        """The same model with other sequences."""
        other = copy.copy(self)
        other.ids, other.gate, other.held_out, other._scores = ids, gate, held_out, {}
        return other

    def run(self, **settings: Any) -> Run:
        """A run of the product's, of MXFP4 and MXFP8."""
        given = {"model": str(self.source.path), "schemes": "MXFP4,MXFP8", "gate": len(self.gate)}
        made = with_device(settled({**given, "out": "none", **settings}))
        return prepare(made, self.source)

    def planned(self, run: Run) -> tuple[Rounded, texts.Text, Planned]:
        """Its plans; scores are measured once for all that arrange columns alike."""
        settings, parts = run.settings, (self.ids, self.gate, self.held_out)
        text = texts.Text(*(Sequences(ids, "ids") for ids in parts))
        text.correction = settings.correction or 0.0
        subject = make_subject(run, self.model, text)
        key = settings.scale_modes, settings.granularity, settings.free_slabs, settings.rotate
        if key not in self._scores:
            self._scores[key] = measure(run, self.model, text.calibration, "")
        planned = make_plans(run, self._scores[key], subject, text)
        if settings.refine:
            refine_plan(run, subject, planned, text)
        return subject, text, planned

    def figures(self, variant: str, bits: float) -> dict[str, Any]:
        run = self.run(**VARIANTS[variant], avg_bits=bits, ignore_scale_bits=True)
        subject, text, planned = self.planned(run)
        (candidate,) = contest(run.settings, planned.plans, text.correction).first
        recipes, start = candidate.plan.assignment, time.perf_counter()
        rounded = candidate.rounded(subject).weights
        seconds = time.perf_counter() - start
        quantized = RoundedModel(subject.streamed, run.linears, recipes, rounded)
        kl = sequence_kl(subject.streamed, quantized, self.held_out)
        return {
            "kl": float(kl.mean()),
            "kl_stderr": float(kl.std()) / math.sqrt(len(kl)),
            "bits_without_scales": average_bits(run.linears, recipes, True),
            "bits": average_bits(run.linears, recipes),
            "predicted": candidate.plan.data["predicted_loss"],
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.ablation")
    add_text_options(parser)
    parser.add_argument("--bits", default="4.25,4.5,5,6,7")
    parser.add_argument(
        "--variants", help=f"of: {'; '.join(VARIANTS)} (default: none that is tuned or distilled)"
    )
    parser.add_argument("--skip", type=int, default=0, help="sequences (at most 32)")
    parser.add_argument("--csv", type=Path, default=Path("ablation.csv"))
    args = parser.parse_args()
    quiet()
    quick = [n for n, v in VARIANTS.items() if not ("tune" in v or "distill" in v)]
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
                row = records.append({**key, **subject.figures(name, float(b))})
                print(f"{name:<34} {b:>5} {float(row['kl']) * 1e3:8.1f}", flush=True)
    print_table(records, model, sha256, bits)


if __name__ == "__main__":
    main()
