"""Packed checkpoints are written: `save`, and `save_fake` for weights rounded but not packed.

What a folder holds, and how large it will be, is `mixbits.checkpoint.folder`'s; here values are
made for it, shard by shard. Whoever loads a folder needs nothing of this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..files.io import read_object
from ..formats.pack import Rounded, recipe_tensors
from ..formats.schemes import Assignment
from ..model.experts import expert_bias, expert_slice, layout_of
from ..model.layout import LinearInfo, head_is_tied, output_head, split_expert_name, weight_of
from ..rounding.nearest import pack_recipe, round_weights
from ..source.companions import copy_companions
from ..source.source import Source
from ..source.weights import Files, Weights
from .folder import (
    Shard,
    TensorSpec,
    checksum,
    crc,
    is_packed,
    layout_of_output,
    make_shards,
    stack_of,
    write_index,
)


class _Plain:
    """Values of tensors that are not packed: the source's own, or the model's where it has none."""

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self.state, self.weights = model.state_dict(), weights
        self._last: dict[str, Tensor] = {}  # made together with the one asked for last

    def __call__(self, spec: TensorSpec) -> Tensor:
        if spec.as_stored:
            return self.weights.files.read(spec.name)
        if spec.name not in self.weights.groups:
            return self.state[spec.name].detach().to(spec.dtype)
        if spec.name not in self._last:
            self._last = self.weights.tensors(spec.name)
        return self._last[spec.name].to(spec.dtype)


def _tensors(
    model: nn.Module,
    plain: _Plain,
    specs: Sequence[TensorSpec],
    assignment: Assignment,
    rounded: Rounded,
    orders: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The values of `specs`, name -> tensor; `orders` are those of rows."""
    out: dict[str, Tensor] = {}
    for spec in specs:
        if spec.name in out:
            continue
        owner = spec.name.rpartition(".")[0] if spec.linear is None else spec.linear.name
        order = None if spec.as_stored else orders.get(owner)
        if spec.linear is None or spec.is_plain:
            of_expert = spec.linear is not None
            value = _part_of_expert(model, plain, spec) if of_expert else plain(spec)
            out[spec.name] = (value if order is None else value[order]).contiguous()
            continue
        weight = weight_of(model, spec.linear).detach()
        recipe = assignment[owner]
        packed = rounded[owner] if owner in rounded else pack_recipe(owner, weight, recipe)
        if order is not None:
            packed = [part.rows(order) for part in packed]
        for name, value in recipe_tensors(recipe, packed).items():
            out[f"{owner}.{name}"] = value
    return out


def _part_of_expert(model: nn.Module, plain: _Plain, spec: TensorSpec) -> Tensor:
    """The [N, K], or the [N] bias, of an expert's linear that goes by itself and is not packed."""
    info = spec.linear
    assert info is not None
    module, expert, projection = split_expert_name(info.name)
    is_bias = spec.name.endswith(".bias")
    held: Any = model.get_submodule(module)
    name = stack_of(model, info) + "_bias" * is_bias
    if getattr(held, name.rpartition(".")[2]).dtype != spec.dtype:  # the source's is finer
        layout, stack = layout_of(held), plain(TensorSpec(name, spec.dtype, ()))
        assert layout is not None
        turn = layout.transposed and not is_bias
        return layout.part(stack[expert].T if turn else stack[expert], projection)
    value = (expert_bias if is_bias else expert_slice)(held, expert, projection)
    assert value is not None
    return value.detach()


def _row_orders(linears: Sequence[LinearInfo], assignment: Assignment) -> dict[str, Tensor]:
    """Linear -> order of its rows, where that of a reader's columns is written into them."""
    orders: dict[str, Tensor] = {}
    for info in linears:
        recipe = assignment.get(info.name)
        if recipe is not None and recipe.order_in_producer and recipe.order is not None:
            if not info.makers:
                raise ValueError(f"nothing makes the input of {info.name}, to fold its order into")
            orders |= dict.fromkeys(info.makers, torch.tensor(recipe.order))
    return orders


def _write_weights(
    folder: Path,
    model: nn.Module,
    weights: Weights,
    shards: Sequence[Shard],
    linears: Sequence[LinearInfo],
    assignment: Assignment,
    rounded: Rounded,
) -> list[int]:
    """Returns the `crc` of every tensor."""
    from safetensors.torch import save_file

    crcs, plain, orders = [], _Plain(model, weights), _row_orders(linears, assignment)
    for shard in shards:
        wanted = {s.name for s in shard.specs}
        tensors = _tensors(model, plain, shard.specs, assignment, rounded, orders)
        tensors = {n: t for n, t in tensors.items() if n in wanted}
        save_file(tensors, folder / shard.file, metadata={"format": "pt"})
        crcs += [crc(name, value) for name, value in tensors.items()]
    write_index(folder, shards)
    return crcs


def save(
    folder: Path,
    source: Source,
    model: nn.Module,
    linears: Sequence[LinearInfo],
    assignment: Assignment,
    provenance: dict[str, Any],
    rounded: Rounded = MappingProxyType({}),
) -> int:
    """Write a packed checkpoint into an existing folder; returns the bytes of the weight files.

    `rounded` has the linears that are packed already; others are rounded to nearest.

    Raises UsageError that names the tensor for weights that cannot be packed.
    """
    layout = layout_of_output(source, model, linears, assignment, provenance)
    shards = make_shards(layout.specs)
    crcs = _write_weights(folder, model, source.weights, shards, linears, assignment, rounded)
    layout.quantization["checksum"] = checksum(crcs, layout.quantization)
    text = json.dumps(layout.config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    copy_companions(source.path, folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def save_fake(
    folder: Path,
    source: Source,
    model: Any,
    linears: Sequence[LinearInfo],
    assignment: Assignment,
    rounded: Rounded = MappingProxyType({}),
) -> int:
    """Write a plain model whose weights are rounded but not packed, for any other tool.

    What is not rounded is as the source stores it, or in 16 bits where that is quantized. The model
    itself is changed. Activations are not rounded by such a model.
    """
    head = output_head(model)[0]
    if head_is_tied(model) and is_packed(head, assignment):
        model.config.tie_word_embeddings = False
    round_weights(model, [i for i in linears if i.name in assignment], assignment, rounded)
    weights, state = source.weights, model.state_dict()
    changed = {f"{i.name}.weight" for i in linears if is_packed(i.name, assignment)}
    changed |= {stack_of(model, i) for i in linears if i.is_expert and i.name in assignment}
    for name, value in state.items():
        kind = weights.stored_dtype(name) if name in weights.groups else None
        if kind not in (None, value.dtype):
            plain = value if name in changed else weights.tensor(name)
            # What the source folds lies in float32, and is written in its own type.
            state[name] = plain.to(source.dtype if name in changed else kind)
    model.config.dtype = source.dtype
    model.save_pretrained(folder, state_dict=state)
    if weights.carried:
        _add_shard(folder, {one.name: weights.plain(one).contiguous() for one in weights.carried})
    copy_companions(source.path, folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _add_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put more tensors beside those of a model that transformers has written."""
    from safetensors.torch import save_file

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = dict(read_object(index)["weight_map"])
    else:
        first = "model-first.safetensors"
        (folder / "model.safetensors").rename(folder / first)
        places = dict.fromkeys(Files([folder / first]).headers, first)
    file = "model-carried.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    places |= dict.fromkeys(tensors, file)
    text = json.dumps({"metadata": {}, "weight_map": places}, indent=2) + "\n"
    index.write_text(text, encoding="utf-8")
