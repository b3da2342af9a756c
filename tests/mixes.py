"""Linears in segments, of random weights: as operands, as modules, and what they must give."""

from __future__ import annotations

import torch

from mixbits import ops
from mixbits.formats.arrange import Arrangement
from mixbits.formats.pack import Operand, Part, order_dtype
from mixbits.formats.schemes import Recipe, parse_scheme
from mixbits.runtime.linear import PackedLinear
from mixbits.runtime.swap import swap_linears

# Names of segments' schemes, with columns: whole blocks, blocks across a boundary, a short end.
SEGMENTS = {
    "slabs": (("MXFP8", 64), ("MXFP4", 96)),
    "short end": (("MXFP8", 32), ("MXFP4", 140)),
    "across blocks": (("MXFP4", 33), ("MXFP8", 50), ("MXFP8E5M2", 17)),
    "weights only": (("W8A16", 128), ("W4A16", 160), ("W2A16G32ASYM", 1)),
    "both": (("MXFP8A16", 40), ("MXFP4", 31), ("W4A16ASYM", 130), ("MXFP4A16", 7)),
    "two planes": (("MXFP6", 40), ("W3A16G32ASYM", 98), ("W5A16", 31), ("W6A16G64ASYM", 65)),
    "NVFP4": (("NVFP4A16", 40), ("MXFP4", 33), ("NVFP4A16", 99)),
    "MXINT8": (("MXINT8", 40), ("MXFP4xMXINT8", 31), ("W4xMXINT8", 97)),
    "one": (("MXFP4", 172),),
    "many columns": (("MXFP8", 1024), ("MXFP4", 3072)),
}
ARRANGED = {"natural": (False, False), "ordered": (True, False), "rotated": (True, True)}


def hadamard_matrix(size: int) -> torch.Tensor:
    """Sylvester's construction: H(2n) = [[H, H], [H, -H]]."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def meets_integers(fmt):
    """Whether the CPU may take x that has no format for integers, beside weights in `fmt`."""
    return fmt.element not in ("e4m3", "e5m2")


def make_mix(segments, arranged, rows):
    """An `Operand` of random weights, and what it stands for: float64 [N, K].

    `segments` are schemes with their columns, or the name of some.
    """
    ordered, rotated = ARRANGED[arranged]
    segments = SEGMENTS.get(segments, segments)
    parts, values = [], []
    for name, columns in segments:
        scheme = parse_scheme(name)
        packed = ops.quantize_pack(torch.randn(rows, columns), scheme.weight, "reference")
        parts.append(Part(packed, scheme.weight, scheme.activation))
        values.append(ops.dequantize(packed, scheme.weight, columns, backend="reference"))
    columns = tuple(n for _, n in segments)
    order = torch.randperm(sum(columns)).to(order_dtype(sum(columns))) if ordered else None
    return Operand(tuple(parts), columns, order, rotated), torch.cat(values, 1).double()


def exact_product(x, mix, values):
    """In float64, of x rounded as the reference does; and the sums of magnitudes."""
    order = None if mix.order is None else mix.order.long()
    pieces = []
    for piece, one in zip(
        Arrangement(order, mix.rotated).input(x).split(mix.columns, -1), mix.parts, strict=True
    ):
        rounded = piece
        if one.activation is not None:
            rounded = ops.fake_quantize(piece, one.activation, "reference")
        pieces.append(rounded.double())
    rounded = torch.cat(pieces, 1)
    return rounded @ values.T, rounded.abs() @ values.abs().T, rounded


def filled(weight, recipe, bias=None):
    return PackedLinear.from_weight(weight, recipe, bias)


def slab_recipe(columns, low="MXFP4", high="MXFP8", rotated=False, seed=0, order_in_producer=False):
    """A third of the columns, in blocks of 32, in the higher scheme; blocks in random order."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.arange(columns // 32 * 32).unflatten(0, (-1, 32))
    shuffled = blocks[torch.randperm(len(blocks), generator=generator)].flatten().tolist()
    order = (*shuffled, *range(len(shuffled), columns))
    first = max(32, columns // 96 * 32)
    segments = ((parse_scheme(high), first), (parse_scheme(low), columns - first))
    return Recipe(segments, order, rotated, order_in_producer)


def packed_copy(model, schemes):
    """Replace the linears of `model` by packed ones, in place."""

    def make(name, weight, bias):
        return PackedLinear.from_weight(weight, schemes[name], bias, name)

    swap_linears(model, list(schemes), make)
    return model
