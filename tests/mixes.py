"""Linears in segments, of random weights: as operands, as modules, and what they must give."""

from __future__ import annotations

import torch

from mixbits import ops
from mixbits.formats.arrange import Arrangement
from mixbits.formats.pack import Mix, Operand, order_dtype, recipe_tensors
from mixbits.formats.schemes import Mixed, parse_scheme
from mixbits.rounding.nearest import pack_recipe
from mixbits.runtime.linear import (
    PackedLinear,
    packed_linear,
    swap_linears,
)

# Names of segments' schemes, with columns: whole blocks, blocks across a boundary, a short end.
SEGMENTS = {
    "slabs": (("MXFP8", 64), ("MXFP4", 96)),
    "short end": (("MXFP8", 32), ("MXFP4", 140)),
    "across blocks": (("MXFP4", 33), ("MXFP8", 50), ("MXFP8E5M2", 17)),
    "weights only": (("W8A16", 128), ("W4A16", 160), ("W2A16G32ASYM", 1)),
    "both": (("MXFP8A16", 40), ("MXFP4", 31), ("W4A16ASYM", 130), ("MXFP4A16", 7)),
    "one": (("MXFP4", 172),),
    "many columns": (("MXFP8", 1024), ("MXFP4", 3072)),
}
ARRANGED = {"natural": (False, False), "ordered": (True, False), "rotated": (True, True)}


def make_mix(segments, arranged, rows):
    """A `Mix` of random weights, and what it stands for: float64 [N, K].

    `segments` are schemes with their columns, or the name of some.
    """
    ordered, rotated = ARRANGED[arranged]
    segments = SEGMENTS.get(segments, segments)
    operands, values = [], []
    for name, columns in segments:
        scheme = parse_scheme(name)
        packed = ops.quantize_pack(torch.randn(rows, columns), scheme.weight, "reference")
        operands.append(Operand(packed, scheme.weight, scheme.activation))
        values.append(ops.dequantize(packed, scheme.weight, columns, backend="reference"))
    columns = tuple(n for _, n in segments)
    order = torch.randperm(sum(columns)).to(order_dtype(sum(columns))) if ordered else None
    return Mix(tuple(operands), columns, order, rotated), torch.cat(values, 1).double()


def exact_product(x, mix, values):
    """In float64, of x rounded as the reference does; and the sums of magnitudes."""
    order = None if mix.order is None else mix.order.long()
    pieces = []
    for piece, one in zip(
        Arrangement(order, mix.rotated).input(x).split(mix.columns, -1), mix.operands, strict=True
    ):
        rounded = piece
        if one.activation is not None:
            rounded = ops.fake_quantize(piece, one.activation, "reference")
        pieces.append(rounded.double())
    rounded = torch.cat(pieces, 1)
    return rounded @ values.T, rounded.abs() @ values.abs().T, rounded


def filled(weight, recipe, bias=None):
    linear = packed_linear(weight, recipe, bias)
    for name, value in recipe_tensors(recipe, pack_recipe("weight", weight, recipe)).items():
        owner, _, leaf = name.rpartition(".")
        setattr(linear.get_submodule(owner), leaf, value)
    return linear


def slab_recipe(columns, low="MXFP4", high="MXFP8", rotated=False, seed=0, folded=False):
    """A third of the columns, in blocks of 32, in the higher scheme; blocks in random order."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.arange(columns // 32 * 32).unflatten(0, (-1, 32))
    shuffled = blocks[torch.randperm(len(blocks), generator=generator)].flatten().tolist()
    order = (*shuffled, *range(len(shuffled), columns))
    first = max(32, columns // 96 * 32)
    segments = ((parse_scheme(high), first), (parse_scheme(low), columns - first))
    return Mixed(segments, order, rotated, folded)


def packed_copy(model, schemes):
    """Replace the linears of `model` by packed ones, in place."""

    def make(name, weight, bias):
        return PackedLinear.from_weight(weight, schemes[name], bias, name)

    swap_linears(model, list(schemes), make)
    return model
