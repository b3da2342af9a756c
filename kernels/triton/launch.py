"""What every launcher needs: the tile height of the elementwise kernels, and the right device."""

from contextlib import AbstractContextManager, nullcontext

import torch

TILE_ROWS = 16  # by 128 columns: 16 elements per thread of 4 warps


def device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of `x` (interpreted: the CPU)."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
