"""Packed against fake: `python -m benchmarks.quality.exactness MODEL --dataset text.txt`.

For every scheme and instruction set: the largest logit difference between the packed model and
the fake-quantized one, and, as a yardstick, that between torch's own float32 (and bfloat16) and
float64 on the same fake-quantized model. A ratio of at most 2 means that the kernels are as good
as torch's matmul.

Where activations are rounded, a sum that differs in its last bit can move an activation to the
next code, or a block to the next exponent; such jumps are in all columns alike. So the figure
is also taken linear by linear, on equal inputs, where nothing can jump; and the sequences are
counted on which a jump happened between packed and fake, and between torch's two precisions.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from mixbits.backends import cpu
from mixbits.command import quiet
from mixbits.formats.schemes import Recipe, Scheme, parse_scheme
from mixbits.measuring.text import load_sequences
from mixbits.model.layout import find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.report.clock import environment
from mixbits.report.tables import table
from mixbits.rounding.nearest import fake_input
from mixbits.runtime.fake import FakeLinear, fake_quantize_model
from mixbits.runtime.linear import PackedLinear
from mixbits.runtime.swap import swap_linears
from mixbits.source.source import Source, open_source

SCHEMES = "MXFP4,MXFP8,MXFP8E5M2,MXFP4A16,MXFP8A16,MXFP8E5M2A16,W2A16,W4A16,W8A16,W4A16ASYM"


def packed_model(source: Source, schemes: dict[str, Scheme]) -> torch.nn.Module:
    model = source.load()
    swap_linears(
        model,
        list(schemes),
        lambda n, w, b: PackedLinear.from_weight(w, Recipe.plain(schemes[n]), b, n),
    )
    return model


def fake_model(source: Source, schemes: dict[str, Scheme]) -> torch.nn.Module:
    model = source.load()
    fake_quantize_model(model, {name: Recipe.plain(s) for name, s in schemes.items()})
    return model


@torch.no_grad()
def linear_ratio(packed: torch.nn.Module, fake: torch.nn.Module, names: list[str]) -> float:
    """Largest packed error over torch's float32 error, both to float64, over all linears."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for name in names:
        one, two = packed.get_submodule(name), fake.get_submodule(name)
        assert isinstance(one, PackedLinear) and isinstance(two, FakeLinear)
        x = torch.randn(64, one.in_features, generator=generator)
        rounded = fake_input(x, two.recipe, two.arrangement)
        exact = rounded.double() @ two.weight_fake.double().T
        own = (torch.nn.functional.linear(rounded, two.weight_fake) - exact).abs().max()
        worst = max(worst, float((one(x) - exact).abs().max() / own))
    return worst


def sequences_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """Sequences on which a jump has happened: far more than sums differ, far less than it makes."""
    return int(((a - b).abs().amax((1, 2)) > 1e-3).sum())


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    source = open_source(args.model)
    vocab = source.config.get_text_config().vocab_size
    ids = load_sequences(args.dataset, source.tokenizer(), vocab, 0, args.sequences, 256)[1].ids
    names = [info.name for info in find_linears(source.load())]
    rows = []
    for scheme_name in args.schemes.split(","):
        scheme = parse_scheme(scheme_name)
        schemes = dict.fromkeys(names, scheme)
        fake = fake_model(source, schemes)
        exact = StreamedModel(fake, torch.float64).logits(ids)
        reference = StreamedModel(fake).logits(ids)
        bfloat16 = StreamedModel(fake, torch.bfloat16).logits(ids)
        own, apart = (reference - exact).abs().max(), sequences_apart(reference, exact)
        packed = packed_model(source, schemes)
        for isa in cpu.available_isas():
            cpu.set_isa(isa)
            logits = StreamedModel(packed).logits(ids)
            gap = (logits - reference).abs().max()
            row = {"model": source.path.name, "scheme": scheme_name, "isa": isa}
            figures: dict[str, Any] = {"logit_gap": gap, "torch_float32": own}
            figures["torch_bfloat16"] = (bfloat16.double() - exact).abs().max()
            figures["gap_over_float32"] = gap / own
            figures["worst_linear_over_float32"] = linear_ratio(packed, fake, names)
            figures["sequences_apart"] = sequences_apart(logits, reference)
            figures["torch_sequences_apart"] = apart
            rows.append({**row, **{k: float(v) for k, v in figures.items()}})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.exactness")
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    quiet()
    rows = run(args)
    keys = [k for k in rows[0] if k != "model"]
    cells = [[str(v) if isinstance(v := r[k], str) else f"{v:.3g}" for k in keys] for r in rows]
    print(f"\n{rows[0]['model']}, {environment()['machine']}")
    print(table([keys, *cells]))
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
