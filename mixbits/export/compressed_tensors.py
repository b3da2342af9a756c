"""compressed-tensors: for transformers, and for vLLM.

    MXFP4  weight_packed  uint8 [N, K / 2], weight_scale uint8 [N, K / 32]: our own bytes
    MXFP8  weight         float8_e4m3fn [N, K], weight_scale as above
    int    weight_packed  int32 [N, K * bits / 32], our own bytes four by four
           weight_scale   [N, groups], in the model's dtype: the loader casts it to that
           weight_shape   int64 [2]
           weight_zero_point  int32 [N * bits / 32, groups], packed down the rows

compressed-tensors 0.20 writes zero points so, and vLLM reads them; its own loader in transformers
expects them unpacked, and refuses asymmetric linears.

Layers with the same scheme are a group, which names them one by one. Activations, where they are
quantized, are rounded by the engine: dynamically, their scales by the rule that we call `even`.

Experts are stored one by one too, under the names of checkpoints (`experts.7.gate_proj`; a
Mixtral's are `block_sparse_moe.experts.7.w1`); a group has a pattern for those of a layer, by which
transformers knows them. Those that are not quantized stay in transformers' own two tensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats.pack import Packed
from ..formats.reference import pack_codes, unpack_codes
from ..formats.schemes import Format, Scheme
from .folder import Piece, Shapes, linear_piece, plain_pieces, write_folder
from .packed import Carrier, PackedModel

_FORMATS = {"e2m1": "mxfp4-pack-quantized", "e4m3": "mxfp8-quantized"}  # others: pack-quantized


def _format_name(fmt: Format) -> str:
    return _FORMATS.get(fmt.element, "pack-quantized")


def words(packed: Tensor) -> Tensor:
    """uint8 [N, B] -> int32 [N, ceil(B / 4)], the first byte the lowest; the last is filled up."""
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)


def shapes(fmt: Format, rows: int, columns: int, dtype: torch.dtype) -> Shapes:
    """Suffix -> dtype and shape of the tensors of a [rows, columns] weight."""
    groups = columns // fmt.group_size
    scale = torch.uint8, (rows, groups)
    if fmt.element == "e4m3":
        return {"weight": (torch.float8_e4m3fn, (rows, columns)), "weight_scale": scale}
    if fmt.is_float:
        return {"weight_packed": (torch.uint8, (rows, columns // 2)), "weight_scale": scale}
    found: dict[str, Any] = {
        "weight_packed": (torch.int32, (rows, columns * fmt.bits // 32)),
        "weight_scale": (dtype, (rows, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not fmt.symmetric:
        found["weight_zero_point"] = (torch.int32, (-(-rows * fmt.bits // 32), groups))
    return found


def tensors(packed: Packed, fmt: Format, columns: int) -> dict[str, Tensor]:
    """The same weight as `shapes` announces it."""
    codes, scale = packed.weight_packed, packed.weight_scale
    if fmt.element == "e4m3":
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    if fmt.is_float:
        return {"weight_packed": codes, "weight_scale": scale}
    found = {"weight_packed": words(codes), "weight_scale": scale}
    found["weight_shape"] = torch.tensor([len(codes), columns])
    if packed.weight_zero_point is not None:
        points = unpack_codes(packed.weight_zero_point, fmt.bits, scale.shape[1])
        found["weight_zero_point"] = words(pack_codes(points.t(), fmt.bits)).t()
    return found


def _arguments(fmt: Format, dynamic: bool) -> dict[str, Any]:
    """What compressed-tensors calls quantization arguments."""
    found = {
        "num_bits": fmt.bits,
        "type": "float" if fmt.is_float else "int",
        "strategy": "group",
        "group_size": fmt.group_size,
        "symmetric": fmt.symmetric,
        "dynamic": dynamic,
    }
    marks = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}  # of MX, by their presence
    return {**found, **(marks if fmt.is_float else {})}


def _group(scheme: Scheme, names: list[str]) -> dict[str, Any]:
    inputs = scheme.activation
    return {
        "targets": names,
        "format": _format_name(scheme.format),
        "weights": _arguments(scheme.format, dynamic=False),
        "input_activations": None if inputs is None else _arguments(inputs, dynamic=True),
        "output_activations": None,
    }


def _bits(scheme: Scheme) -> int:
    return scheme.format.bits


def quantization_config(schemes: dict[str, Scheme], ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json for linears that are quantized, and those that are not.

    A folder of one format has its name; of several, each group has its own. Groups of more bits
    come first: transformers reads all experts by the first group that has any, and fails on words
    of 4 bits that it takes for 8 (for want of groups), but not on words of 8 that it takes for 4.
    """
    members: dict[Scheme, list[str]] = {}
    for name, scheme in sorted(schemes.items(), key=lambda entry: -_bits(entry[1])):
        members.setdefault(scheme, []).append(name)
    groups = [_group(scheme, names) for scheme, names in members.items()]
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }


def _piece(carrier: Carrier, name: str) -> Piece:
    info, fmt = carrier.model.linears[name], carrier.fits[name].scheme.format

    def make() -> dict[str, Tensor]:
        packed = carrier.round_scales(name, carrier.packed(name), fmt)
        return tensors(packed, fmt, info.in_features)

    announced = shapes(fmt, info.out_features, info.in_features, carrier.dtype)
    return linear_piece(carrier.model.stored_name(name), announced, make)


def _targets(model: PackedModel, names: list[str]) -> list[str]:
    """What a group calls these linears. A layer's experts, which agree, are one pattern."""
    found = {n: model.stored_name(n) for n in names}
    for module, members in model.experts.items():
        if members[0] in found:
            pattern = f"re:{re.escape(model.stored_name(module))}\\..*"
            found |= dict.fromkeys(members, pattern)
    return list(dict.fromkeys(found.values()))


def write(folder: Path, carrier: Carrier) -> None:
    """Fill an existing, empty folder."""
    model = carrier.model
    quantized = {n: f.scheme for n, f in carrier.fits.items() if f.scheme.weight is not None}
    pieces = [_piece(carrier, name) for name in quantized]
    left = [name for name in carrier.fits if name not in quantized]
    config = quantization_config(quantized, [*model.unpacked_linears(), *left])
    config["ignore"] = _targets(model, config["ignore"]) + model.carried_modules
    for group in config["config_groups"].values():
        group["targets"] = _targets(model, group["targets"])
    write_folder(folder, carrier, [*pieces, *plain_pieces(carrier, stacked=True)], config)
