"""What a contender of the benchmarks is: a `Peer`, the `Multiplication` it makes, and helpers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mixbits import ops
from mixbits.formats.pack import Operand, unpack
from mixbits.formats.schemes import Format, parse_scheme

Packing = TypeVar("Packing")
FP8 = "MXFP4A16 fp8"  # what tables call MXFP4A16 with activations that may be 8-bit floats


@dataclass
class Multiplication:
    """y = x W^T, ready to run: called with i, it multiplies by the i-th weight.

    run           i -> y [M, N] in the peer's own dtype; the next call may overwrite it
    weight_bytes  of one packed weight, scales included
    x             [M, K], the activations that are multiplied: cast, and rounded where the peer
                  fake-quantizes them
    weight        () -> [N, K], the values that the first packed weight stands for
    note          what a reader of the figures should know
    """

    run: Callable[[int], Tensor]
    weight_bytes: int
    x: Tensor
    weight: Callable[[], Tensor]
    note: str = ""

    def __call__(self, i: int) -> Tensor:
        return self.run(i)

    def relative_error(self) -> float:
        """|y - exact| / |exact| of the first weight (Frobenius), exact being float64 on `weight`.

        The error of quantizing the weights is thus left out, and that of rounding activations
        inside the multiplication (8 bits in ggml) is not.
        """
        exact = self.x.double() @ self.weight().double().T
        return float((self.run(0).double() - exact).norm() / exact.norm())


Make = Callable[[Sequence[Tensor], Tensor, int], Multiplication]


@dataclass(frozen=True)
class Peer:
    """A way to multiply.

    make(weights, x, threads): `weights` are float32 [N, K], one or several, so many that together
    they exceed the cache; `x` is [M, K]; `threads` is set for the whole process where a library
    knows no other way. A tensor may stand in `weights` several times: it is packed once, and
    every mention gets its own copy in memory.
    """

    name: str
    make: Make


def pack_all(weights: Sequence[Tensor], pack: Callable[[Tensor], Packing]) -> list[Packing]:
    """pack(weight) of each; the packing of a tensor that stood before is copied, not repeated."""
    packed: dict[int, Packing] = {}
    result = []
    for weight in weights:
        if (key := id(weight)) in packed:
            result.append(copy.deepcopy(packed[key]))
        else:
            packed[key] = pack(weight)
            result.append(packed[key])
    return result


def nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def codes_and_scale(weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Symmetric integers: codes int8 [N, K] around zero, scales float32 [N, groups]."""
    q = unpack(ops.quantize_pack(weight, fmt), fmt, weight.shape[1])
    return (q.codes.int() - (1 << (fmt.bits - 1))).to(torch.int8), q.scale.float()


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [N, K], scale [N, groups] -> float32 [N, K]."""
    return codes.float() * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)


def mixbits_peer(
    scheme_name: str,
    dtype: torch.dtype,
    int8_activations: bool = False,
    backend: str | None = None,
) -> Peer:
    """The packed matmul of this library."""
    scheme = parse_scheme(scheme_name)
    fmt = scheme.weight
    assert fmt is not None

    def make(weights: Sequence[Tensor], x: Tensor, threads: int) -> Multiplication:
        torch.set_num_threads(threads)
        packed = pack_all(weights, lambda w: ops.quantize_pack(w, fmt, backend))
        x = x.to(dtype)
        operands = [[Operand.plain(p, fmt, x.shape[1], scheme.activation)] for p in packed]

        def run(i: int) -> Tensor:
            return ops.packed_matmuls_unchecked(x, operands[i], backend, int8_activations)[0]

        rounded = x if scheme.activation is None else ops.fake_quantize(x, scheme.activation)
        return Multiplication(
            run, nbytes(*packed[0]), rounded, lambda: ops.dequantize(packed[0], fmt, x.shape[1])
        )

    mode = " int8" if int8_activations else ""
    where = f"{backend} " if backend else ""
    return Peer(f"mixbits {where}{scheme_name}{mode} {str(dtype).removeprefix('torch.')}", make)


def mixbits_fp8_peer(dtype: torch.dtype) -> Peer:
    """MXFP4 weights with activations in e4m3: `mixbits.ops.packed_matmul_fp8`."""
    fmt = parse_scheme("MXFP4A16").weight
    assert fmt is not None

    def make(weights: Sequence[Tensor], x: Tensor, threads: int) -> Multiplication:
        packed = pack_all(weights, lambda w: ops.quantize_pack(w, fmt, "cuda"))
        x = x.to(dtype)
        row_scale = ops.fold_rows(packed[0], fmt, x.shape[1])
        if row_scale is None:
            raise ValueError("a row's block scales do not lie within 15 binades")
        scales = [row_scale.clone() for _ in packed]

        def run(i: int) -> Tensor:
            return ops.packed_matmul_fp8(x, packed[i], fmt, scales[i], "cuda")

        return Multiplication(
            run,
            nbytes(*packed[0], row_scale),
            x,
            lambda: ops.dequantize(packed[0], fmt, x.shape[1]),
            "activations in e4m3 where tokens are many",
        )

    return Peer(f"mixbits cuda {FP8} {str(dtype).removeprefix('torch.')}", make)


class Rotation:
    """A multiplication and copies of its weight, `total` bytes of them or more; calls go round."""

    def __init__(
        self, peer: Peer, tile: Tensor, rows: int, x: Tensor, threads: int, total: int
    ) -> None:
        weight = tile.repeat(rows // tile.shape[0], 1)
        one = peer.make([weight], x, threads)
        self.copies = max(1, -(-total // one.weight_bytes))
        self.multiplication = (
            one if self.copies == 1 else peer.make([weight] * self.copies, x, threads)
        )

    def __call__(self, number: int) -> None:
        self.multiplication(number % self.copies)


@dataclass(frozen=True)
class FakeQuantizer:
    """A round trip of activations through MXFP4 (floor). load() -> function x [M, K] -> [M, K]."""

    name: str
    load: Callable[[], Callable[[Tensor], Tensor]]
