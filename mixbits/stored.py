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
not be rounded a second time. Everything here is known from names, dtypes and shapes; values are
read one tensor at a time.

Sources: transformers' integrations (finegrained_fp8, mxfp4), compressed-tensors, AutoGPTQ and
GPTQModel (v1 stores zero points less one), AutoAWQ's gemm layout, NVIDIA ModelOpt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .formats import INT_GROUPS, INTEGERS, MINIFLOATS, MX_GROUP, Format, UsageError, first_line
from .pack import Packed, pack, unpack
from .reference import Quantized, dequantize, minifloat_decode, unpack_codes


class Header(NamedTuple):
    """What a weight file says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


Headers: TypeAlias = Mapping[str, Header]
Read: TypeAlias = Callable[[str], Tensor]  # name of a stored tensor -> its value

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_ELEMENTS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_SCALES = ("_scale_inv", "_scale")  # of `weight`, whatever a module calls its weight
_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "input_global_scale")


class Kept(NamedTuple):
    """Codes and scales as they are stored, in a format of ours; shapes as of `mixbits.pack`.

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
        return Format(_ELEMENTS[self.dtype], MX_GROUP) if whole else None

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
class _Integers(Stored):
    """`bits` wide codes [N, K] with a scale and a zero point for every group of columns."""

    bits: int = 4
    group: int = 128

    def quantized(self, read: Read) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """codes [N, K], scale [N, G] float, zero point [N, G], and the group of every column."""
        raise NotImplementedError

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
    stream = words.contiguous().view(torch.uint8)
    if bits != 3:
        return unpack_codes(stream, bits, count)
    each = (stream.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    fields = each.flatten(-2)[..., : 3 * count].unflatten(-1, (count, 3))
    return (fields << torch.arange(3, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


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


class _Reader:
    """Takes tensors off a checkpoint's headers, weight by weight; what is left is plain."""

    def __init__(self, headers: Headers, settings: Mapping[str, Any]) -> None:
        self.headers, self.settings = dict(headers), settings
        self.found: list[Stored] = []

    def ending(self, suffix: str) -> list[str]:
        """Names without that ending, of all tensors that have it."""
        return [name.removesuffix(suffix) for name in self.headers if name.endswith(suffix)]

    def need(self, *names: str) -> list[Header]:
        """Headers that must be there. Raises UsageError for the first that is not."""
        for name in names:
            if name not in self.headers:
                raise UsageError(f"a weight of this checkpoint is not whole: {name} is missing")
        return [self.headers[name] for name in names]

    def take(self, stored: Stored) -> None:
        """Account for a weight; scales of activations beside it are part of it."""
        module = stored.parts[0].rpartition(".")[0]
        beside = [f"{module}.{end}" for end in _ACTIVATIONS] + [
            f"{stored.parts[0]}_activation_scale"
        ]
        for name in (*stored.parts, *beside):
            self.headers.pop(name, None)
        self.found.append(stored)

    def rest(self) -> list[Stored]:
        """Everything, with what was not taken as it is. Refuses what has no plain value."""
        for name, (dtype, shape) in self.headers.items():
            ending = name.rpartition(".")[2]
            if dtype in FLOAT8 or ending in ("qweight", "weight_packed", "weight_g_idx"):
                raise UsageError(
                    f"{name} is stored as {str(dtype).removeprefix('torch.')} {list(shape)}, in a "
                    "way that quantization_config of config.json does not say"
                )
            self.found.append(Stored(name, shape, dtype, (name,)))
        return self.found


def _float8(reader: _Reader) -> None:
    size = reader.settings.get("weight_block_size") or (128, 128)
    for name in [n for n, h in reader.headers.items() if h.dtype in FLOAT8]:
        scale = next((name + end for end in _SCALES if name + end in reader.headers), None)
        if scale is None:
            continue  # `rest` names it
        dtype, shape = reader.headers[name]
        reader.take(Float8(name, shape, dtype, (name, scale), _block(reader, name, scale, size)))


def _block(reader: _Reader, name: str, scale: str, size: Any) -> tuple[int, int]:
    """Rows and columns that share a scale. Raises UsageError for a grid that does not fit."""
    shape, grid = reader.headers[name].shape, reader.headers[scale].shape
    rows, columns = shape[-2:] if len(shape) > 1 else (1, *shape)
    if torch.Size(grid).numel() == 1:
        return rows, columns
    if grid in (shape[:-1], (*shape[:-1], 1)):
        return 1, columns
    down, across = int(size[0]), int(size[1])
    wanted = (*shape[:-2], -(-rows // down), -(-columns // across))
    if len(shape) < 2 or grid != wanted:
        raise UsageError(
            f"scales of {name} {list(shape)} in blocks of {down} x {across} must be "
            f"{list(wanted)}: got {list(grid)}"
        )
    return down, across


def _mxfp4(reader: _Reader) -> None:
    for name in reader.ending("_blocks"):
        blocks, scales = reader.need(f"{name}_blocks", f"{name}_scales")
        if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16:
            raise UsageError(
                f"MXFP4 blocks must be [experts, rows, groups, 16] with a scale for each group: "
                f"got {list(blocks.shape)} and {list(scales.shape)} ({name})"
            )
        experts, rows, groups, _ = blocks.shape
        parts = (f"{name}_blocks", f"{name}_scales")
        shape = experts, groups * MX_GROUP, rows
        reader.take(GptOss(name, shape, torch.uint8, parts))


def _gptq(reader: _Reader) -> None:
    settings = reader.settings
    packing = str(settings.get("packing_format", ""))
    version = settings.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise UsageError(f"GPTQ weights are read in the formats gptq and gptq_v2: got {version!r}")
    less_one = version == "gptq" and packing != "auto_round"
    for module in reader.ending(".qweight"):
        parts = [f"{module}.{n}" for n in ("qweight", "qzeros", "scales")]
        qweight, qzeros, scales = reader.need(*parts)
        rows = scales.shape[1]
        bits = _field_bits(f"{module}.qzeros", qzeros.shape[1], rows)
        columns = qweight.shape[0] * 32 // bits
        if f"{module}.g_idx" in reader.headers:
            parts.append(f"{module}.g_idx")
            columns = reader.headers[parts[3]].shape[0]
        if qweight.shape != (columns * bits // 32, rows) or qzeros.shape[0] != scales.shape[0]:
            raise UsageError(
                f"GPTQ weights of [{rows}, {columns}] in {bits} bits do not have these shapes: "
                f"{list(qweight.shape)}, {list(qzeros.shape)}, {list(scales.shape)} ({module})"
            )
        group = _group(settings, columns, scales.shape[0], module)
        shape, kind = (rows, columns), qweight.dtype
        name = f"{module}.weight"
        reader.take(Gptq(name, shape, kind, tuple(parts), bits, group, less_one))


def _field_bits(name: str, words: int, fields: int) -> int:
    bits = words * 32 // fields
    if bits not in (2, 3, 4, 8) or words * 32 != bits * fields:
        raise UsageError(
            f"{name} must hold {fields} fields of 2, 3, 4 or 8 bits: got {words} words"
        )
    return bits


def _group(settings: Mapping[str, Any], columns: int, groups: int, module: str) -> int:
    size = settings.get("group_size", settings.get("q_group_size", 128))
    size = columns if size in (-1, None) else int(size)
    if -(-columns // size) != groups:
        raise UsageError(
            f"{columns} columns in groups of {size} must have {-(-columns // size)} scales: got "
            f"{groups} ({module})"
        )
    return size


def _awq(reader: _Reader) -> None:
    settings = reader.settings
    version, bits = settings.get("version", "gemm"), settings.get("bits", settings.get("w_bit", 4))
    if str(version).lower() != "gemm" or bits != 4:
        raise UsageError(f"AWQ weights are read in 4 bits, version gemm: got {bits}, {version}")
    for module in reader.ending(".qweight"):
        parts = [f"{module}.{n}" for n in ("qweight", "qzeros", "scales")]
        qweight, qzeros, scales = reader.need(*parts)
        columns, rows = qweight.shape[0], scales.shape[1]
        if qweight.shape[1] * 8 != rows or qzeros.shape != (scales.shape[0], rows // 8):
            raise UsageError(
                f"AWQ weights of [{rows}, {columns}] do not have these shapes: "
                f"{list(qweight.shape)}, {list(qzeros.shape)}, {list(scales.shape)} ({module})"
            )
        group = _group(settings, columns, scales.shape[0], module)
        stored = f"{module}.weight", (rows, columns), qweight.dtype, tuple(parts)
        reader.take(Awq(*stored, 4, group))


def _mx(reader: _Reader) -> None:
    """e2m1 in `weight_packed`, or 8-bit floats in `weight`, with e8m0 bytes in `weight_scale`."""
    for module in reader.ending(".weight_scale"):
        scale = f"{module}.weight_scale"
        packed, weight = f"{module}.weight_packed", f"{module}.weight"
        name = packed if packed in reader.headers else weight
        (dtype, shape), (_, grid) = reader.need(name, scale)
        columns = shape[-1] * 2 if name == packed else shape[-1]
        element = "e2m1" if name == packed else _ELEMENTS.get(dtype, "")
        if not element or grid != (*shape[:-1], -(-columns // MX_GROUP)):
            raise UsageError(
                f"an MX weight must have a scale for every {MX_GROUP} of {columns} columns: got "
                f"{list(grid)} beside {list(shape)} ({module})"
            )
        reader.take(Mx(weight, (*shape[:-1], columns), dtype, (name, scale), element))


def _auto_round(reader: _Reader) -> None:
    packing = str(reader.settings.get("packing_format", ""))
    if packing.endswith("awq"):
        _awq(reader)
    elif packing == "auto_round:llm_compressor":
        _mx(reader)
    elif packing in ("auto_round", "auto_round:auto_gptq", "auto_round:gptq"):
        _gptq(reader)
    else:
        raise UsageError(f"auto-round's packing_format {packing!r} is not read")


def _modelopt(reader: _Reader) -> None:
    for module in reader.ending(".weight_scale_2"):
        parts = [f"{module}.{n}" for n in ("weight", "weight_scale", "weight_scale_2")]
        weight, *_ = reader.need(*parts)
        shape = (*weight.shape[:-1], weight.shape[-1] * 2)
        reader.take(Nvfp4(parts[0], shape, weight.dtype, tuple(parts)))
    _float8(reader)


def _compressed_tensors(reader: _Reader) -> None:
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.utils.match import match_quantizable_tensors
    except ImportError:
        raise UsageError(
            "weights stored by compressed-tensors are read by it: pip install compressed-tensors"
        ) from None
    try:
        config = QuantizationConfig.model_validate(dict(reader.settings))
    except ValueError as error:
        raise UsageError(f"quantization_config is not compressed-tensors': {error}") from None
    for scheme in config.config_groups.values():
        layout = str((scheme.format or infer_module_format(torch.nn.Linear, scheme)).value)
        compressor: Any = BaseCompressor.get_value_from_registry(layout)
        first, *others = compressor.compression_param_names(scheme)
        headers: Any = reader.headers
        matched = match_quantizable_tensors(headers, config.ignore, scheme.targets, [first])
        for module, _ in list(matched):
            names = [first, *(n for n in others if f"{module}.{n}" in reader.headers)]
            _take_compressed(reader, module, names, layout, scheme)


def _take_compressed(
    reader: _Reader, module: str, names: list[str], layout: str, scheme: Any
) -> None:
    parts, args = [f"{module}.{name}" for name in names], scheme.weights
    if f"{module}.weight_scale" not in reader.headers:
        return  # not quantized, whatever the targets say
    (dtype, shape), (_, grid) = reader.need(parts[0], f"{module}.weight_scale")
    bits, columns = int(args.num_bits), shape[-1]
    if layout == "pack-quantized":
        columns = -(-shape[-1] * 32 // bits) if args.strategy != "group" else 0
        columns = columns or grid[-1] * args.group_size
    elif layout in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
        columns = shape[-1] * 2
    plain = (*shape[:-1], columns)
    name = f"{module}.weight"
    if layout.startswith(("mxfp4", "mxfp8")):
        element = "e2m1" if layout.startswith("mxfp4") else _ELEMENTS[dtype]
        reader.take(Mx(name, plain, dtype, (parts[0], f"{module}.weight_scale"), element))
        return
    group = int(args.group_size or columns)
    settings = bits, group, tuple(names), layout, scheme
    reader.take(Compressed(name, plain, dtype, tuple(parts), *settings))


_METHODS: dict[str, Callable[[_Reader], None]] = {
    "fp8": _float8,
    "fbgemm_fp8": _float8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "modelopt": _modelopt,
}


def stored_tensors(headers: Headers, quantization: Mapping[str, Any] | None) -> list[Stored]:
    """Every tensor of a checkpoint, from the headers of its files and its `quantization_config`.

    Raises UsageError, by name, for a method or a tensor that cannot be made plain.
    """
    reader = _Reader(headers, quantization or {})
    if quantization:
        method = str(quantization.get("quant_method"))
        if method not in _METHODS:
            raise UsageError(
                f"weights that are stored by {method} cannot be read (of quantized ones, those by "
                f"{', '.join(_METHODS)} can): pass the original"
            )
        try:
            _METHODS[method](reader)
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UsageError(f"weights stored by {method}: {first_line(error)}") from error
    return reader.rest()
