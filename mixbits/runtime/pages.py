"""Weights in large pages of memory.

A matmul of one token reads every weight once, in order. With pages of 4 KB, a processor spends as
long on finding out where the next one is as on reading it, and in a virtual machine longer. Linux
gives anonymous memory pages of 2 MB where a program asks for them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .linear import Segment

_PAGE = 2 << 20
_LINE = 64


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        if isinstance(module, Segment):
            yield from ((module, name, x) for name, x in module._buffers.items() if x is not None)
        elif isinstance(module, nn.Linear):
            yield module, "weight", module.weight


def use_large_pages(model: nn.Module) -> None:
    """Move the weights of a model's linears on the CPU into large pages, where there are such."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    weights = [w for w in _weights(model) if w[2].device.type == "cpu" and w[2].numel()]
    places, size = [], 0
    for _, _, x in weights:
        places.append(size)
        size += -(-x.nbytes // _LINE) * _LINE
    if advice is None or size < _PAGE:
        return
    # Private, as shared memory has pages of its own kind. The tensors keep it.
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
    for (module, name, x), place in zip(weights, places, strict=True):
        moved = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=start + place).view(
            x.shape
        )
        moved.copy_(x.detach())
        if isinstance(module, Segment):
            setattr(module, name, moved)
        else:
            module.weight.data = moved
