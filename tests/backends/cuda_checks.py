"""What tests of the cuda backend share, emulated and on a GPU: its kernels in their sizes."""

import checks
import torch
from conftest import MORE_FORMATS, assert_same_bits, hard_rows
from fp8_checks import HALVES

from mixbits.backends import cuda
from mixbits.backends.cuda_choice import KernelChoice
from mixbits.formats import pack, reference
from mixbits.formats.schemes import Format

MORE_WEIGHTS = [fmt for fmt in MORE_FORMATS if fmt.tensor_scale != "row"]
NVFP4 = Format("e2m1", 16, scale="e4m3")
MMA = [
    KernelChoice("mma", row_tiles=r, token_tiles=t, warps=w) for r, t, w in ((1, 1, 5), (4, 1, 4))
]
MMA += [KernelChoice("mma", row_tiles=4, token_tiles=2, warps=8)]
WGMMA = [
    KernelChoice("wgmma", block_tokens=tokens, parts=parts)
    for tokens, parts in ((64, 1), (64, 4), (128, 2), (256, 1))
]
MIXED = [*MMA[:2], *(KernelChoice("wgmma", block_tokens=128, parts=parts) for parts in (1, 2))]


def plain(packed: pack.Packed, fmt: Format, activation: Format | None = None) -> pack.Operand:
    """An operand of whole groups' columns."""
    columns = packed.weight_packed.shape[1] * 8 // fmt.bits
    return pack.Operand.plain(packed, fmt, columns, activation)


def use(monkeypatch, choice: KernelChoice) -> None:
    monkeypatch.setattr(cuda, "explain", lambda x, operand: choice)
    monkeypatch.setattr(checks, "DTYPES", HALVES)


def check_dequantize(backend, device: torch.device, fmt: Format, columns: int) -> None:
    """Of what the reference packs, to the bit."""
    for dtype in checks.DTYPES:
        q = reference.quantize(hard_rows(columns, dtype), fmt)
        got = backend.dequantize(pack.pack(q, fmt).to(device), fmt, columns, dtype)
        assert_same_bits(got.cpu(), reference.dequantize(q, fmt, dtype))
