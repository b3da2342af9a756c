"""Does the gate keep its promise on other text? `python -m benchmarks.gate demo MODEL...`

    python -m benchmarks.gate demo stories3m --dataset tinystories.txt --csv gate.csv

Every seed draws a model, a budget, a way of rounding and allocating, and the sequences that score,
round, compare and judge. The gate then chooses as `python -m mixbits.quantize` does, and what it
chose is compared with the uniform, head-first and tail-first plans of the same size on sequences
that nothing has seen. Printed are the differences of mean KL, in 1e-3 nats per token, with their
intervals of 95 %: a positive one beyond its interval would break the promise.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from benchmarks.ablation import VARIANTS, Subject
from benchmarks.records import Records
from benchmarks.text import DEMO, GATE, make_text
from mixbits.command import quiet
from mixbits.errors import UsageError
from mixbits.measuring.evaluate import sequence_kl
from mixbits.pipeline.gate import Candidate, behind, candidates, choose, judge
from mixbits.planning.plan import Budget, Plan, average_bits, solve
from mixbits.report.tables import table
from mixbits.rounding.whole_model import RoundedModel

BASELINES = ("uniform", "head", "tail")
VARIED = ("layers", "layers, search", "layers, gptq corrected", "slabs", "everything")
KEY = ("seed", "models", "baseline")
COLUMNS = (
    *KEY,
    *("model", "variant", "asked", "bits", "winner", "kl", "baseline_kl", "behind", "interval"),
)


@dataclass
class Trial:
    """What a seed stands for: a model, a variant, a budget, and who sees which sequences."""

    subject: Subject
    variant: str
    bits: float
    gate: Tensor
    fresh: Tensor

    @classmethod
    def draw(cls, seed: int, subjects: Sequence[Subject], calibrated: int) -> Trial:
        rng = random.Random(seed)
        subject, variant = rng.choice(subjects), rng.choice(VARIED)
        ids = torch.cat([subject.ids, subject.held_out])
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        calibration, gate, fresh = ids.tensor_split([calibrated, calibrated + GATE])
        bits = round(rng.uniform(4.5, 7.5), 2)
        return cls(subject.calibrated_on(calibration), variant, bits, gate, fresh)

    def plans(self) -> dict[str, Plan]:
        """The plan to ship first, and those that it is compared with."""
        scores, units, options = self.subject.scores(VARIANTS[self.variant])
        budget, plans = Budget(avg_bits=self.bits), {}
        if VARIANTS[self.variant].slabs:
            plans["slabs"] = solve(units, options, scores, budget, "optimal", slabs=True)
        for strategy in ("optimal", *BASELINES):
            with suppress(UsageError):  # no single scheme may fit
                plans[strategy] = solve(units, options, scores, budget, strategy)
        return plans

    def run(self) -> list[dict[str, Any]]:
        """A row for every baseline."""
        variant, subject = VARIANTS[self.variant], self.subject
        plans, how = self.plans(), (variant.rounding, subject.ids)
        found = candidates(plans, variant.rounding, variant.correction)
        choice = choose(subject.model, subject.linears, found, *how, self.gate)
        recipes = choice.winner.plan.assignment
        winner = RoundedModel(subject.model, subject.linears, recipes, choice.rounded)
        kl = sequence_kl(subject.model, winner, self.fresh)
        common = {
            "model": subject.name,
            "variant": self.variant,
            "asked": self.bits,
            "bits": average_bits(subject.linears, recipes),
            "winner": choice.winner.name,
            "kl": float(kl.mean()),
        }
        rows = []
        for name in (name for name in BASELINES if name in plans):
            other = Candidate(name, plans[name], variant.correction)
            other_kl = judge(subject.model, subject.linears, other, *how, self.fresh)[1]
            about = {"baseline": name, "baseline_kl": float(other_kl.mean())}
            rows.append({**common, **about, **behind(kl - other_kl)})
        return rows


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """A line for every comparison, and how many broke the promise."""
    lines = [["seed", "model", "variant", "bits", "chosen", "KL", "against", "difference", "+-"]]
    broken = 0
    for row in rows:
        figures = [f"{float(row[k]) * 1e3:.2f}" for k in ("kl", "behind", "interval")]
        about = [row[k] for k in ("seed", "model", "variant", "asked", "winner")]
        lines.append([*about, figures[0], row["baseline"], *figures[1:]])
        broken += float(row["behind"]) > float(row["interval"])
    print("\n" + table(lines))
    print(f"\n  worse than a baseline beyond the interval: {broken} of {len(rows)} comparisons")


def _subjects(args: argparse.Namespace, folder: Path) -> list[Subject]:
    subjects = []
    for model in args.models:
        dataset = None if model == DEMO else args.dataset
        counts = args.nsamples, GATE + args.eval_nsamples
        text = make_text(model, folder, dataset, counts, args.seqlen, args.marker)
        subjects.append(Subject(DEMO if model == DEMO else Path(model).resolve().name, text, 0))
    return subjects


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate")
    parser.add_argument("models", nargs="+", help="model folders, or `demo` for the bundled one")
    parser.add_argument("--dataset", help="text, .jsonl, .npy or .json of token ids, or a name")
    parser.add_argument("--marker", help="what separates documents in the text, such as </s>")
    parser.add_argument("--seeds", type=int, default=20, help="%(default)s")
    parser.add_argument("--nsamples", type=int, default=32, help="to calibrate (%(default)s)")
    parser.add_argument("--eval-nsamples", type=int, default=96, help="to judge (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens (%(default)s)")
    parser.add_argument("--csv", type=Path, default=Path("gate.csv"))
    args = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        subjects = _subjects(args, Path(folder))
    names = " ".join(subject.name for subject in subjects)
    records = Records(args.csv, COLUMNS, KEY)
    for seed in range(args.seeds):
        if any(row["seed"] == str(seed) and row["models"] == names for row in records.rows):
            continue
        for row in Trial.draw(seed, subjects, args.nsamples).run():
            records.append({"seed": seed, "models": names, **row})
    print_table([row for row in records.rows if row["models"] == names])


if __name__ == "__main__":
    main()
