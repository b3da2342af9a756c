"""Packed weights: the tensors that are stored, and their exact shapes.

    weight_packed        uint8 [N, ceil(K * bits / 8)]   codes, first column in the lowest bits
    weight_scale         [N, groups]: uint8 (the bits of e8m0 or e4m3), float16 or float32
    weight_zero_point    uint8 [N, ceil(groups * bits / 8)], asymmetric formats only, packed alike
    weight_global_scale  float32 [1], beside scales in e4m3 only: what they are divided by

Codes of 3, 5 and 6 bits lie in two planes, one behind the other in each row: the lower 2 or 4 bits
of all of a row's codes as if they were codes of that many bits, then the 1 or 2 bits above these
likewise. So a kernel loads each plane whole, as it loads codes of 1, 2 and 4 bits.

A linear whose recipe is not plain has these for each of its segments, of that segment's columns,
under `segments.<number>.`, and beside them, where its columns have an order of their own that the
linears before it do not make them in (`Recipe.order_in_producer`),

    order              uint8 [K] up to 256 columns, int16 up to 32768, else int32

For MXFP4, MXFP8, NVFP4 and FP8 these are the bytes of compressed-tensors. One layout serves every
backend and instruction set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..errors import UsageError
from . import reference
from .schemes import FIRST_FORMATS, MX_GROUP, Format, Recipe, order_bits

# The numbers of this layout, which checkpoints record: the first has none but `FIRST_FORMATS`, so
# that who knows no others can read it.
LAYOUTS = (1, 2)
SCALE_DTYPES = {
    "e8m0": torch.uint8,
    "float16": torch.float16,
    "e4m3": torch.uint8,
    "float32": torch.float32,
}


class Packed(NamedTuple):
    """The packed form of one [N, K] weight; the module docstring gives shapes and dtypes."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None = None
    weight_global_scale: Tensor | None = None

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Packed:
        """The same with `change(name, tensor)` in each tensor's place."""
        named = self._asdict().items()
        changed: dict[str, Any] = {n: None if t is None else change(n, t) for n, t in named}
        return Packed(**changed)

    def to(self, device: torch.device | str) -> Packed:
        return self.map(lambda name, tensor: tensor.to(device))

    def rows(self, which: Tensor | slice) -> Packed:
        """Some of the weight's rows, or all in another order: they share the tensor's scale."""
        whole = "weight_global_scale"
        return self.map(lambda name, tensor: tensor if name == whole else tensor[which])


class Part(NamedTuple):
    """A packed weight [N, K], its format, and the format that x is rounded to (None: as it is)."""

    packed: Packed
    format: Format
    activation: Format | None = None

    @property
    def out_features(self) -> int:
        return self.packed.weight_packed.shape[0]


Piece: TypeAlias = tuple[Packed, Format, int]  # a packed weight [N, K], its format, and K


class Operand(NamedTuple):
    """What x [M, K] is multiplied with: 1 to 8 `Part`s side by side over the columns of [N, K].

    columns  how many each takes, K in all
    order    [K] of `order_dtype`, or None: place i holds column order[i] of x
    rotated  whether the ordered columns are rotated (`mixbits.formats.arrange`)
    """

    parts: tuple[Part, ...]
    columns: tuple[int, ...]
    order: Tensor | None = None
    rotated: bool = False

    @classmethod
    def plain(
        cls, packed: Packed, fmt: Format, in_features: int, activation: Format | None = None
    ) -> Operand:
        """One part of all `in_features` columns, as they come."""
        return cls((Part(packed, fmt, activation),), (in_features,))

    @property
    def is_plain(self) -> bool:
        """Whether this is what `plain` makes."""
        return len(self.parts) == 1 and self.order is None and not self.rotated

    @property
    def out_features(self) -> int:
        return self.parts[0].packed.weight_packed.shape[0]

    @property
    def pieces(self) -> list[Piece]:
        pairs = zip(self.parts, self.columns, strict=True)
        return [(one.packed, one.format, columns) for one, columns in pairs]

    @property
    def is_regular(self) -> bool:
        """Whether no rotated block, nor a block of a rounded input, lies across two segments."""
        return all(columns % MX_GROUP == 0 for columns in self.columns[:-1])

    @property
    def takes_input_as_is(self) -> bool:
        """Whether x is neither put in order, nor rotated, nor rounded."""
        rounded = any(one.activation is not None for one in self.parts)
        return self.order is None and not self.rotated and not rounded

    def input_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What holds an arranged and rounded x of `dtype` without rounding it once more.

        That is `dtype`, unless x is rotated: rotated sums are float32. Rounded ones with powers of
        two for scales have at most 8 digits, and a range that bfloat16 has and float16 has not.
        """
        rounded = all(one.activation and one.activation.scale == "e8m0" for one in self.parts)
        if not self.rotated or (rounded and dtype == torch.bfloat16):
            return dtype
        return torch.float32


Rounded: TypeAlias = Mapping[str, Sequence[Packed]]  # linear -> its packed parts


def packed_spec(
    fmt: Format, out_features: int, in_features: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of the tensors that hold an [out_features, in_features] weight."""
    spec: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.uint8, (out_features, fmt.packed_bytes(in_features))),
        "weight_scale": (SCALE_DTYPES[fmt.scale], (out_features, fmt.groups(in_features))),
    }
    if not fmt.symmetric:
        shape = (out_features, fmt.zero_point_bytes(in_features))
        spec["weight_zero_point"] = (torch.uint8, shape)
    if fmt.tensor_scale:
        spec["weight_global_scale"] = (torch.float32, (1,))
    return spec


