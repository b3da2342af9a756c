"""Does the gate keep its promise on other text? `python -m benchmarks.quality.gate demo MODEL...`

    python -m benchmarks.quality.gate demo stories3m --dataset tinystories.txt --csv gate.csv

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from benchmarks.quality.ablation import VARIANTS, Subject
from benchmarks.tools.records import Records
from benchmarks.tools.text import DEMO, GATE, make_text
from mixbits.command import quiet
from mixbits.measuring.evaluate import sequence_kl
from mixbits.pipeline.candidates import Candidate, contest
from mixbits.pipeline.gate import behind, choose, judge
from mixbits.pipeline.roundings import plain
from mixbits.planning.plan import average_bits
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
    """What a seed stands for: a model with its text, a variant, and a budget."""

    subject: Subject
    variant: str
    bits: float

    @classmethod
    def draw(cls, seed: int, subjects: Sequence[Subject], calibrated: int) -> Trial:
        rng = random.Random(seed)
        subject, variant = rng.choice(subjects), rng.choice(VARIED)
        ids = torch.cat([subject.ids, subject.held_out])
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        parts = ids.tensor_split([calibrated, calibrated + GATE])
        return cls(subject.with_text(*parts), variant, round(rng.uniform(4.5, 7.5), 2))

    def run(self) -> list[dict[str, Any]]:
        """A row for every baseline."""
        run = self.subject.run(**VARIANTS[self.variant], avg_bits=self.bits)
        subject, text, planned = self.subject.planned(run)
        found = contest(run.settings, planned.plans, text.correction)
        decision = choose(subject, found, text.gate.ids)
        recipes, fresh = decision.winner.plan.assignment, self.subject.held_out
        winner = RoundedModel(subject.streamed, run.linears, recipes, decision.outcome.weights)
        kl = sequence_kl(subject.streamed, winner, fresh)
        common = {
            "model": self.subject.name,
            "variant": self.variant,
            "asked": self.bits,
            "bits": average_bits(run.linears, recipes),
            "winner": decision.winner.name,
            "kl": float(kl.mean()),
        }
        rows = []
        for name in (name for name in BASELINES if name in planned.plans):
            how = plain(run.settings.rounding, text.correction)
            other = Candidate(name, planned.plans[name], how)
            other_kl = judge(subject, other, fresh)[1]
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.gate")
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
