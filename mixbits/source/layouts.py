"""Which tensors of a checkpoint make one weight, by the `quant_method` of its config.json.

Known from names, dtypes and shapes alone, and checked: what does not fit together, and what nothing
accounts for although its dtype says that it is no plain tensor, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import UsageError, first_line
from ..formats.schemes import MX_GROUP
from .stored import (
    ELEMENTS,
    FLOAT8,
    Awq,
    Compressed,
    Float8,
    GptOss,
    Gptq,
    Header,
    Headers,
    Mx,
    Nvfp4,
    Stored,
)

_SCALES = ("_scale_inv", "_scale")  # of `weight`, whatever a module calls its weight
_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "input_global_scale")


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
    if torch.Size(grid).numel() == 1 or grid == (*shape[:-2], 1, 1):
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
        element = "e2m1" if name == packed else ELEMENTS.get(dtype, "")
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
    for module in reader.ending(".pre_quant_scale"):
        raise UsageError(f"{module}.pre_quant_scale scales an input, which is not read")
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
        from compressed_tensors.config import CompressionFormat
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.utils.match import match_quantizable_tensors
    except ImportError as error:
        raise UsageError(
            "weights stored by compressed-tensors are read by it: pip install compressed-tensors"
        ) from error
    try:
        config = QuantizationConfig.model_validate(dict(reader.settings))
    except ValueError as error:
        raise UsageError(f"quantization_config is not compressed-tensors': {error}") from error
    for scheme in config.config_groups.values():
        told = scheme.format or infer_module_format(torch.nn.Linear, scheme)
        layout = CompressionFormat(told).value
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
    elif layout == "mxfp6-pack-quantized":
        columns = shape[-1] * 4 // 3
    plain = (*shape[:-1], columns)
    name = f"{module}.weight"
    if layout.startswith(("mxfp4", "mxfp8")):
        element = "e2m1" if layout.startswith("mxfp4") else ELEMENTS[dtype]
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
