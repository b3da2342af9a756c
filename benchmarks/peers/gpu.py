"""Who multiplies on the GPU: cuBLAS, ours, and gemlite where it is installed.

Triton's own triton_kernels is not among them: PyPI has another project under that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.contender import (
    FP8,
    Multiplication,
    Peer,
    mixbits_fp8_peer,
    mixbits_peer,
    nbytes,
    pack_all,
)
from benchmarks.peers.cpu import torch_linear
from mixbits import ops
from mixbits.errors import first_line
from mixbits.formats.pack import unpack
from mixbits.formats.schemes import parse_scheme

BASELINE = "cuBLAS bfloat16"
_TOLERANCE = 0.02


def baseline() -> Peer:
    """torch's linear in bfloat16, which is cuBLAS on a GPU."""
    return Peer(BASELINE, torch_linear(torch.bfloat16).make)


def gemlite(scheme_name: str) -> Peer:
    """gemlite's linear with 16-bit activations, from the same codes and scales as ours."""
    fmt = parse_scheme(scheme_name).weight
    assert fmt is not None

    def make(weights: Sequence[Tensor], x: Tensor, threads: int) -> Multiplication:
        from gemlite import helper

        x = x.bfloat16()

        def pack(weight: Tensor) -> Any:
            q = unpack(ops.quantize_pack(weight, fmt), fmt, weight.shape[1])
            options = {"device": str(weight.device), "dtype": torch.bfloat16}
            if fmt.is_float:
                kind = helper.A16W4_MXFP if fmt.bits == 4 else helper.A16W8_MXFP
                codes = q.codes if fmt.bits == 4 else q.codes.view(torch.float8_e4m3fn)
                return kind(**options).from_weights(codes, q.scale)
            kind = getattr(helper, f"A16W{fmt.bits}_HQQ_INT")
            scales = q.scale.bfloat16().view(-1, 1)
            zeros = torch.full_like(scales, 1 << (fmt.bits - 1))
            return kind(**options).from_weights(q.codes, scales, zeros)

        packed = pack_all(weights, pack)
        plain = ops.quantize_pack(weights[0], fmt)
        return Multiplication(
            lambda i: packed[i](x),
            nbytes(*plain),
            x,
            lambda: ops.dequantize(plain, fmt, x.shape[1]),
        )

    return Peer(f"gemlite {scheme_name}A16" if fmt.is_float else f"gemlite {scheme_name}", make)


def why_not(peer: Peer, device: torch.device) -> str | None:
    """None where `peer` multiplies a small matrix rightly here, else the reason."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((256, 512), generator=generator).to(device)
    x = torch.randn((3, 512), generator=generator).to(device)
    try:
        error = peer.make([weight, weight], x, 1).relative_error()
    except Exception as failure:  # a peer may fail in any way: that is its reason
        return f"{type(failure).__name__}: {first_line(failure)}"
    return None if error <= _TOLERANCE else f"wrong here: relative error {error:.2g}"


def contenders(
    schemes: Sequence[str], backends: Sequence[str], device: torch.device
) -> list[tuple[Peer, str, str]]:
    """(peer, scheme, backend) of all that can run here; who cannot is named with the reason."""
    found = [(baseline(), "BF16", "cuBLAS")]
    for scheme in schemes:
        found += [(mixbits_peer(scheme, torch.bfloat16, backend=b), scheme, b) for b in backends]
        found.append((gemlite(scheme), scheme, "gemlite"))
    if "MXFP4" in schemes and "cuda" in backends:
        found.append((mixbits_fp8_peer(torch.bfloat16), FP8, "cuda"))
    usable = []
    for peer, scheme, backend in found:
        reason = why_not(peer, device)
        if reason is None:
            usable.append((peer, scheme, backend))
        else:
            print(f"skipped: {peer.name} ({reason})", flush=True)
    return usable
