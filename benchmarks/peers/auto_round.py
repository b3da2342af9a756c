"""Contenders from Intel: the CPU kernels of auto-round-lib, and auto_round's own MX modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.contender import (
    Multiplication,
    Peer,
    codes_and_scale,
    decode,
    nbytes,
    pack_all,
)
from mixbits import ops
from mixbits.formats.schemes import Format, parse_scheme

# --- auto-round-lib ------------------------------------------------------------------------------


_ark_threads: list[int] = []  # the number that the library has kept, once it has been used


def _ark(threads: int) -> Any:
    """The module of auto-round-lib, running `threads` threads.

    It reads OMP_NUM_THREADS at its first use and keeps it. It then cuts the work in as many parts
    whatever OpenMP runs: with another number in torch, parts of y stay unwritten.
    """
    import auto_round_kernel as ark

    if not _ark_threads:
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        codes, scale = torch.zeros((32, 32), dtype=torch.int8), torch.ones((1, 32))
        ark.repack_quantized_weight(codes, scale, None, 32, "auto", "int4", "fp32", False)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        _ark_threads.append(threads)
    if _ark_threads[0] != threads:
        raise RuntimeError(
            f"auto-round-lib keeps the {_ark_threads[0]} threads of its first use: for {threads}, "
            "start another process"
        )
    torch.set_num_threads(threads)
    return ark


def auto_round_lib(bits: int, group_size: int) -> Peer:
    """auto-round-lib's weight-only linear, called as its QuantLinear calls it: x in float32.

    The compute type is left to the library ("auto"). On CPUs that are not Intel's, it is float32
    by AVX2, whatever else the CPU could do.
    """
    fmt = Format(f"int{bits}", group_size)

    def make(weights: Sequence[Tensor], x: Tensor, threads: int) -> Multiplication:
        ark = _ark(threads)
        rows, columns = weights[0].shape
        x, y = x.float().contiguous(), torch.empty((x.shape[0], rows))
        kind = ("auto", fmt.element, "fp32", False)  # compute, weight, scale, asymmetric

        def pack(weight: Tensor) -> Tensor:
            codes, scale = codes_and_scale(weight, fmt)
            # Both are transposed: codes [K, N], scales [groups, N].
            transposed = codes.T.contiguous(), scale.T.contiguous()
            return ark.repack_quantized_weight(*transposed, None, group_size, *kind)

        packed, no_bias = pack_all(weights, pack), torch.empty(0)

        def run(i: int) -> Tensor:
            return ark.woqgemm(x, packed[i], no_bias, rows, columns, group_size, *kind, out=y)

        return Multiplication(
            run, nbytes(packed[0]), x, lambda: decode(*codes_and_scale(weights[0], fmt))
        )

    return Peer(f"auto-round-lib int{bits} g{group_size}", make)


# --- auto_round --------------------------------------------------------------------------------


def auto_round_layer(scheme_name: str) -> Peer:
    """auto_round's own MXFP4 or MXFP8 linear: fake-quantizes x, decodes the weight, multiplies."""
    scheme = parse_scheme(scheme_name)
    fmt, activation = scheme.weight, scheme.activation
    assert fmt is not None and activation is not None

    def make(weights: Sequence[Tensor], x: Tensor, threads: int) -> Multiplication:
        from auto_round import schemes
        from auto_round.experimental.qmodules import mx

        torch.set_num_threads(threads)
        x = x.bfloat16()
        rows, columns = weights[0].shape
        layer_class = getattr(mx, f"{scheme_name}QuantLinear")
        dtype = torch.uint8 if fmt.bits == 4 else torch.float8_e4m3fn

        def pack(weight: Tensor) -> Any:
            # mixbits stores MX weights as compressed-tensors does, and auto_round reads those.
            packed = ops.quantize_pack(weight, fmt)
            codes, config = packed.weight_packed.view(dtype), getattr(schemes, scheme_name)
            return layer_class(columns, rows, config, codes, packed.weight_scale)

        layers = pack_all(weights, pack)
        return Multiplication(
            lambda i: layers[i](x),
            nbytes(*layers[0].buffers()),
            ops.fake_quantize(x, activation),  # what it multiplies; the layer is given x
            lambda: layers[0].dequant_weight_online(),
        )

    return Peer(f"auto_round {scheme_name} layer", make)


def auto_round_mxfp4(compiled: bool) -> Callable[[Tensor], Tensor]:
    """auto_round's function, as it is or through torch.compile, which auto_round offers too."""
    from auto_round.data_type.mxfp import quant_mx

    def quantize(x: Tensor) -> Tensor:
        return quant_mx(x, bits=4, group_size=32, data_type="mx_fp4")[0]

    return torch.compile(quantize) if compiled else quantize
