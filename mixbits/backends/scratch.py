"""The matrix product for many tokens: decode the weight to x's dtype, then let torch multiply.

Decoding costs about as much as reading the weight once in 16 bits. Scaled integers are rounded to
x's dtype, as a model in that dtype does. The scratch is bounded: a large weight is decoded in
blocks of rows. Segments of a linear are decoded side by side, and multiplied as one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..formats.pack import Packed, Piece
from ..formats.schemes import Format

SCRATCH_BYTES = 64 << 20

# out [N, K] of x's dtype, whose rows may be parts of longer ones; packed [N, K]; format
DequantizeInto = Callable[[Tensor, Packed, Format], None]


def matmul_through_scratch(
    x: Tensor, pieces: Sequence[Piece], dtype: torch.dtype, dequantize_into: DequantizeInto
) -> Tensor:
    """x [M, K] times packed weights side by side, [N, K] in all -> [M, N] in `dtype`."""
    x = x.detach()  # products into a given tensor have no gradient
    tokens, columns = x.shape
    rows = pieces[0][0].weight_packed.shape[0]
    block = min(rows, max(1, SCRATCH_BYTES // (columns * x.element_size())))
    scratch = x.new_empty((block, columns))
    out = x.new_empty((tokens, rows))
    for first in range(0, rows, block):
        some = slice(first, min(first + block, rows))
        weight = scratch[: some.stop - first]
        widths = [width for _, _, width in pieces]
        for (packed, fmt, _), target in zip(pieces, weight.split(widths, 1), strict=True):
            dequantize_into(target, packed.rows(some), fmt)
        torch.mm(x, weight.T, out=out[:, some])
    return out.to(dtype)
