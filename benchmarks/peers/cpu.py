"""Other people's kernels behind one interface: contenders for the benchmarks.

A `Peer` makes a `Multiplication` y = x W^T out of weights [N, K] and activations [M, K]; a
`FakeQuantizer` rounds activations. Every peer gets what it likes best (its own packing, its own
dtype of x), and all of that is done before the clock starts. The first calls are to be left out:
threads that sleep between calls may share one core until the scheduler has spread them.

Peers that are not installed, or whose answer is wrong on this machine, are named with the reason:
a benchmark that passes over them in silence would look better than it is.

    for peer, reason in available_peers(threads=2):
        if reason is None:
            multiply = peer.make([weight] * 8, x, 2)
            y = multiply(0)                  # by the first of eight copies
            print(peer.name, multiply.relative_error())
        else:
            print(peer.name, "skipped:", reason)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.peers import ggml
from benchmarks.peers.auto_round import auto_round_layer, auto_round_lib, auto_round_mxfp4
from benchmarks.peers.contender import (
    FakeQuantizer,
    Multiplication,
    Peer,
    codes_and_scale,
    decode,
    nbytes,
    pack_all,
)
from mixbits import ops
from mixbits.errors import first_line
from mixbits.formats.schemes import Format, parse_scheme

# --- torch -------------------------------------------------------------------------------------


def torch_linear(dtype: torch.dtype) -> Peer:
    """torch's own linear on weights and activations of `dtype`."""

    def make(weights: Sequence[Tensor], x: Tensor, threads: int) -> Multiplication:
        torch.set_num_threads(threads)
        packed = pack_all(weights, lambda w: w.to(dtype, copy=True))
        x = x.to(dtype)
        linear = torch.nn.functional.linear
        return Multiplication(
            lambda i: linear(x, packed[i]), nbytes(packed[0]), x, lambda: packed[0]
        )

    return Peer(f"torch {_short(dtype)}", make)


def dequantize_then_torch(scheme_name: str, dtype: torch.dtype) -> Peer:
    """The packed weight of a mixbits scheme decoded to `dtype` in each call, then torch's linear.

    What a library without a fused kernel does. Activations are not rounded.
    """
    fmt = parse_scheme(scheme_name).weight
    if fmt is None:
        raise ValueError(f"{scheme_name} has no packed weight to decode")

    def make(weights: Sequence[Tensor], x: Tensor, threads: int) -> Multiplication:
        torch.set_num_threads(threads)
        packed = pack_all(weights, lambda w: ops.quantize_pack(w, fmt))
        x, columns = x.to(dtype), x.shape[1]

        def decoded(i: int) -> Tensor:
            return ops.dequantize(packed[i], fmt, columns, dtype)

        return Multiplication(
            lambda i: torch.nn.functional.linear(x, decoded(i)),
            nbytes(*packed[0]),
            x,
            lambda: decoded(0),
        )

    return Peer(f"dequantize {scheme_name} + torch {_short(dtype)}", make)


def torch_int4(group_size: int) -> Peer:
    """aten._weight_int4pack_mm_for_cpu: 4-bit codes, bfloat16 scale and zero per group.

    Group sizes 32, 64, 128 and 256 exist. A value is (code - 8) * scale + zero.
    """
    fmt = Format("int4", group_size)

    def make(weights: Sequence[Tensor], x: Tensor, threads: int) -> Multiplication:
        torch.set_num_threads(threads)
        x = x.bfloat16()

        def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
            codes, scale = codes_and_scale(weight, fmt)
            # The second argument is for the layout of GPUs; the CPU's ignores it.
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
            scale_and_zero = torch.stack([scale.T, torch.zeros_like(scale.T)], -1)
            return packed, scale_and_zero.bfloat16().contiguous()

        packed = pack_all(weights, pack)

        def run(i: int) -> Tensor:
            codes, scales = packed[i]
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group_size, scales)

        def weight() -> Tensor:
            return decode(codes_and_scale(weights[0], fmt)[0], packed[0][1][..., 0].T)

        return Multiplication(run, nbytes(*packed[0]), x, weight)

    return Peer(f"torch int4pack g{group_size}", make)


