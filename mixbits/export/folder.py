"""A transformers folder with linears in somebody else's layout: config.json and safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..checkpoint.folder import Shard, TensorSpec, make_shards, plain_config, write_index
from ..errors import UsageError
from ..model.experts import STANDARD, layout_of
from ..model.families import FAMILIES
from ..source.companions import copy_companions
from .packed import Carrier

Shapes: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # suffix -> dtype, shape


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together: `make` gives those that `specs` announce."""

    specs: Sequence[TensorSpec]
    make: Callable[[], dict[str, Tensor]]


def linear_piece(name: str, shapes: Shapes, make: Callable[[], dict[str, Tensor]]) -> Piece:
    """The tensors `<name>.<suffix>` of one linear; `make` gives suffix -> tensor."""
    specs = [TensorSpec(f"{name}.{key}", *entry) for key, entry in shapes.items()]
    return Piece(specs, lambda: {f"{name}.{key}": value for key, value in make().items()})


def _plain_piece(carrier: Carrier, spec: TensorSpec) -> Piece:
    stored = carrier.model.stored_name(spec.name)
    made = TensorSpec(stored, carrier.kept(spec.dtype), spec.shape)
    return Piece([made], lambda: {stored: carrier.plain(spec.name)})


def _unpacked_piece(carrier: Carrier, name: str) -> Piece:
    """A linear that is packed no more, or an expert's that never was."""
    info = carrier.model.linears[name]
    shape = {"weight": (carrier.unpacked_dtype(name), (info.out_features, info.in_features))}
    return linear_piece(name, shape, lambda: {"weight": carrier.unpacked(name)})


def _stacked_piece(carrier: Carrier, module: str, members: Sequence[str]) -> Piece:
    """A layer's experts in transformers' own two tensors."""
    gates, ups, downs = (members[i::3] for i in range(3))
    gate = carrier.model.linears[gates[0]]
    rows, columns = gate.out_features, gate.in_features
    dtype = reduce(torch.promote_types, (carrier.unpacked_dtype(name) for name in members))
    shapes = {
        "gate_up_proj": (dtype, (len(gates), 2 * rows, columns)),
        "down_proj": (dtype, (len(downs), columns, rows)),
    }

    def make() -> dict[str, Tensor]:
        gate, up, down = (
            torch.stack([carrier.unpacked(name).to(dtype) for name in names])
            for names in (gates, ups, downs)
        )
        return {"gate_up_proj": torch.cat([gate, up], 1), "down_proj": down}

    return linear_piece(module, shapes, make)


def _carried_piece(carrier: Carrier, spec: TensorSpec) -> Piece:
    return Piece([spec], lambda: {spec.name: carrier.model.tensor(spec.name)})


def plain_pieces(carrier: Carrier, stacked: bool) -> list[Piece]:
    """What is not quantized, or no more; `stacked`: experts layer by layer, or else one by one.

    Tensors keep their dtype, except those in the model's own where the carrier has another.

    Raises UsageError for quantized experts of a model whose loaders are not known.
    """
    model, kind = carrier.model, carrier.model.shapes.config.model_type
    quantized = {name for name, fit in carrier.fits.items() if fit.scheme.weight is not None}
    if model.family.stored_names is None and any(
        model.linears[name].is_expert
        and (name in quantized or layout_of(model.shapes.get_submodule(module)) != STANDARD)
        for module, members in model.experts.items()
        for name in members
    ):
        known = [name for name, family in FAMILIES.items() if family.stored_names is not None]
        raise UsageError(f"experts are exported of {', '.join(known)} only: got {kind}")
    pieces = [_plain_piece(carrier, spec) for spec in model.plain.values()]
    left = [name for name in carrier.fits if name not in quantized]
    pieces += [_unpacked_piece(carrier, n) for n in left if not model.linears[n].is_expert]
    for module, members in model.experts.items():
        alone = [name for name in members if name not in quantized]
        if stacked and alone:
            pieces.append(_stacked_piece(carrier, module, alone))
        else:
            pieces += [_unpacked_piece(carrier, name) for name in alone]
    return pieces + [_carried_piece(carrier, spec) for spec in model.carried_specs]


def _write_shard(folder: Path, shard: Shard, pieces: Sequence[Piece]) -> None:
    from safetensors.torch import save_file

    wanted = {spec.name for spec in shard.specs}
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        if any(spec.name in wanted for spec in piece.specs):
            made = piece.make()
            tensors |= {spec.name: made[spec.name].contiguous() for spec in piece.specs}
    for name in tensors.keys() - wanted:
        del tensors[name]
    save_file(tensors, folder / shard.file, metadata={"format": "pt"})


def write_folder(
    folder: Path, carrier: Carrier, pieces: Sequence[Piece], quantization: dict[str, Any] | None
) -> None:
    """Weights shard by shard, tokenizer and others, config.json with `quantization`, if any."""
    shards = make_shards([spec for piece in pieces for spec in piece.specs])
    for shard in shards:
        _write_shard(folder, shard, pieces)
    write_index(folder, shards)
    copy_companions(carrier.model.path, folder)
    config = plain_config(carrier.model.path, carrier.dtype)
    if quantization is not None:
        config["quantization_config"] = quantization
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
