"""How published checkpoints store quantized weights, and what these are when they are plain again.

    quant_method         tensors of one weight [N, K]                      value
    fp8, fbgemm_fp8      weight F8, weight_scale_inv or weight_scale       code * scale
    mxfp4 (gpt-oss)      *_blocks [E, N, K / 32, 16], *_scales U8          e2m1 * 2^(scale - 127)
    gptq, auto-round     qweight I32 [K b / 32, N], qzeros, scales, g_idx  scale * (code - zero)
    awq, auto-round      qweight I32 [K, N b / 32], qzeros, scales         scale * (code - zero)
    auto-round (MX)      weight_packed or weight, weight_scale U8          code * 2^(scale - 127)
    modelopt             weight, weight_scale, weight_scale_2              products of these
    compressed-tensors   what its own compressors read                     by the library itself

A `Stored` is one tensor of a model: the tensors of the files that it is made of, its plain value,
and, where it is in a format of ours, its codes and scales as they are (`kept`), so that they need
not be rounded a second time. Which tensors make one weight is in `mixbits.source.layouts`.

Sources: transformers' integrations (finegrained_fp8, mxfp4), compressed-tensors, AutoGPTQ and
GPTQModel (v1 stores zero points less one), AutoAWQ's gemm layout, NVIDIA ModelOpt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..formats.pack import Packed, pack, unpack
from ..formats.reference import Quantized, dequantize, minifloat_decode, unpack_codes
from ..formats.schemes import INT_GROUPS, INTEGERS, MINIFLOATS, MX_GROUP, Format
from ..formats.words import unpack_stream


class Header(NamedTuple):
    """What a weight file says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


Headers: TypeAlias = Mapping[str, Header]
Read: TypeAlias = Callable[[str], Tensor]  # name of a stored tensor -> its value

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
ELEMENTS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


class Kept(NamedTuple):
    """Codes and scales as they are stored, in a format of ours; shapes as of
    `mixbits.formats.pack`.

    Those of experts have one dimension more, the experts, at the front.
    """

    format: Format
    packed: Packed


@dataclass(frozen=True)
class Stored:
    """A tensor that is stored as it is.

    name   in the checkpoint's own naming, as if nothing were quantized
    shape  and dtype of its plain value
    parts  names of the stored tensors
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        return type(self) is Stored

    def plain(self, read: Read) -> Tensor:
        """The value, in float32 where it is stored quantized, else as it is."""
        return read(self.parts[0])

    def format(self) -> Format | None:
        """The format of ours that the weight is stored in, as far as shapes tell."""
        return None

    def kept(self, read: Read) -> Kept | None:
        """Codes and scales; None where the values are not quite of `format`."""
        return None


def _powers_of_two(scale: Tensor) -> Tensor | None:
    """Positive float32 powers of two as e8m0 bytes; None if any is something else."""
    mantissa, exponent = torch.frexp(scale.float())
    byte = exponent - 1 + 127
    if not bool(((mantissa == 0.5) & (byte >= 0) & (byte <= 254)).all()):
        return None
    return byte.to(torch.uint8)


def _to_float(scale: Tensor) -> Tensor:
    """Scales as float32; bytes are e8m0."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


@dataclass(frozen=True)
class Float8(Stored):
    """8-bit floats [..., N, K] with one scale for all, for a row, or for a block of `block`."""

    block: tuple[int, int] = (1, 1)

    def _expanded(self, scale: Tensor) -> Tensor:
        """A scale for every element, or shapes that broadcast to it."""
        if scale.numel() == 1:
            return scale.reshape(())
        rows, columns = self.shape[-2:]
        by_row = scale.repeat_interleave(self.block[0], -2)[..., :rows, :]
        return by_row.repeat_interleave(self.block[1], -1)[..., :columns]

    def _scale(self, read: Read) -> Tensor:
        scale = _to_float(read(self.parts[1]))
        return scale.unsqueeze(-1) if scale.dim() == len(self.shape) - 1 else scale

    def plain(self, read: Read) -> Tensor:
        return read(self.parts[0]).float() * self._expanded(self._scale(read))

    def format(self) -> Format | None:
        columns = self.shape[-1]
        whole = self.block[1] % MX_GROUP == 0 or self.block[1] >= columns
        return Format(ELEMENTS[self.dtype], MX_GROUP) if whole else None

    def kept(self, read: Read) -> Kept | None:
        fmt, byte = self.format(), _powers_of_two(self._scale(read))
        if fmt is None or byte is None:
            return None
        scale = self._expanded(byte).expand(self.shape)[..., ::MX_GROUP].contiguous()
        return Kept(fmt, Packed(read(self.parts[0]).view(torch.uint8), scale))


@dataclass(frozen=True)
class Mx(Stored):
    """Elements of `element` [..., N, K], 32 of a row sharing an e8m0 byte: a format of ours."""

    element: str = "e2m1"

    def format(self) -> Format:
        return Format(self.element, MX_GROUP)

    def kept(self, read: Read) -> Kept:
        codes, scale = read(self.parts[0]).view(torch.uint8), read(self.parts[1]).view(torch.uint8)
        return Kept(self.format(), Packed(codes, scale))

    def plain(self, read: Read) -> Tensor:
        fmt, packed = self.kept(read)
        return dequantize(unpack(packed, fmt, self.shape[-1]), fmt)


