"""auto-round's own format, for transformers with the auto-round package.

MX linears have the tensors of compressed-tensors (`auto_round:llm_compressor`); their activations
are rounded with scales by the rule that we call `floor`. Integers are packed as AutoGPTQ does:

    qweight  int32 [K * bits / 32, N]        codes, packed down the columns of the weight
    scales   float16 [groups, N]
    qzeros   int32 [groups, N * bits / 32]   zero points less one, packed along the rows

or, where any linear is asymmetric, with the zero points themselves (`auto_round`): a zero point of
0 has nothing below it.

Its loader makes linears of all experts, packed or not, which then may differ in anything.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats.pack import Packed
from ..formats.reference import pack_codes, unpack_codes
from ..formats.schemes import Scheme
from ..formats.words import words
from ..model.layout import decoder_blocks
from ..rounding.signround import UNQUANTIZED, layer_option
from . import compressed_tensors
from .folder import Piece, Shapes, linear_piece, plain_pieces, write_folder
from .packed import Carrier


def shapes(scheme: Scheme, rows: int, columns: int) -> Shapes:
    """Suffix -> dtype and shape of the tensors of a [rows, columns] weight."""
    fmt = scheme.format
    if fmt.is_float:
        return compressed_tensors.shapes(scheme, rows, columns, torch.uint8)
    groups = columns // fmt.group_size
    return {
        "qweight": (torch.int32, (columns * fmt.bits // 32, rows)),
        "scales": (torch.float16, (groups, rows)),
        "qzeros": (torch.int32, (groups, rows * fmt.bits // 32)),
    }


def tensors(packed: Packed, scheme: Scheme, columns: int, less_one: bool) -> dict[str, Tensor]:
    """The same weight as `shapes` announces it; `less_one` is AutoGPTQ's way with zero points."""
    fmt = scheme.format
    if fmt.is_float:
        return compressed_tensors.tensors(packed, scheme, columns)
    codes, scale, zero_point = packed.weight_packed, packed.weight_scale, packed.weight_zero_point
    rows, groups = scale.shape
    if zero_point is None:
        points = torch.full((groups, rows), 1 << (fmt.bits - 1), dtype=torch.uint8)
    else:
        points = unpack_codes(zero_point, fmt.bits, groups).t()
    qzeros = words(pack_codes(points - int(less_one), fmt.bits))
    return {"qweight": words(codes).t(), "scales": scale.t(), "qzeros": qzeros}


def _settings(name: str, scheme: Scheme) -> dict[str, Any]:
    """What auto-round calls a scheme. By what rule weights got their scales is past."""
    fmt = scheme.weight
    return layer_option(name, replace(scheme, weight=fmt and replace(fmt, scale_mode="floor")))


def quantization_config(
    schemes: dict[str, Scheme], unpacked: list[str], blocks: str, packing: str
) -> dict[str, Any]:
    """`quantization_config` of config.json: the first linear's scheme, and who differs from it."""
    others = {name: _settings(name, scheme) for name, scheme in schemes.items()}
    first = next(iter(others.values()))
    inside = f"{blocks}."  # the head is named even if it differs in nothing, or it is left out
    extra = {n: s for n, s in others.items() if s != first or not n.startswith(inside)}
    extra |= dict.fromkeys(unpacked, UNQUANTIZED)
    return {
        "quant_method": "auto-round",
        "packing_format": packing,
        "block_name_to_quantize": blocks,
        **first,
        "extra_config": extra,
    }


def _piece(carrier: Carrier, name: str, less_one: bool) -> Piece:
    info, scheme = carrier.model.linears[name], carrier.fits[name].scheme

    def make() -> dict[str, Tensor]:
        return tensors(carrier.packed(name), scheme, info.in_features, less_one)

    return linear_piece(name, shapes(scheme, info.out_features, info.in_features), make)


def write(folder: Path, carrier: Carrier) -> None:
    """Fill an existing, empty folder."""
    schemes = {name: fit.scheme for name, fit in carrier.fits.items()}
    formats = {name: s.weight for name, s in schemes.items() if s.weight is not None}
    packing = "auto_round:auto_gptq"
    if any(fmt.is_float for fmt in formats.values()):
        packing = "auto_round:llm_compressor"
    elif not all(fmt.symmetric for fmt in formats.values()):
        packing = "auto_round"
    less_one = packing == "auto_round:auto_gptq"
    pieces = [_piece(carrier, name, less_one) for name in formats]
    unpacked = carrier.model.unpacked_linears() + carrier.model.carried_modules
    blocks = decoder_blocks(carrier.model.shapes)[0]
    config = quantization_config(schemes, unpacked, blocks, packing)
    write_folder(folder, carrier, [*pieces, *plain_pieces(carrier, stacked=False)], config)
