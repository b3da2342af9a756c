"""Number formats and schemes: what a weight or an activation may be rounded to, and what it costs.

A `Format` says how one tensor is quantized: rows are cut into groups of `group_size` columns
(the last group of a row may be short), every group has one scale, every element one code.

    element     code                                              value of a code
    e2m1        4 bits: sign, 2 exponent, 1 mantissa              0 to 6
    e2m3        6 bits: sign, 2 exponent, 3 mantissa              0 to 7.5
    e4m3        8 bits, as torch.float8_e4m3fn                    0 to 448
    e5m2        8 bits, as torch.float8_e5m2                      0 to 57344
    int2..int8  2, 3, 4, 5, 6 or 8 bits, offset binary            code - 2^(bits - 1)
                the same, asymmetric                              code - zero_point

    scale       stored as                     factor of a group   groups     called
    e8m0        1 byte                        2^(scale - 127)     32         MX; integers count 1/64
    float16     float16, may be negative      scale               32 to 128  integers
    e4m3        1 byte, and one float32 more  scale / tensor's    16         NVFP4
                for the tensor, or the row
    float32     float32                       scale               a row      FP8, INT8

A `Scheme` pairs the format of a linear's weight with that of its input activations; the names
are those of compressed-tensors and AutoRound where they have one. `BF16` is the scheme that leaves
a linear alone. A `Recipe` divides the input columns of one linear among one to eight schemes.

Sources: OCP Microscaling Formats v1.0 (MX; its INT8 has an implied factor of 2^-6); NVIDIA's NVFP4
as in compressed-tensors' nvfp4 (the tensor's scale is a divisor); AutoRound's data_type/int.py and
data_type/mxfp.py (symmetric integers have a signed scale over the full range, as in llama.cpp).
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ..errors import UsageError

ScaleMode = Literal["floor", "rceil", "even"]
TensorScale = Literal["", "tensor", "row"]

MX_GROUP = 32  # block size of OCP MX, and the width of a slab
ROW = 0  # the group size that stands for a whole row
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
    "e2m3": Minifloat(6, 3, 0, 2, 7.5),
    "e4m3": Minifloat(8, 3, -6, 8, 448.0),
    "e5m2": Minifloat(8, 2, -14, 15, 57344.0),
}
INTEGERS = {f"int{bits}": bits for bits in (2, 3, 4, 5, 6, 8)}
# An element's place here is its number in native code (csrc/formats.h): new ones come last.
ELEMENTS = ("e2m1", "e4m3", "e5m2", "int2", "int4", "int8", "e2m3", "int3", "int5", "int6")


@dataclass(frozen=True)
class Scale:
    """A kind of group scale: its bits, and the groups and elements that it is used with."""

    bits: int
    group_sizes: tuple[int, ...]
    elements: tuple[str, ...]


# A scale's place here is its number in native code.
SCALES = {
    "e8m0": Scale(8, (MX_GROUP,), (*MINIFLOATS, "int8")),
    "float16": Scale(16, INT_GROUPS, tuple(INTEGERS)),
    "e4m3": Scale(8, (16,), ("e2m1",)),
    "float32": Scale(32, (ROW,), ("e4m3", "int8")),
}


# What every backend holds: elements with scales.
FIRST_FORMATS = frozenset(
    {(e, "e8m0") for e in ("e2m1", "e4m3", "e5m2")}
    | {(e, "float16") for e in ("int2", "int4", "int8")}
)

# What kernels have code for, elements with scales: a format that is added to `SCALES` is
# not here before they have.
NATIVE_FORMATS = (
    FIRST_FORMATS
    | {("e2m3", "e8m0"), ("int8", "e8m0"), ("e2m1", "e4m3")}
    | {(e, "float16") for e in ("int3", "int5", "int6")}
    | {(e, "float32") for e in ("e4m3", "int8")}
)


@dataclass(frozen=True)
class Format:
    """How one tensor is quantized along its last dimension.

    element       one of `ELEMENTS`
    group_size    columns that share a scale, or ROW: all of them
    symmetric     False for integers that have a zero point
    scale_mode    how the maximum of a block becomes a power of two (e8m0 only)
    scale         one of `SCALES`; if none is said, e8m0 for floats, float16 for integers
    tensor_scale  what shares the one float32 beside scales in e4m3: "tensor" (weights) or "row"
                  (activations, whose rows must not depend on each other); other scales have none
    """

    element: str
    group_size: int
    symmetric: bool = True
    scale_mode: ScaleMode = "floor"
    scale: str = ""
    tensor_scale: TensorScale = ""

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise UsageError(f"element must be one of {', '.join(ELEMENTS)}: got {self.element!r}")
        if self.scale_mode not in SCALE_MODES:
            raise UsageError(
                f"scale mode must be one of {', '.join(SCALE_MODES)}: got {self.scale_mode!r}"
            )
        if not self.scale:
            object.__setattr__(self, "scale", "e8m0" if self.is_float else "float16")
        if self.scale == "e4m3" and not self.tensor_scale:
            object.__setattr__(self, "tensor_scale", "tensor")
        self._check_scale()
        if not isinstance(self.symmetric, bool) or not (self.symmetric or self.has_zero_points):
            raise UsageError(
                f"symmetric must be True, or False for integers with float16 scales: got "
                f"{self.symmetric!r} of {self.element}"
            )
        _ = self.code  # now, for torch.compile cannot enter the lock of a cached property

    def _check_scale(self) -> None:
        kind = SCALES.get(self.scale)
        if kind is None or self.element not in kind.elements:
            known = [name for name, kind in SCALES.items() if self.element in kind.elements]
            raise UsageError(
                f"scale of {self.element} must be one of {', '.join(known)}: got {self.scale!r}"
            )
        if type(self.group_size) is not int or self.group_size not in kind.group_sizes:
            raise UsageError(
                f"group_size of {self.element} with scales in {self.scale} must be one of "
                f"{kind.group_sizes}: got {self.group_size}"
            )
        allowed = ("tensor", "row") if self.scale == "e4m3" else ("",)
        if self.tensor_scale not in allowed:
            raise UsageError(
                f"tensor_scale beside scales in {self.scale} must be one of {allowed}: got "
                f"{self.tensor_scale!r}"
            )

    @property
    def is_float(self) -> bool:
        """Whether the element is a minifloat, and not an integer."""
        return self.element in MINIFLOATS

    @property
    def has_zero_points(self) -> bool:
        """Whether there is an asymmetric kind of it."""
        return not self.is_float and self.scale == "float16"

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return MINIFLOATS[self.element].bits if self.is_float else INTEGERS[self.element]

    @property
    def scale_bits(self) -> int:
        """Bits of one group's scale."""
        return SCALES[self.scale].bits

    @functools.cached_property
    def code(self) -> int:
        """The format as one integer for native code; csrc/formats.h reads it.

        Bits 0-7 element, 8-11 scale mode, 12 symmetric, 13-14 scale, 15 a tensor scale per row,
        16 and up group_size.
        """
        return (
            ELEMENTS.index(self.element)
            | SCALE_MODES.index(self.scale_mode) << 8
            | int(self.symmetric) << 12
            | list(SCALES).index(self.scale) << 13
            | int(self.tensor_scale == "row") << 15
            | self.group_size << 16
        )

    @classmethod
    def from_code(cls, code: int) -> Format:
        """The format whose `code` this is. Raises UsageError for a number that is none's."""
        element, mode = code & 0xFF, code >> 8 & 0xF
        if element >= len(ELEMENTS) or mode >= len(SCALE_MODES):
            raise UsageError(f"a format's code must be one that Format.code gives: got {code}")
        scale, per_row = list(SCALES)[code >> 13 & 3], bool(code >> 15 & 1)
        tensor_scale: TensorScale = "row" if per_row else "tensor" if scale == "e4m3" else ""
        symmetric = bool(code >> 12 & 1)
        return cls(ELEMENTS[element], code >> 16, symmetric, SCALE_MODES[mode], scale, tensor_scale)

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` columns."""
        return 1 if self.group_size == ROW else -(-in_features // self.group_size)

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of a code in each plane of a packed row, lowest first (`mixbits.formats.pack`)."""
        return PLANES.get(self.bits, (self.bits,))

    def packed_bytes(self, in_features: int) -> int:
        """Bytes of one row of packed codes; a row, and each of its planes, begins at a byte."""
        return packed_bytes(in_features, self.bits)

    def zero_point_bytes(self, in_features: int) -> int:
        """Bytes of one row of packed zero points (0 where the format has none)."""
        return 0 if self.symmetric else packed_bytes(self.groups(in_features), self.bits)

    def row_bytes(self, in_features: int) -> int:
        """Bytes that one row takes on disk and in memory: codes, scales and zero points."""
        scales = self.groups(in_features) * self.scale_bits // 8
        return self.packed_bytes(in_features) + scales + self.zero_point_bytes(in_features)

    @property
    def tensor_bytes(self) -> int:
        """Bytes that a weight takes beside its rows: the scale of the tensor."""
        return 4 if self.tensor_scale else 0


# How the bits of a code that does not divide a byte are laid into planes of codes that do.
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2)}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed codes."""
    return sum(-(-count * plane // 8) for plane in PLANES.get(bits, (bits,)))


def has_scale_mode(fmt: Format | None) -> bool:
    """Whether a rule is needed that makes powers of two of block maxima."""
    return fmt is not None and fmt.scale == "e8m0"


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

    @property
    def formats(self) -> tuple[Format, ...]:
        """That of weights, and that of activations, where there are."""
        return tuple(fmt for fmt in (self.weight, self.activation) if fmt is not None)

    def storage_bits(
        self, out_features: int, in_features: int, ignore_scale_bits: bool = False
    ) -> int:
        """Bits of a [out_features, in_features] weight, scales and zero points counted or not."""
        if self.weight is None or ignore_scale_bits:
            return self.element_bits * out_features * in_features
        return 8 * (out_features * self.weight.row_bytes(in_features) + self.weight.tensor_bytes)


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

    @classmethod
    def whole(cls, scheme: Scheme, in_features: int, rotated: bool) -> Recipe:
        """All columns in one scheme, rotated or not; what is not packed never is."""
        if rotated and scheme.packed:
            return cls(((scheme, in_features),), None, True)
        return cls.plain(scheme)

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


# --- names -----------------------------------------------------------------------------------

_FLOATS = {  # name -> element, scale, group_size
    "MXFP4": ("e2m1", "e8m0", MX_GROUP),
    "MXFP6": ("e2m3", "e8m0", MX_GROUP),
    "MXFP8": ("e4m3", "e8m0", MX_GROUP),
    "MXFP8E5M2": ("e5m2", "e8m0", MX_GROUP),
    "MXINT8": ("int8", "e8m0", MX_GROUP),
    "NVFP4": ("e2m1", "e4m3", 16),
    "FP8": ("e4m3", "float32", ROW),
}
_ACTIVATIONS = {**_FLOATS, "INT8": ("int8", "float32", ROW)}
# The same under compressed-tensors' and AutoRound's names.
_ALIASES = {
    "MXFP8E4M3": "MXFP8",
    "MXFP8E4M3A16": "MXFP8A16",
    "MXFP6A8": "MXFP6XMXFP8",
    "W4AFP8": "W4XFP8",
}
_INTEGER = re.compile(r"W(?P<bits>[234568])(?P<a16>A16)?(?:G(?P<group>\d+))?(?P<asym>ASYM)?")
SCHEME_NAMES = (
    f"{', '.join(_FLOATS)}, weights and activations alike; each with A16, weights only; W2A16, "
    f"W3A16, W4A16, W5A16, W6A16, W8A16, also with G32, G64 or G128 and ASYM at the end "
    f"(W4A16G64ASYM); weights x activations, these one of {', '.join(_ACTIVATIONS)} (MXFP4xMXFP8, "
    f"W4G32xMXINT8); BF16"
)


def _named(name: str, table: Mapping[str, tuple[str, str, int]], mode: ScaleMode) -> Format | None:
    if name not in table:
        return None
    element, scale, group = table[name]
    return Format(element, group, scale_mode=mode, scale=scale)


def _integers(name: str) -> tuple[str, Format, bool] | None:
    """Of an integer name its shortest form, its format, and whether it says A16."""
    match = _INTEGER.fullmatch(name)
    group = int(match["group"] or 128) if match else 0
    if match is None or group not in INT_GROUPS:
        return None
    fmt = Format(f"int{match['bits']}", group, symmetric=not match["asym"])
    return name.replace("G128", ""), fmt, bool(match["a16"])


def _scheme(key: str, weight_mode: ScaleMode, act_mode: ScaleMode) -> Scheme | None:
    """The scheme of an upper-case name, or None."""
    if alike := _named(key, _FLOATS, weight_mode):
        return Scheme(key, alike, per_row(replace(alike, scale_mode=act_mode)))
    if weight := _named(key.removesuffix("A16"), _FLOATS, weight_mode):
        return Scheme(key, weight)
    if (found := _integers(key)) and found[2]:
        return Scheme(found[0], found[1])
    for name in sorted(_ACTIVATIONS, key=len, reverse=True):  # MXFP8 ends as FP8 does
        stem = key.removesuffix(f"X{name}")
        activation = _named(name, _ACTIVATIONS, act_mode)
        if stem == key or activation is None:
            continue
        if stem == name:
            return _scheme(name, weight_mode, act_mode)
        if weight := _named(stem, _FLOATS, weight_mode):
            return Scheme(f"{stem}x{name}", weight, per_row(activation))
        if (found := _integers(stem)) and not found[2]:
            return Scheme(f"{found[0]}x{name}", found[1], per_row(activation))
    return None


def weight_only(fmt: Format) -> Scheme:
    """The scheme of weights in `fmt` and activations left in 16 bits."""
    if fmt.is_float or not fmt.has_zero_points:
        kind = (fmt.element, fmt.scale, fmt.group_size)
        name = next(name for name, known in _FLOATS.items() if known == kind) + "A16"
    else:
        name = f"W{fmt.bits}A16G{fmt.group_size}{'' if fmt.symmetric else 'ASYM'}"
    return parse_scheme(name, fmt.scale_mode)


def per_row(fmt: Format) -> Format:
    """The same of activations, whose rows share no scale."""
    return replace(fmt, tensor_scale="row") if fmt.tensor_scale else fmt


def parse_scheme(
    name: str, weight_scale_mode: ScaleMode = "floor", act_scale_mode: ScaleMode = "floor"
) -> Scheme:
    """The scheme called `name` (upper or lower case), its MX scales rounded in the given modes.

    Raises UsageError that lists the known names.
    """
    key = name.strip().upper()
    if key == "BF16":
        return BF16
    key = _ALIASES.get(key, key)
    if scheme := _scheme(key, weight_scale_mode, act_scale_mode):
        return scheme
    near = f" (nearest: {', '.join(found)})" if (found := _nearest(key)) else ""
    raise UsageError(f"unknown scheme {name!r:.60}: known are {SCHEME_NAMES}{near}")


def _nearest(key: str) -> list[str]:
    """At most three names of schemes that look like an upper-case name."""
    groups = ("", *(f"G{size}" for size in INT_GROUPS))
    integers = [f"W{bits}{{}}{group}" for bits in INTEGERS.values() for group in groups]
    weights = [*_FLOATS, *(name.format("") for name in integers)]
    names = [*_FLOATS, *(f"{name}A16" for name in _FLOATS), "BF16"]
    names += [name.format("A16") + tail for name in integers for tail in ("", "ASYM")]
    names += [f"{weight}x{inputs}" for weight in weights for inputs in _ACTIVATIONS]
    by_key = {name.upper(): name for name in names}
    return [by_key[near] for near in difflib.get_close_matches(key[:60], by_key, 3)]