def _make_torch_int8(weights: Sequence[Tensor], x: Tensor, threads: int) -> Multiplication:
    """aten._weight_int8pack_mm: int8 [N, K], one bfloat16 scale per row, x in bfloat16."""
    torch.set_num_threads(threads)
    x = x.bfloat16()

    def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = (weight.abs().amax(1) / 127).bfloat16()
        codes = torch.round(weight / scale.float().unsqueeze(1)).clamp(-127, 127)
        return codes.to(torch.int8), scale

    packed = pack_all(weights, pack)
    return Multiplication(
        lambda i: torch.ops.aten._weight_int8pack_mm(x, *packed[i]),
        nbytes(*packed[0]),
        x,
        lambda: decode(packed[0][0], packed[0][1].unsqueeze(1)),
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- ggml --------------------------------------------------------------------------------------

_TILE = 256  # rows


def ggml_matmul(type_name: str, repack: bool = True) -> Peer:
    """ggml's multiplication, by default with the weight placed as llama.cpp places it.

    The plain placement is a peer of its own: for Q4_K and many rows of x it is the quicker one.
    """

    def make(weights: Sequence[Tensor], x: Tensor, threads: int) -> Multiplication:
        rows, columns = weights[0].shape

        def pack(weight: Tensor) -> Tensor:
            # ggml quantizes with one thread, Q4_K by a search. The time of a multiplication does
            # not depend on the values, so one tile of rows is quantized and repeated.
            tile = ggml.quantize(type_name, weight[:_TILE])
            return tile.repeat(-(-rows // _TILE), 1)[:rows]

        distinct = {id(weight): weight for weight in weights}
        packed = {key: pack(weight) for key, weight in distinct.items()}
        first = packed[id(weights[0])]
        multiply = ggml.MatMul(type_name, [packed[id(w)] for w in weights], x, threads, repack)
        return Multiplication(
            multiply,
            first.nbytes,
            x,
            lambda: ggml.dequantize(type_name, first, columns),
            note=f"weights in {multiply.buffer}",
        )

    return Peer(f"ggml {type_name}" + ("" if repack else " plain"), make)


# --- what can run here ---------------------------------------------------------------------------

PEERS = (
    torch_linear(torch.float32),
    torch_linear(torch.bfloat16),
    dequantize_then_torch("MXFP4", torch.bfloat16),
    dequantize_then_torch("MXFP8", torch.bfloat16),
    dequantize_then_torch("W4A16", torch.bfloat16),
    torch_int4(32),
    torch_int4(128),
    Peer("torch int8pack", _make_torch_int8),
    *(ggml_matmul(type_name) for type_name in ("MXFP4", "Q4_0", "Q4_K", "Q8_0", "BF16")),
    *(ggml_matmul(type_name, repack=False) for type_name in ("MXFP4", "Q4_0", "Q4_K")),
    auto_round_lib(4, 32),
    auto_round_lib(4, 128),
    auto_round_lib(8, 128),
    auto_round_layer("MXFP4"),
    auto_round_layer("MXFP8"),
)

FAKE_QUANTIZERS = (
    FakeQuantizer("auto_round MXFP4", functools.partial(auto_round_mxfp4, False)),
    FakeQuantizer("auto_round MXFP4, torch.compile", functools.partial(auto_round_mxfp4, True)),
)

# Activations of 8 bits, the coarsest rounding that `relative_error` counts, make 0.7 %.
_TOLERANCE = 0.02


def available_peers(threads: int) -> Iterator[tuple[Peer, str | None]]:
    """Every peer with None, or with the reason why it cannot be used on this machine.

    Each multiplies a small matrix and is compared with float64. Threads stay as they then are.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((256, 512), generator=generator)
    x = torch.randn((3, 512), generator=generator)
    for peer in PEERS:
        try:
            error = peer.make([weight, weight], x, threads).relative_error()
        except Exception as failure:  # a peer may fail in any way: that is its reason
            yield peer, f"{type(failure).__name__}: {first_line(failure)}"
        else:
            wrong = not error <= _TOLERANCE  # also when it is NaN
            yield peer, f"wrong here: relative error {error:.2g}" if wrong else None


def available_fake_quantizers() -> Iterator[tuple[FakeQuantizer, str | None]]:
    """Every fake quantizer with None, or with the reason why it cannot be used.

    Each must equal mixbits on bfloat16. Compiling happens here, and again for other shapes.
    """
    fmt = parse_scheme("MXFP4").weight
    assert fmt is not None
    x = torch.randn((4, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    for quantizer in FAKE_QUANTIZERS:
        try:
            equal = torch.equal(quantizer.load()(x), ops.fake_quantize(x, fmt))
        except Exception as failure:
            yield quantizer, f"{type(failure).__name__}: {first_line(failure)}"
        else:
            yield quantizer, None if equal else "wrong here: differs from mixbits.ops.fake_quantize"
