"""One scheme for all linears, scheme by scheme: `python -m benchmarks.quality.uniform MODEL`.

    python -m benchmarks.quality.uniform smollm2 --dataset calib_c4.txt --held-out wikitext2.txt \\
        --schemes MXFP4,NVFP4,W5G32xMXINT8 --csv uniform.csv

What each format costs before anything is allocated. Weights are rounded by `--rounding` (gptq from
the quantized inputs, without correction), activations as the scheme says, the head and the
embedding are left alone. Printed are stored bits, KL(original || quantized) in 1e-3 nats per token
and perplexity on other text than that of calibration.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.tools.records import Records
from mixbits.command import quiet
from mixbits.formats.schemes import Assignment, Recipe, parse_scheme
from mixbits.measuring.evaluate import Model, per_sequence, summary
from mixbits.measuring.text import load_sequences
from mixbits.model.layout import find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.planning.plan import average_bits
from mixbits.report.tables import table
from mixbits.rounding.whole_model import RoundedModel, round_model
from mixbits.source.source import open_source

SCHEMES = (
    *("MXFP4", "MXFP4xMXFP8", "MXFP4xMXINT8", "MXFP4A16", "NVFP4", "NVFP4xMXFP8", "W3A16G32"),
    *("W4A16G32", "W5A16G32", "MXFP6", "MXFP6xMXFP8", "W6A16G32", "W6G32xMXINT8", "MXFP8"),
    "MXINT8",
)
TEXT = ("calibration", "nsamples", "held_out", "eval_nsamples", "seqlen")
KEY = ("model", "scheme", "rotate", "rounding", *TEXT)
FIGURES = ("kl", "kl_stderr", "perplexity", "perplexity_reference")
COLUMNS = (*KEY, "bits", *FIGURES)


class Remembered:
    """A model that keeps the logits it gave: of the original, every row asks for the same.

    Four bytes for each token of the text and each of the vocabulary.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[bytes, Tensor] = {}

    def logits(self, ids: Tensor) -> Tensor:
        key = ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model.logits(ids)
        return self.known[key]


class Subject:
    """One model, its linears and its text."""

    def __init__(self, args: argparse.Namespace) -> None:
        source = open_source(args.model)
        self.model = StreamedModel(source.load())
        self.linears = find_linears(self.model.model)
        self.reference = Remembered(self.model)
        vocab, tokenizer = source.config.get_text_config().vocab_size, source.tokenizer()
        length, judged = args.seqlen, args.eval_nsamples
        is_one = args.held_out == args.dataset  # then what judges comes behind
        self.calibration, self.held_out = load_sequences(
            args.dataset, tokenizer, vocab, args.nsamples, judged if is_one else 0, length
        )
        if not is_one:
            _, self.held_out = load_sequences(args.held_out, tokenizer, vocab, 0, judged, length)

    def uniform(self, scheme_name: str, rotate: str) -> Assignment:
        scheme = parse_scheme(scheme_name, act_scale_mode="even")
        rotated = rotate == "all"
        return {i.name: Recipe.whole(scheme, i.in_features, rotated) for i in self.linears}

    def figures(self, recipes: Assignment, rounding: str) -> dict[str, Any]:
        """`bits` stored, and FIGURES of the linears so rounded."""
        figures, _ = self.judged(self.rounded(recipes, rounding))
        return {"bits": average_bits(self.linears, recipes), **figures}

    def rounded(self, recipes: Assignment, rounding: str) -> RoundedModel:
        ids = self.calibration.ids
        rounded = round_model(self.model, self.linears, recipes, rounding, ids, correction=0.0)
        return RoundedModel(self.model, self.linears, recipes, rounded)

    def judged(self, quantized: Model) -> tuple[dict[str, float], Tensor]:
        """FIGURES of a model, and the KL of every held-out sequence."""
        first = self.held_out.judged_from
        means = per_sequence(self.reference, quantized, self.held_out.ids, first=first)
        found = summary(means)
        return {name: found[name] for name in FIGURES}, means[:, 0]


def make_parser(name: str) -> argparse.ArgumentParser:
    """What a Subject is made of."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("model", help="a folder")
    parser.add_argument("--dataset", required=True, help="text to calibrate with")
    parser.add_argument("--held-out", required=True, help="text to judge by")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--eval-nsamples", type=int, default=24)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rotate", default="none", choices=("none", "all"))
    return parser


def key_of(args: argparse.Namespace) -> dict[str, str]:
    """What names a row, beside what is quantized and how."""
    found = {"model": Path(args.model).resolve().name, "rotate": args.rotate}
    found |= {"calibration": Path(args.dataset).name, "held_out": Path(args.held_out).name}
    return found | {n: str(getattr(args, n)) for n in ("nsamples", "eval_nsamples", "seqlen")}


def main() -> None:
    parser = make_parser("quality.uniform")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--rounding", default="search,gptq", help="of rtn, search, gptq")
    parser.add_argument("--csv", type=Path, default=Path("uniform.csv"))
    args = parser.parse_args()
    quiet()
    subject, records = Subject(args), Records(args.csv, COLUMNS, KEY)
    roundings, rows = args.rounding.split(","), [["scheme", "bits"]]
    rows[0] += [f"{what}, {rounding}" for rounding in roundings for what in ("KL", "perplexity")]
    for name in args.schemes.split(","):
        cells: list[str] = []
        for rounding in roundings:
            key = {**key_of(args), "scheme": name, "rounding": rounding}
            row = records.find(**key)
            if row is None:
                figures = subject.figures(subject.uniform(name, args.rotate), rounding)
                row = records.append({**key, **figures})
            bits = f"{float(row['bits']):.3f}"
            cells += [f"{float(row['kl']) * 1e3:.1f}", f"{float(row['perplexity']):.1f}"]
        rows.append([name, bits, *cells])
        print(*rows[-1], flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