@dataclass(frozen=True)
class GptOss(Mx):
    """gpt-oss's experts: blocks [E, N, K / 32, 16]; the model's own parameter is [E, K, N]."""

    def kept(self, read: Read) -> Kept:
        blocks, scale = read(self.parts[0]), read(self.parts[1])
        return Kept(self.format(), Packed(blocks.flatten(-2), scale))

    def plain(self, read: Read) -> Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        value: Tensor = convert_moe_packed_tensors(
            read(self.parts[0]), read(self.parts[1]), dtype=torch.float32
        )
        return value


@dataclass(frozen=True)
class Nvfp4(Stored):
    """e2m1 [N, K] in groups of 16 with e4m3 scales, and one float32 scale for all (ModelOpt)."""

    def plain(self, read: Read) -> Tensor:
        codes = unpack_codes(read(self.parts[0]), 4, self.shape[-1])
        values = minifloat_decode(codes, MINIFLOATS["e2m1"])
        scale = read(self.parts[1]).float() * read(self.parts[2]).float()
        return values * scale.repeat_interleave(16, -1)[..., : self.shape[-1]]


@dataclass(frozen=True)
class _Integers(Stored, ABC):
    """`bits` wide codes [N, K] with a scale and a zero point for every group of columns."""

    bits: int = 4
    group: int = 128

    @abstractmethod
    def quantized(self, read: Read) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """codes [N, K], scale [N, G] float, zero point [N, G], and the group of every column."""

    def plain(self, read: Read) -> Tensor:
        codes, scale, zero, group = self.quantized(read)
        return (codes.float() - zero.float()[:, group]) * scale.float()[:, group]

    def format(self) -> Format | None:
        if f"int{self.bits}" not in INTEGERS or self.group not in INT_GROUPS:
            return None
        return Format(f"int{self.bits}", self.group)

    def kept(self, read: Read) -> Kept | None:
        fmt = self.format()
        codes, scale, zero, group = self.quantized(read)
        in_order = torch.equal(group, torch.arange(len(group)) // self.group)
        half = scale.to(torch.float16)
        if fmt is None or not in_order or not torch.equal(half.double(), scale.double()):
            return None
        middle = 1 << (self.bits - 1)
        if bool((zero == middle).all()):
            return Kept(fmt, pack(Quantized(codes, half), fmt))
        if int(zero.min()) < 0 or int(zero.max()) >= 2 * middle:
            return None
        fmt = Format(fmt.element, fmt.group_size, symmetric=False)
        return Kept(fmt, pack(Quantized(codes, half, zero.to(torch.uint8)), fmt))


def _bits_of(words: Tensor, bits: int, count: int) -> Tensor:
    """Rows of int32 words [R, W] as their first `count` fields of `bits`, the lowest first."""
    return unpack_stream(words.contiguous().view(torch.uint8), bits, count)


@dataclass(frozen=True)
class Gptq(_Integers):
    """qweight [K b / 32, N], qzeros [G, N b / 32], scales [G, N], g_idx [K] or none."""

    less_one: bool = True

    def quantized(self, read: Read) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, columns = self.shape
        qweight, qzeros, scales, *order = map(read, self.parts)
        codes = _bits_of(qweight.t(), self.bits, columns)
        zero = _bits_of(qzeros, self.bits, rows).t().short() + int(self.less_one)
        group = order[0].long() if order else torch.arange(columns) // self.group
        return codes, scales.t(), zero, group


_AWQ_FIELDS = [0, 4, 1, 5, 2, 6, 3, 7]  # the field of a word that holds column i of eight


@dataclass(frozen=True)
class Awq(_Integers):
    """qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]; eight columns interleaved in a word."""

    def quantized(self, read: Read) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, columns = self.shape
        qweight, qzeros, scales = map(read, self.parts)

        def fields(words: Tensor) -> Tensor:
            found = _bits_of(words, 4, rows).unflatten(-1, (-1, 8))
            return found[..., _AWQ_FIELDS].flatten(-2).t().contiguous()

        zero = fields(qzeros).short()
        return fields(qweight), scales.t(), zero, torch.arange(columns) // self.group


@dataclass(frozen=True)
class Compressed(_Integers):
    """Whatever compressed-tensors' own compressor `layout` makes plain, by its `scheme`.

    parts are in the order of `names`. Integers of pack-quantized can be kept.
    """

    names: tuple[str, ...] = ()
    layout: str = ""
    scheme: Any = None

    def plain(self, read: Read) -> Tensor:
        from compressed_tensors.compressors import BaseCompressor

        tensors = {n: read(p) for n, p in zip(self.names, self.parts, strict=True)}
        scale = tensors["weight_scale"]
        if scale.dtype in (torch.float16, torch.bfloat16):
            tensors["weight_scale"] = scale.float()
        compressor: Any = BaseCompressor.get_value_from_registry(self.layout)
        value: Tensor = compressor.decompress(tensors, self.scheme)["weight"]
        return value.float()

    def format(self) -> Format | None:
        weights = self.scheme.weights
        packed = self.layout == "pack-quantized" and weights.strategy == "group"
        return super().format() if packed else None

    def quantized(self, read: Read) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = {n: read(p) for n, p in zip(self.names, self.parts, strict=True)}
        rows, columns = self.shape
        codes = _bits_of(tensors["weight_packed"], self.bits, columns)
        scale, middle = tensors["weight_scale"], 1 << (self.bits - 1)
        zero = torch.full(scale.shape, middle, dtype=torch.int16)
        if "weight_zero_point" in tensors:
            words = tensors["weight_zero_point"].t()
            zero = _bits_of(words, self.bits, rows).t().short()
        return codes, scale, zero, torch.arange(columns) // self.group

    def kept(self, read: Read) -> Kept | None:
        return super().kept(read) if self.format() is not None else None
