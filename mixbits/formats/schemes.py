"""Number formats and schemes: what a weight or an activation may be rounded to, and what it costs.

A `Format` says how one tensor is quantized: rows are cut into groups of `group_size` columns
(the last group of a row may be short), every group has one scale, every element one code.

    element  code                                   scale          value
    e2m1     4 bits: sign, 2 exponent, 1 mantissa   e8m0, 1 byte   code * 2^(scale - 127)
    e4m3     8 bits, as torch.float8_e4m3fn         e8m0, 1 byte   code * 2^(scale - 127)
    e5m2     8 bits, as torch.float8_e5m2           e8m0, 1 byte   code * 2^(scale - 127)
    int2/4/8 offset binary, symmetric               float16        (code - 2^(bits - 1)) * scale
    int2/4/8 asymmetric                             float16        (code - zero_point) * scale

A `Scheme` pairs the format of a linear's weight with that of its input activations; the names
are those of compressed-tensors and AutoRound. `BF16` is the scheme that leaves a linear alone.
A `Recipe` divides the input columns of one linear among one to eight schemes.

Sources: OCP Microscaling Formats v1.0 (MX); AutoRound's data_type/int.py and data_type/mxfp.py
(symmetric integers have a signed scale over the full range, as in llama.cpp).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ..errors import UsageError

ScaleMode = Literal["floor", "rceil", "even"]

MX_GROUP = 32  # block size of OCP MX, and the width of a slab
MAX_SEGMENTS = 8  # of one linear: csrc/cpu/kernels.h
SCALE_MODES: tuple[ScaleMode, ...] = ("floor", "rceil", "even")
INT_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Minifloat:
    """A floating-point element of at most 8 bits: sign, exponent, mantissa.

    `max_exponent` is the exponent of the largest finite value `max_value`; `min_exponent` is
    that of the smallest normal one, shared by the subnormals.
    """

    bits: int
    mantissa_bits: int
    min_exponent: int
    max_exponent: int
    max_value: float


MINIFLOATS = {
    "e2m1": Minifloat(4, 1, 0, 2, 6.0),
    "e4m3": Minifloat(8, 3, -6, 8, 448.0),
    "e5m2": Minifloat(8, 2, -14, 15, 57344.0),
}
INTEGERS = {"int2": 2, "int4": 4, "int8": 8}
ELEMENTS = (*MINIFLOATS, *INTEGERS)  # an element's place here is its number in native code


@dataclass(frozen=True)
class Format:
    """How one tensor is quantized along its last dimension.

    `scale_mode` is used by MX elements only (how the block maximum becomes a power of two),
    `symmetric` by integers only.
    """

    element: str
    group_size: int
    symmetric: bool = True
    scale_mode: ScaleMode = "floor"

    def __post_init__(self) -> None:
        if self.element not in MINIFLOATS and self.element not in INTEGERS:
            raise UsageError(f"element must be one of {', '.join(ELEMENTS)}: got {self.element!r}")
        if self.scale_mode not in SCALE_MODES:
            raise UsageError(
                f"scale mode must be one of {', '.join(SCALE_MODES)}: got {self.scale_mode!r}"
            )
        if not isinstance(self.symmetric, bool) or not (self.symmetric or self.element in INTEGERS):
            raise UsageError(
                f"symmetric must be True, or False for integers: got {self.symmetric!r} of "
                f"{self.element}"
            )
        allowed = (MX_GROUP,) if self.is_mx else INT_GROUPS
        if type(self.group_size) is not int or self.group_size not in allowed:
            raise UsageError(
                f"group_size of {self.element} must be one of {allowed}: got {self.group_size}"
            )
        _ = self.code  # now, for torch.compile cannot enter the lock of a cached property

    @property
    def is_mx(self) -> bool:
        return self.element in MINIFLOATS

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return MINIFLOATS[self.element].bits if self.is_mx else INTEGERS[self.element]

    @property
    def scale_bits(self) -> int:
        """Bits of one group's scale."""
        return 8 if self.is_mx else 16

    @functools.cached_property
    def code(self) -> int:
        """The format as one integer for native code; csrc/formats.h reads it.

        Bits 0-7 element, 8-11 scale mode, 12 symmetric, 16 and up group_size.
        """
        mode = SCALE_MODES.index(self.scale_mode)
        return (
            ELEMENTS.index(self.element)
            | mode << 8
            | int(self.symmetric) << 12
            | self.group_size << 16
        )

    @classmethod
    def from_code(cls, code: int) -> Format:
        """The format whose `code` this is. Raises UsageError for a number that is none's."""
        element, mode, rest = code & 0xFF, code >> 8 & 0xF, code >> 13 & 0x7
        if element >= len(ELEMENTS) or mode >= len(SCALE_MODES) or rest:
            raise UsageError(f"a format's code must be one that Format.code gives: got {code}")
        symmetric = bool(code >> 12 & 1)
        return cls(ELEMENTS[element], code >> 16, symmetric, SCALE_MODES[mode])

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` columns."""
        return -(-in_features // self.group_size)

    def packed_bytes(self, in_features: int) -> int:
        """Bytes of one row of packed codes; a row always begins at a byte."""
        return -(-in_features * self.bits // 8)

    def zero_point_bytes(self, in_features: int) -> int:
        """Bytes of one row of packed zero points (0 where the format has none)."""
        return 0 if self.symmetric else -(-self.groups(in_features) * self.bits // 8)

    def row_bytes(self, in_features: int) -> int:
        """Bytes that one row takes on disk and in memory: codes, scales and zero points."""
        scales = self.groups(in_features) * self.scale_bits // 8
        return self.packed_bytes(in_features) + scales + self.zero_point_bytes(in_features)


@dataclass(frozen=True)
class Scheme:
    """A named pair of formats. `weight` is None for BF16, `activation` for weight-only schemes."""

    name: str
    weight: Format | None
    activation: Format | None = None

    @property
    def element_bits(self) -> int:
        """Bits of one weight without its scale: the published tables' way of counting."""
        return 16 if self.weight is None else self.weight.bits

    @property
    def packed(self) -> bool:
        return self.weight is not None

    @property
    def format(self) -> Format:
        """The weight's format. Raises ValueError for BF16, which has none."""
        if self.weight is None:
            raise ValueError(f"{self.name} does not pack weights")
        return self.weight

    def storage_bits(
        self, out_features: int, in_features: int, ignore_scale_bits: bool = False
    ) -> int:
        """Bits of a [out_features, in_features] weight, scales and zero points counted or not."""
        if self.weight is None or ignore_scale_bits:
            return self.element_bits * out_features * in_features
        return 8 * out_features * self.weight.row_bytes(in_features)


BF16 = Scheme("BF16", None)


@dataclass(frozen=True)
class Recipe:
    """How one linear is stored: its input columns divided among 1 to 8 schemes.

    segments  schemes with numbers of columns, in the order in which they are stored; all columns,
              however many, have no number (None): `Recipe.plain`
    order     place i of that order holds input column order[i]; None: as they come. A range
              stands for an order that is known to be there, and is not known yet
    rotated   the ordered columns, 32 by 32, are stored in the basis of a Hadamard matrix
    order_in_producer  the linears that make the input make it in this order: their stored rows
              are ordered instead, and the order is not stored
    """

    segments: tuple[tuple[Scheme, int | None], ...]
    order: tuple[int, ...] | range | None = None
    rotated: bool = False
    order_in_producer: bool = False

    def __post_init__(self) -> None:
        if self.is_plain:
            arranged = self.order is not None or self.rotated or self.order_in_producer
            if len(self.segments) > 1 or arranged:
                raise UsageError(f"the segments of {self.name} must have numbers of columns")
            return
        widths = [columns or 0 for _, columns in self.segments]
        if not self.segments or any(s.weight is None for s, _ in self.segments) or min(widths) < 1:
            got = [(scheme.name, columns) for scheme, columns in self.segments]
            raise UsageError(f"segments must be packed schemes with columns: got {got}")
        if len(self.segments) > MAX_SEGMENTS:
            raise UsageError(
                f"one linear is divided among at most {MAX_SEGMENTS} schemes: got {self.name}"
            )
        natural = range(sum(widths))
        if self.order not in (None, natural) and sorted(self.order or ()) != list(natural):
            raise UsageError(f"an order must hold each of {len(natural)} columns once")

    @classmethod
    def plain(cls, scheme: Scheme) -> Recipe:
        """All columns in one scheme, as they come."""
        return cls(((scheme, None),))

    @property
    def is_plain(self) -> bool:
        """Whether this is what `plain` makes; its tensors are stored without a segment's number."""
        return any(columns is None for _, columns in self.segments)

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of a plain recipe; None where columns are divided, ordered or rotated."""
        return self.segments[0][0] if self.is_plain else None

    @property
    def packed(self) -> bool:
        return self.segments[0][0].packed

    @property
    def name(self) -> str:
        return "+".join(dict.fromkeys(scheme.name for scheme, _ in self.segments))

    def parts(self, in_features: int) -> tuple[tuple[Scheme, int], ...]:
        """The segments of a linear with `in_features` columns, all with numbers of columns.

        Raises UsageError where they have another number.
        """
        found = tuple((s, in_features if n is None else n) for s, n in self.segments)
        if (columns := sum(n for _, n in found)) != in_features:
            raise UsageError(f"segments of {columns} columns: got {in_features} columns")
        return found

    @property
    def order_bits(self) -> int:
        """Bits of one stored entry of `order`."""
        return 0 if self.order is None or self.order_in_producer else order_bits(len(self.order))

    def storage_bits(
        self, out_features: int, in_features: int, ignore_scale_bits: bool = False
    ) -> int:
        """As of a `Scheme`; the stored order counts with the scales."""
        parts = self.parts(in_features)
        bits = sum(s.storage_bits(out_features, n, ignore_scale_bits) for s, n in parts)
        return bits if ignore_scale_bits else bits + self.order_bits * in_features


LEFT_ALONE = Recipe.plain(BF16)  # of a linear that nobody has a recipe for


def order_bits(in_features: int) -> int:
    """Bits of one entry of a stored order of columns."""
    return 8 if in_features <= 1 << 8 else 16 if in_features <= 1 << 15 else 32


Assignment: TypeAlias = Mapping[str, Recipe]  # linear -> its recipe

_MX_NAME = re.compile(r"MXFP(?P<bits>4|8)(?P<element>E4M3|E5M2)?(?P<a16>A16)?")
_INT_NAME = re.compile(r"W(?P<bits>2|4|8)A16(?:G(?P<group>\d+))?(?P<asym>ASYM)?")
SCHEME_NAMES = (
    "MXFP4, MXFP8, MXFP8E5M2, each also with A16 at the end (weights only); "
    "W2A16, W4A16, W8A16, each also with G32, G64 or G128 and with ASYM at the end "
    "(W4A16G64ASYM); BF16"
)


def parse_scheme(
    name: str, weight_scale_mode: ScaleMode = "floor", act_scale_mode: ScaleMode = "floor"
) -> Scheme:
    """The scheme called `name` (upper or lower case), its MX scales rounded in the given modes.

    Raises UsageError that lists the known names.
    """
    key = name.strip().upper()
    if key == "BF16":
        return BF16
    if match := _MX_NAME.fullmatch(key):
        bits, element = match["bits"], (match["element"] or "").lower()
        if bits == "8" or not element:
            element = "e2m1" if bits == "4" else element or "e4m3"
            weight = Format(element, MX_GROUP, scale_mode=weight_scale_mode)
            activation = None if match["a16"] else replace(weight, scale_mode=act_scale_mode)
            return Scheme(key.replace("E4M3", ""), weight, activation)
    if match := _INT_NAME.fullmatch(key):
        group = int(match["group"] or 128)
        if group in INT_GROUPS:
            weight = Format(f"int{match['bits']}", group, symmetric=not match["asym"])
            return Scheme(key.replace("G128", ""), weight)
    raise UsageError(f"unknown scheme {name!r:.60}: known are {SCHEME_NAMES}")
