"""Back to 16 bits: a folder as transformers writes it, which needs no mixbits.

Every packed linear becomes the weight that its codes and scales stand for, in the order of columns
that the original had, rounded to the model's dtype; experts become transformers' own 3-D tensors.
What is not packed keeps its value and dtype. What the source had quantized, and was left so or is
carried along beside the model, becomes plain as well; what is carried and plain stays as it is.
Activations are not rounded by such a model, whatever the schemes said.

Tensors have the names of published checkpoints of that kind of model: transformers' own conversion,
which knows them, is reversed, tensor by tensor where it can be, else block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.folder import TensorSpec, tied_copies
from ..errors import UsageError, plain_errors
from ..model.experts import Layout, layout_of, make_stack
from ..model.layout import decoder_blocks, split_expert_name
from ..model.recognise import is_conv1d
from ..source.stored import Stored
from ..source.weights import Files, Weights
from .folder import Piece, write_folder
from .packed import Carrier, PackedModel


@dataclass(frozen=True)
class _Plain:
    """A tensor of the plain model: its dtype and shape, and what makes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def without_storage(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def write(folder: Path, carrier: Carrier) -> None:
    """Fill an existing, empty folder. Raises UsageError for values that the dtype cannot hold."""
    model, found = carrier.model, plain_tensors(carrier)
    pieces = [p for names in _units(model, found) for p in _pieces(model, found, names)]
    carried = [_carried(carrier, one) for one in model.carried_plain()]
    write_folder(folder, carrier, [*pieces, *carried], None)
    weights = Weights(model.shapes, Files(sorted(folder.glob("*.safetensors"))), None, model.dtype)
    if missing := sorted(set(weights.missing()) - tied_copies(model.shapes)):
        raise UsageError(f"transformers has no way back to a plain {missing[0]} ({model.path})")


def nbytes(carrier: Carrier) -> int:
    """Of all values that `write` writes. Raises UsageError for what cannot be made plain."""
    plain = (one.without_storage.nbytes for one in plain_tensors(carrier).values())
    carried = (_carried(carrier, one).specs[0] for one in carrier.model.carried_plain())
    return sum(plain) + sum(spec.nbytes for spec in carried)


def _carried(carrier: Carrier, one: Stored) -> Piece:
    dtype = one.dtype if one.is_plain else carrier.dtype
    spec = TensorSpec(one.name, dtype, one.shape)
    return Piece([spec], lambda: {one.name: one.plain(carrier.model.stock.files.read).to(dtype)})


def plain_tensors(carrier: Carrier) -> dict[str, _Plain]:
    """The model's own names -> its tensors, none of which is packed; no tied copies."""
    model = carrier.model
    experts = {split_expert_name(n)[0] for n in model.recipes if model.linears[n].is_expert}
    found: dict[str, _Plain] = {}
    for name, like in model.shapes.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if name in tied_copies(model.shapes):
            continue
        if module in experts and leaf in _layout(model, module).stacks:
            found[name] = _stack(carrier, module, leaf)
        elif leaf == "weight" and module in model.recipes:
            make = partial(_linear, carrier, module)
            found[name] = _Plain(carrier.dtype, tuple(like.shape), make)
        else:
            dtype = carrier.kept(model.specs[name].dtype)
            found[name] = _Plain(dtype, tuple(like.shape), partial(carrier.plain, name))
    return found


def _linear(carrier: Carrier, name: str) -> Tensor:
    weight = carrier.dequantized(name)
    return weight.T if is_conv1d(carrier.model.shapes.get_submodule(name)) else weight


def _layout(model: PackedModel, module: str) -> Layout:
    layout = layout_of(model.shapes.get_submodule(module))
    assert layout is not None
    return layout


def _stack(carrier: Carrier, module: str, leaf: str) -> _Plain:
    """A 3-D parameter, or the biases that go with one, of experts that are linears in the files."""
    model, layout = carrier.model, _layout(carrier.model, module)
    shape = tuple(model.shapes.get_submodule(module).get_parameter(leaf).shape)
    projections = [p for p in layout.projections if layout.stack(p) == leaf.removesuffix("_bias")]
    suffix = ".bias" if leaf.endswith("_bias") else ".weight_plain"

    def stored(expert: int, projection: str) -> str | None:
        name = f"{module}.{expert}.{projection}{suffix}"
        return name if name in model.specs else None

    def value(expert: int, projection: str) -> Tensor:
        plain = stored(expert, projection)
        if plain is not None:
            return carrier.plain(plain, dtype)
        return carrier.dequantized(f"{module}.{expert}.{projection}", dtype)

    names = {stored(expert, p) for expert in range(shape[0]) for p in projections}
    kinds = {carrier.dtype if n is None else carrier.kept(model.specs[n].dtype) for n in names}
    dtype = reduce(torch.promote_types, kinds)
    return _Plain(
        dtype, shape, lambda: make_stack(layout, leaf, torch.empty(shape, dtype=dtype), value)
    )


def _units(model: PackedModel, found: Mapping[str, _Plain]) -> list[list[str]]:
    """Names that transformers may convert together: those of a decoder block, and all others."""
    prefix, blocks = decoder_blocks(model.shapes)
    units: list[list[str]] = [[] for _ in range(len(blocks) + 1)]
    for name in found:
        number = name.removeprefix(f"{prefix}.").partition(".")[0]
        inside = name.startswith(f"{prefix}.") and number.isdigit()
        units[int(number) if inside else -1].append(name)
    return [units[-1], *units[:-1]]


def _pieces(model: PackedModel, found: Mapping[str, _Plain], names: Iterable[str]) -> list[Piece]:
    """Tensors of a unit under published names, one by one where that gives the same."""
    shapes = {name: found[name].without_storage for name in names}
    together = _published(model, shapes)
    alone: list[dict[str, Tensor]] = []
    with suppress(UsageError), plain_errors("a conversion needs what is not there"):
        alone = [_published(model, {name: shape}) for name, shape in shapes.items()]
    if [*sorted(n for made in alone for n in made)] == sorted(together) and all(
        _same(value, together[n]) for made in alone for n, value in made.items()
    ):
        return [
            _piece(model, found, [name], made) for name, made in zip(shapes, alone, strict=True)
        ]
    return [_piece(model, found, list(shapes), together)]


def _piece(
    model: PackedModel, found: Mapping[str, _Plain], names: list[str], made: Mapping[str, Tensor]
) -> Piece:
    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in made.items()]
    return Piece(specs, lambda: _published(model, {name: found[name].make() for name in names}))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape


def _published(model: PackedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers would save for these tensors of the model."""
    from transformers.core_model_loading import revert_weight_conversion

    shapes: Any = model.shapes
    made: dict[str, Tensor] = revert_weight_conversion(shapes, tensors)
    return made
