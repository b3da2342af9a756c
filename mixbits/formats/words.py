"""Codes one behind the other in a stream of bits, as other engines store them: no planes.

The first code is in the lowest bits of the first byte; a code of 3, 5, 6 or 7 bits may begin in one
byte and end in the next. 32-bit words of such a stream are its bytes four by four.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K], each below 2^bits -> bytes [..., ceil(K * bits / 8)]."""
    columns = codes.shape[-1]
    eights = torch.nn.functional.pad(codes, (0, -columns % 8)).unflatten(-1, (-1, 8))
    numbers = eights[..., 0].long()
    for place in range(1, 8):
        numbers = numbers | eights[..., place].long() << bits * place
    stream = numbers.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    return stream[..., : -(-columns * bits // 8)]


def unpack_stream(stream: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_stream`; `columns` is K, and bytes behind those of K codes are not read."""
    used = stream[..., : -(-columns * bits // 8)]
    whole = torch.nn.functional.pad(used, (0, -used.shape[-1] % bits)).unflatten(-1, (-1, bits))
    numbers = torch.nn.functional.pad(whole, (0, 8 - bits)).view(torch.int64)
    masked = (numbers >> bits * place & (1 << bits) - 1 for place in range(8))
    codes = torch.cat([one.to(torch.uint8) for one in masked], -1)
    return codes.flatten(-2)[..., :columns]


def words(stream: Tensor) -> Tensor:
    """uint8 [N, B] -> int32 [N, ceil(B / 4)], the first byte the lowest; the last is filled up."""
    return torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4)).view(torch.int32)
