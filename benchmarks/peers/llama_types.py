"""llama.cpp's types beside our plans of the same size, on one text.

    python -m benchmarks.peers.llama_types smollm2 --dataset c4.txt --held-out wikitext2.txt \\
        --types Q4_0,Q4_K,Q4_K_M --menu cpu=cpu --rounding gptq --rotate all --csv types.csv

Every linear of the blocks is quantized by ggml's own quantizer into a type, its columns weighed by
an importance matrix of the calibration text; embedding and head are left in 16 bits. The model then
runs in float32 with the values that the bytes stand for, on inputs as they are; with `--inputs 8`
on what ggml's CPU kernels make of them. `benchmarks.quality.uniform` judges it as it does our
schemes.

A type is what `llama-quantize --pure` makes: the type itself, or llama.cpp's substitute where rows
are not made of its blocks, and stored bits are of what resulted. Q4_K_M and Q5_K_M are its mixtures
for a Llama. For each `--menu`, our best plan by whole linears of at most the type's bits is judged
too: printed are the paired differences, with their intervals of 95 %. KLs are in 1e-3 nats per
token. Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import mixbits
from benchmarks.peers import ggml
from benchmarks.quality.menus import Menu, menu, scores_of
from benchmarks.quality.uniform import FIGURES, TEXT, Subject, key_of, make_parser
from benchmarks.tools.records import Records
from mixbits.command import quiet
from mixbits.errors import UsageError, first_line
from mixbits.formats.schemes import Assignment
from mixbits.measuring.evaluate import Model
from mixbits.model.families import family_of
from mixbits.model.layout import LinearInfo, output_head, weight_of
from mixbits.model.probing import probed
from mixbits.model.streaming import StreamedModel, patched
from mixbits.pipeline.gate import behind
from mixbits.planning.allocate import BudgetError
from mixbits.planning.plan import average_bits
from mixbits.report.tables import table

MIXTURES = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
MORE = "Q6_K"  # what some values and FFN outputs have in a mixture
TYPES = (
    *("Q3_K", "IQ3_S", "MXFP4", "IQ4_XS", "Q4_0", "IQ4_NL", "Q4_K", "Q4_1", "Q4_K_M"),
    *("Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0"),
)
KEY = ("model", "what", "inputs", "schemes", "avg_bits", "rotate", "rounding", *TEXT)
COLUMNS = (*KEY, "bits", "substituted", "substitutes", *FIGURES, "kls")
BATCH = 8  # sequences at a time while inputs are measured


# --- what llama.cpp would do -------------------------------------------------------------------


@torch.no_grad()
def importance(
    model: StreamedModel, linears: Sequence[LinearInfo], ids: Tensor
) -> dict[str, Tensor]:
    """linear -> float32 [K], the mean square of each input column over the tokens that reach it.

    Of the original model on ids [sequences, length]: llama.cpp's imatrix. An expert that no token
    reaches has none.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys((info.name for info in linears), 0)

    def probe(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.flatten(0, -2).double()
        sums[name] = sums.get(name, 0) + rows.square().sum(0)
        counts[name] += len(rows)
        return linear(x, weight, bias)

    head = output_head(model.model)[1]
    with probed(model.model, linears, probe), patched(head, lambda x: x[..., :1]):
        for batch in ids.split(BATCH):
            model.logits(batch)
    return {name: (total / counts[name]).float() for name, total in sums.items() if counts[name]}


def has_more(block: int, blocks: int) -> bool:
    """Whether a mixture spends more on a block: the first and last eighth, every third between."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def types_of(what: str, linears: Sequence[LinearInfo], config: Any) -> dict[str, str]:
    """linear -> its type, where `what` is asked for: a type, or one of MIXTURES."""
    plain, text = MIXTURES.get(what, what), config.get_text_config()
    family, blocks = family_of(text), text.num_hidden_layers
    raised = {family.attention[2], family.ffn_output} if what in MIXTURES else set()
    leaves = {info.name.rpartition(".")[2] for info in linears}
    if not raised <= leaves or (raised and any(i.is_expert or i.among for i in linears)):
        raise SystemExit(f"{what} is known for dense models with {', '.join(sorted(raised))} only")
    found = {}
    for info in linears:
        is_raised = info.name.rpartition(".")[2] in raised and has_more(info.block or 0, blocks)
        found[info.name] = ggml.fitting(MORE if is_raised else plain, info.in_features)
    return found


def asked(what: str) -> set[str]:
    """The types that `what` is made of where rows are made of their blocks."""
    return {MIXTURES[what], MORE} if what in MIXTURES else {what}


class Quantized:
    """A streamed model whose linears have weights of ggml's types: what `Subject.judged` takes.

    types    linear -> type
    columns  linear -> `importance`
    """

    def __init__(
        self,
        subject: Subject,
        types: Mapping[str, str],
        columns: Mapping[str, Tensor],
        rounds_inputs: bool,
    ) -> None:
        self.model, self.linears = subject.model, subject.linears
        self.types, self.rounds_inputs = types, rounds_inputs
        self.packed = {
            i.name: ggml.quantize(
                types[i.name], weight_of(self.model.model, i).detach(), columns.get(i.name)
            )
            for i in self.linears
        }

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [B, S, V] of token ids [B, S]."""

        def probe(name: str, x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
            kind = self.types[name]
            weight = ggml.dequantize(kind, self.packed[name], x.shape[-1])
            return linear(ggml.rounded_inputs(kind, x) if self.rounds_inputs else x, weight, bias)

        with probed(self.model.model, self.linears, probe):
            return self.model.logits(ids)


# --- rows --------------------------------------------------------------------------------------


def best_of(
    scores: mixbits.Scores, schemes: Sequence[str], bits: float, elements: int
) -> Assignment | None:
    """The plan of at most `bits` per weight, of `elements` weights; None if none is so small."""
    try:
        return mixbits.allocate(scores, avg_bits=bits, schemes=schemes).plan.assignment
    except UsageError as error:
        if not isinstance(reach := error.__cause__, BudgetError):
            raise
    dearest = reach.highest / elements
    return best_of(scores, schemes, dearest, elements) if bits > dearest else None


class Bench:
    """The subject, and the rows that are known of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.subject = args, Subject(args)
        self.records = Records(args.csv, COLUMNS, KEY)
        self.columns: dict[str, Tensor] | None = None
        self.scores: mixbits.Scores | None = None

    def _key(self, **own: str) -> dict[str, str]:
        return {**dict.fromkeys(KEY, ""), **key_of(self.args), **own}

    def _append(self, key: dict[str, str], quantized: Model, **own: Any) -> dict[str, str]:
        figures, kls = self.subject.judged(quantized)
        told = " ".join(f"{kl:.6g}" for kl in kls.tolist())
        return self.records.append({**key, **own, **figures, "kls": told})

    def type_row(self, what: str) -> dict[str, str]:
        """The row of a type or mixture of llama.cpp's."""
        how = {"inputs": self.args.inputs, "rotate": "none", "rounding": "llama.cpp"}
        key = self._key(what=what, **how)
        if (row := self.records.find(**key)) is not None:
            return row
        subject = self.subject
        if self.columns is None:
            self.columns = importance(subject.model, subject.linears, subject.calibration.ids)
        types = types_of(what, subject.linears, subject.model.model.config)
        quantized = Quantized(subject, types, self.columns, self.args.inputs == "8")
        total = sum(info.numel for info in subject.linears)
        moved = [info for info in subject.linears if types[info.name] not in asked(what)]
        return self._append(
            key,
            quantized,
            bits=8 * sum(packed.numel() for packed in quantized.packed.values()) / total,
            substituted=sum(info.numel for info in moved) / total,
            substitutes=" ".join(sorted({types[info.name] for info in moved})),
        )

    def plan_row(self, chosen: Menu, bits: float) -> dict[str, str] | None:
        """The row of our best plan from a menu of at most `bits`; None if none is so small."""
        name, schemes = chosen
        own = {"schemes": " ".join(schemes), "avg_bits": f"{bits:.4f}"}
        key = self._key(what=name, rounding=self.args.rounding, **own)
        if (row := self.records.find(**key)) is not None:
            return row
        if self.scores is None:
            self.scores = scores_of(self.args, self.args.menu)
        subject = self.subject
        elements = sum(info.numel for info in subject.linears)
        if (recipes := best_of(self.scores, schemes, bits, elements)) is None:
            return None
        quantized = subject.rounded(recipes, self.args.rounding)
        return self._append(key, quantized, bits=average_bits(subject.linears, recipes))


# --- the table ---------------------------------------------------------------------------------


def _kls(row: Mapping[str, str]) -> Tensor:
    return torch.tensor([float(kl) for kl in row["kls"].split()], dtype=torch.float64)


def type_cells(row: Mapping[str, str]) -> list[str]:
    """Of a type: its name, bits, what was substituted, KL, its standard error, perplexity."""
    share = float(row["substituted"])
    moved = f"{share:.0%} {row['substitutes']}" if share else ""
    kl, error = (f"{float(row[name]) * 1e3:.2f}" for name in ("kl", "kl_stderr"))
    name = row["what"] + (" x 8 bits" if row["inputs"] == "8" else "")
    bits, perplexity = f"{float(row['bits']):.3f}", f"{float(row['perplexity']):.2f}"
    return [name, bits, moved, kl, error, perplexity]


def plan_cells(row: Mapping[str, str], ours: Mapping[str, str] | None) -> list[str]:
    """Of our plan beside a type: its bits, its KL, and by how much the type's is higher."""
    if ours is None:
        return ["-", "-", "-"]
    found = behind(_kls(row) - _kls(ours))
    difference = f"{found['behind'] * 1e3:+.2f} +- {found['interval'] * 1e3:.2f}"
    return [f"{float(ours['bits']):.3f}", f"{float(ours['kl']) * 1e3:.2f}", difference]


def main() -> None:
    parser = make_parser("peers.llama_types")
    parser.add_argument("--types", default=",".join(TYPES), help="or mixtures (%(default)s)")
    parser.add_argument("--inputs", default="16", choices=("16", "8"), help="bits of the types'")
    parser.add_argument("--menu", type=menu, action="append", default=[], help="NAME=SCHEME,...")
    parser.add_argument("--rounding", default="gptq", help="of plans: rtn, search or gptq")
    parser.add_argument("--csv", type=Path, default=Path("llama_types.csv"))
    args = parser.parse_args()
    names = args.types.split(",")
    for name in names:
        if name not in ggml.TYPES and name not in MIXTURES:
            known = ", ".join((*ggml.TYPES, *MIXTURES))
            parser.error(f"--types must be of {known}: got {name!r}")
    try:
        ggml.library()
    except (ImportError, OSError, AttributeError) as error:
        raise SystemExit(f"llama-cpp-python is needed: {first_line(error)}") from error
    quiet()
    bench = Bench(args)
    rows = [["type", "bits", "substituted", "KL", "stderr", "perplexity"]]
    for name, _ in args.menu:
        rows[0] += [f"{name}: bits", "KL", "type's - ours"]
    for name in names:
        row = bench.type_row(name)
        cells = type_cells(row)
        for chosen in args.menu:
            cells += plan_cells(row, bench.plan_row(chosen, float(row["bits"])))
        rows.append(cells)
        print(*cells, flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
