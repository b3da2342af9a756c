"""The matrix product for many tokens: decode the weight to x's dtype, then let torch multiply.

Decoding costs about as much as reading the weight once in 16 bits. Scaled integers are rounded to
x's dtype, as a model in that dtype does. The scratch is bounded: a large weight is decoded in
blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import Format
from ..pack import Packed

SCRATCH_BYTES = 64 << 20

# packed [N, K], format, K, dtype -> [N, K]
Dequantize = Callable[[Packed, Format, int, torch.dtype], Tensor]


def matmul_through_scratch(
    x: Tensor, packed: Packed, fmt: Format, dequantize: Dequantize
) -> Tensor:
    """x [M, K] times packed [N, K] -> [M, N] in x's dtype."""
    tokens, columns = x.shape
    rows = packed.weight_packed.shape[0]
    block = max(1, SCRATCH_BYTES // (columns * x.element_size()))
    if block >= rows:
        return x @ dequantize(packed, fmt, columns, x.dtype).T
    out = x.new_empty((tokens, rows))
    for first in range(0, rows, block):
        last = min(first + block, rows)
        part = dequantize(packed.rows(slice(first, last)), fmt, columns, x.dtype)
        out[:, first:last] = x @ part.T
    return out