def empty_packed(
    fmt: Format, out_features: int, in_features: int, device: torch.device | str | None = None
) -> Packed:
    """The tensors of `packed_spec`, for somebody to fill."""
    spec = packed_spec(fmt, out_features, in_features)
    return Packed(**{n: torch.empty(s, dtype=d, device=device) for n, (d, s) in spec.items()})


def recipe_spec(
    recipe: Recipe, out_features: int, in_features: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """`packed_spec` of a whole linear, of every segment."""
    spec: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if recipe.order_bits:
        spec["order"] = (order_dtype(in_features), (in_features,))
    parts = recipe.parts(in_features)
    for prefix, (scheme, columns) in zip(segment_prefixes(recipe), parts, strict=True):
        for name, entry in packed_spec(scheme.format, out_features, columns).items():
            spec[prefix + name] = entry
    return spec


def segment_prefixes(recipe: Recipe) -> list[str]:
    """What stands before the names of each segment's tensors."""
    if recipe.is_plain:
        return [""]
    return [f"segments.{number}." for number in range(len(recipe.segments))]


def layout_number(recipes: Iterable[Recipe]) -> int:
    """The least of `LAYOUTS` that has all formats of the weights."""
    weights = (scheme.weight for recipe in recipes for scheme, _ in recipe.segments)
    first = all(fmt is None or (fmt.element, fmt.scale) in FIRST_FORMATS for fmt in weights)
    return LAYOUTS[0] if first else LAYOUTS[1]


def order_dtype(in_features: int) -> torch.dtype:
    """What an order of this many columns is stored as."""
    return {8: torch.uint8, 16: torch.int16, 32: torch.int32}[order_bits(in_features)]


def pack(q: reference.Quantized, fmt: Format) -> Packed:
    """Codes, scales and zero points of a weight -> the tensors that are stored."""
    zero_point = None if q.zero_point is None else reference.pack_codes(q.zero_point, fmt.bits)
    codes = reference.pack_codes(q.codes, fmt.bits)
    return Packed(codes, q.scale, zero_point, q.tensor_scale)


def unpack(packed: Packed, fmt: Format, in_features: int) -> reference.Quantized:
    """Inverse of `pack`."""
    codes = reference.unpack_codes(packed.weight_packed, fmt.bits, in_features)
    zero_point = None
    if packed.weight_zero_point is not None:
        groups = fmt.groups(in_features)
        zero_point = reference.unpack_codes(packed.weight_zero_point, fmt.bits, groups)
    return reference.Quantized(codes, packed.weight_scale, zero_point, packed.weight_global_scale)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise UsageError that names the tensor if it holds a NaN or an infinity."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise UsageError(
            f"weights must be finite: got {bad} NaN or infinite values of {tensor.numel()} ({name})"
        )


def recipe_tensors(recipe: Recipe, packed: Sequence[Packed]) -> dict[str, Tensor]:
    """The tensors to store, named as in `mixbits.formats.pack.recipe_spec`."""
    tensors: dict[str, Tensor] = {}
    if recipe.order is not None and not recipe.order_in_producer:
        tensors["order"] = torch.tensor(recipe.order, dtype=order_dtype(len(recipe.order)))
    for prefix, part in zip(segment_prefixes(recipe), packed, strict=True):
        for name, value in part._asdict().items():
            if value is not None:
                tensors[prefix + name] = value
    return tensors
