"""compressed-tensors: for transformers, and for vLLM.

    MXFP4    weight_packed  uint8 [N, K / 2], weight_scale uint8 [N, K / 32]: our own bytes
    NVFP4    weight_packed  uint8 [N, K / 2], weight_scale float8_e4m3fn [N, K / 16], and what that
                            is divided by, weight_global_scale float32 [1]: our own bytes
    MXFP6    weight_packed  uint8 [N, 3 K / 4]: four codes one behind the other, not in planes
    MXFP8    weight         float8_e4m3fn [N, K], weight_scale as of MXFP4
    FP8      weight         float8_e4m3fn [N, K], weight_scale float32 [N, 1]
    int      weight_packed  int32 [N, K * bits / 32], one code behind the other
             weight_scale   [N, groups], in the model's dtype: the loader casts it to that
             weight_shape   int64 [2]
             weight_zero_point  int32 [N * bits / 32, groups], packed down the rows
    int of which inputs are int8 too
             weight         int8 [N, K], weight_scale as above; weight_zero_point int8 [N, groups]

compressed-tensors 0.20 writes zero points packed, and vLLM reads them; its own loader in
transformers expects them unpacked, and refuses asymmetric linears that are packed.

Layers with the same scheme are a group, which names them one by one. Activations, where they are
quantized, are rounded by the engine: dynamically, with scales by the rule that we call `even`, or
one scale for a token. That loader computes such a scale, and casts those of FP8 weights, in the
model's dtype: in float32 it computes what we do.

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
from ..formats.reference import unpack_codes
from ..formats.schemes import INTEGERS, ROW, Format, Scheme
from ..formats.words import pack_stream, words
from .folder import Piece, Shapes, linear_piece, plain_pieces, write_folder
from .packed import Carrier, PackedModel

_LAYOUTS = {  # element, scale -> what compressed-tensors calls its layout
    ("e2m1", "e8m0"): "mxfp4-pack-quantized",
    ("e2m1", "e4m3"): "nvfp4-pack-quantized",
    ("e2m3", "e8m0"): "mxfp6-pack-quantized",
    ("e4m3", "e8m0"): "mxfp8-quantized",
    ("e4m3", "float32"): "float-quantized",
    **{(element, "float16"): "pack-quantized" for element in INTEGERS},
}
_SCALE_TYPES = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn, "float32": torch.float32}


def layout(scheme: Scheme) -> str:
    """What compressed-tensors calls the way in which a scheme's weights are stored."""
    fmt, inputs = scheme.format, scheme.activation
    name = _LAYOUTS[fmt.element, fmt.scale]
    if name == "float-quantized" and inputs is None:
        return "naive-quantized"
    is_loose = name == "pack-quantized" and inputs is not None and not inputs.is_float
    return "int-quantized" if is_loose else name


def _codes_shape(scheme: Scheme, rows: int, columns: int) -> Shapes:
    fmt, kind = scheme.format, layout(scheme)
    if kind == "pack-quantized":
        return {"weight_packed": (torch.int32, (rows, columns * fmt.bits // 32))}
    if "pack" in kind:
        return {"weight_packed": (torch.uint8, (rows, columns * fmt.bits // 8))}
    return {"weight": (torch.float8_e4m3fn if fmt.is_float else torch.int8, (rows, columns))}


def shapes(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> Shapes:
    """Suffix -> dtype and shape of the tensors of a [rows, columns] weight."""
    fmt, groups = scheme.format, scheme.format.groups(columns)
    scale = _SCALE_TYPES.get(fmt.scale, dtype), (rows, groups)
    found = {**_codes_shape(scheme, rows, columns), "weight_scale": scale}
    if fmt.tensor_scale:
        found["weight_global_scale"] = (torch.float32, (1,))
    is_packed = layout(scheme) == "pack-quantized"
    if is_packed:
        found["weight_shape"] = (torch.int64, (2,))
    if not fmt.symmetric:
        packed = torch.int32, (-(-rows * fmt.bits // 32), groups)
        found["weight_zero_point"] = packed if is_packed else (torch.int8, (rows, groups))
    return found


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Offset binary as int8."""
    return (codes.short() - (1 << bits - 1)).to(torch.int8)


def _codes(packed: Packed, scheme: Scheme, columns: int) -> dict[str, Tensor]:
    fmt, kind, stored = scheme.format, layout(scheme), packed.weight_packed
    if fmt.is_float and fmt.bits == 8:
        return {"weight": stored.view(torch.float8_e4m3fn)}
    if kind == "int-quantized":
        return {"weight": _signed(unpack_codes(stored, fmt.bits, columns), fmt.bits)}
    if len(fmt.planes) > 1:
        stored = pack_stream(unpack_codes(stored, fmt.bits, columns), fmt.bits)
    return {"weight_packed": stored if fmt.is_float else words(stored)}


def tensors(packed: Packed, scheme: Scheme, columns: int) -> dict[str, Tensor]:
    """The same weight as `shapes` announces it."""
    fmt, scale = scheme.format, packed.weight_scale
    if fmt.scale == "e4m3":
        scale = scale.view(torch.float8_e4m3fn)
    found = {**_codes(packed, scheme, columns), "weight_scale": scale}
    if packed.weight_global_scale is not None:
        found["weight_global_scale"] = packed.weight_global_scale
    is_packed = layout(scheme) == "pack-quantized"
    if is_packed:
        found["weight_shape"] = torch.tensor([len(scale), columns])
    if packed.weight_zero_point is not None:
        points = unpack_codes(packed.weight_zero_point, fmt.bits, scale.shape[1])
        down = words(pack_stream(points.t(), fmt.bits)).t()
        found["weight_zero_point"] = down if is_packed else _signed(points, fmt.bits)
    return found


def _grouping(fmt: Format, dynamic: bool) -> dict[str, Any]:
    if fmt.group_size == ROW:
        return {"strategy": "token" if dynamic else "channel"}
    strategy = "tensor_group" if fmt.tensor_scale else "group"
    return {"strategy": strategy, "group_size": fmt.group_size}


def _arguments(fmt: Format, dynamic: bool) -> dict[str, Any]:
    """What compressed-tensors calls quantization arguments."""
    found = {
        "num_bits": fmt.bits,
        "type": "float" if fmt.is_float else "int",
        **_grouping(fmt, dynamic),
        "symmetric": fmt.symmetric,
        "dynamic": dynamic,
    }
    if fmt.scale in ("e8m0", "e4m3"):  # it knows them by the presence of these
        found |= dict.fromkeys(("scale_dtype", "zp_dtype"), str(_SCALE_TYPES[fmt.scale]))
    return found


def _group(scheme: Scheme, names: list[str]) -> dict[str, Any]:
    inputs = scheme.activation
    return {
        "targets": names,
        "format": layout(scheme),
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
    info, scheme = carrier.model.linears[name], carrier.fits[name].scheme

    def make() -> dict[str, Tensor]:
        packed = carrier.round_scales(name, carrier.packed(name), scheme.format)
        return tensors(packed, scheme, info.in_features)

    announced = shapes(scheme, info.out_features, info.in_features, carrier.dtype)
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
