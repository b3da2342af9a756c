"""A packed folder, read tensor by tensor, and its weights as a target wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.folder import TensorSpec
from ..checkpoint.stock import Stock, check_files, plain_dtype
from ..checkpoint.transformers_quantizer import read_config
from ..errors import UsageError
from ..formats.arrange import arrangement_of
from ..formats.pack import Packed, segment_prefixes
from ..formats.schemes import Assignment, Format, Recipe
from ..model.experts import STANDARD, expert_slice, layout_of
from ..model.families import Family, family_of
from ..model.layout import CausalLM, LinearInfo, find_linears, split_expert_name
from ..model.recognise import is_router_name
from ..rounding.nearest import pack_weight, packed_values
from ..source.layouts import stored_tensors
from ..source.source import find_folder, open_source
from ..source.stored import Stored
from .targets import Fit


@dataclass(frozen=True)
class PackedModel:
    """What a packed folder says of itself; tensors are read when they are asked for."""

    path: Path
    shapes: CausalLM  # without storage
    linears: Mapping[str, LinearInfo]
    recipes: Assignment
    specs: Mapping[str, TensorSpec]
    stock: Stock
    carried: Sequence[str] = ()  # tensors that the model's class does not take, as they came

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None) -> PackedModel:
        """A folder, or a name on the hub. Raises UsageError if it is none of ours, or not whole."""
        folder = find_folder(str(model), revision=revision)
        config = read_config(folder)
        recipes, source = config.recipes(), open_source(str(folder), quantized=True)
        shapes = source.shapes
        stock = check_files(shapes, recipes, source.weight_files(), config.to_dict())
        linears = find_linears(shapes, include_head=True, by_use=False)
        infos = {info.name: info for info in linears}
        carried = list(getattr(config, "carried", None) or ())
        specs = {s.name: s for s in stock.specs if not s.as_stored or s.name in set(carried)}
        left = stock.left.groups if stock.left else {}  # plain again, as for any other engine
        for name in left:
            shape = tuple(shapes.state_dict()[name].shape)
            specs[name] = TensorSpec(name, plain_dtype(folder), shape)
        return cls(folder, shapes, infos, recipes, specs, stock, carried)

    @property
    def family(self) -> Family:
        return family_of(self.shapes.config)

    @property
    def dtype(self) -> torch.dtype:
        """The model's own; single tensors may be stored in another."""
        return plain_dtype(self.path)

    @property
    def plain(self) -> dict[str, TensorSpec]:
        """The tensors that are not packed, by name; none that are carried, none of experts that may
        be taken apart.
        """
        others = {self._stack(name) for names in self.experts.values() for name in names}
        others |= set(self.carried)
        specs = (s for s in self.specs.values() if s.linear is None and s.name not in others)
        return {spec.name: spec for spec in specs}

    def carried_plain(self) -> list[Stored]:
        """What is carried, as plain tensors. Raises UsageError where nothing says how to get them.

        Only from config.json is known how the source has quantized some of it.
        """
        said: Any = getattr(read_config(self.path), "stored", None) or {}
        headers = {name: self.stock.files.headers[name] for name in self.carried}
        return stored_tensors(headers, said.get("quantization_config") if headers else None)

    @property
    def carried_specs(self) -> list[TensorSpec]:
        """What is carried, as it is stored (`tensor` maps the file, and reads nothing)."""
        tensors = ((name, self.tensor(name)) for name in self.carried)
        return [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors]

    @property
    def carried_modules(self) -> list[str]:
        """The modules of carried weights: no loader may take them for quantized."""
        weights = (spec.name for spec in self.carried_specs if len(spec.shape) > 1)
        return list(dict.fromkeys(name.rpartition(".")[0] for name in weights))

    @property
    def experts(self) -> dict[str, list[str]]:
        """Experts module -> its linears, packed and not.

        None of those that are left alone in another layout than usual: nobody takes them apart.
        """
        found: dict[str, list[str]] = {}
        for info in self.linears.values():
            if info.is_expert:
                found.setdefault(split_expert_name(info.name)[0], []).append(info.name)
        return {
            module: members
            for module, members in found.items()
            if layout_of(self.shapes.get_submodule(module)) == STANDARD
            or any(name in self.recipes for name in members)
        }

    def stored_name(self, name: str) -> str:
        """What checkpoints, which other loaders read, call what transformers calls `name`."""
        return self.family.stored_name(name)

    def unpacked_linears(self) -> list[str]:
        """Every `nn.Linear`, router and expert's linear that is left alone, the head among them."""
        modules = dict(self.shapes.named_modules())
        family = self.family
        names = [
            n for n, m in modules.items() if isinstance(m, nn.Linear) or _is_router(n, m, family)
        ]
        names += [name for members in self.experts.values() for name in members]
        return [name for name in names if name not in self.recipes]

    def tensor(self, name: str) -> Tensor:
        left = self.stock.left
        if left is not None and name in left.groups:
            return left.tensor(name)
        return self.stock.files.read(name)

    def packed(self, name: str) -> list[Packed]:
        """The parts of a linear: one, or those of its segments."""
        prefixes = segment_prefixes(self.recipes[name])
        stored = [[(f, f"{name}.{p}{f}") for f in Packed._fields] for p in prefixes]
        return [Packed(**{f: self.tensor(t) for f, t in s if t in self.specs}) for s in stored]

    def weight(self, name: str) -> Tensor:
        """The float32 [N, K] that a linear stands for, its columns as they come."""
        if name not in self.recipes:
            return self.left_alone(name).float()
        recipe, columns = self._ordered(name), self.linears[name].in_features
        return arrangement_of(recipe).restore(packed_values(self.packed(name), recipe, columns))

    def left_alone_in(self, name: str) -> str:
        """The stored tensor that has an expert's linear that is not packed: its own, or a stack."""
        if f"{name}.weight_plain" in self.specs:
            return f"{name}.weight_plain"
        return self._stack(name)

    def _stack(self, name: str) -> str:
        """The 3-D parameter that an expert's linear is a slice of."""
        module, _, projection = split_expert_name(name)
        layout = layout_of(self.shapes.get_submodule(module))
        assert layout is not None
        return f"{module}.{layout.stack(projection)}"

    def left_alone(self, name: str) -> Tensor:
        """The [N, K] of an expert's linear that is not packed, as it is stored."""
        stored = self.left_alone_in(name)
        if stored.endswith(".weight_plain"):
            return self.tensor(stored)
        module, expert, projection = split_expert_name(name)
        stacked = SimpleNamespace(**{stored.rpartition(".")[2]: self.tensor(stored)})
        layout = layout_of(self.shapes.get_submodule(module))
        return expert_slice(stacked, expert, projection, layout)

    def _ordered(self, name: str) -> Recipe:
        recipe = self.recipes[name]
        if recipe.order is None:
            return recipe
        order = self.tensor(f"{name}.order")
        return replace(recipe, order=tuple(order.tolist()))


def _is_router(name: str, module: nn.Module, family: Family) -> bool:
    weight = module._parameters.get("weight")
    return is_router_name(name, family) and weight is not None and weight.dim() == 2


def relative_error(weight: Tensor, other: Tensor) -> float:
    """||W - W'|| / ||W||, in float64; 0 for weights of zeros that stay so."""
    gap = (weight.double() - other.double()).norm()
    return float(gap / weight.double().norm().clamp(min=torch.finfo(torch.float64).tiny))


@dataclass
class Carrier:
    """Takes weights to a target, and keeps account of what is lost on the way.

    `losses` has the relative error of every weight that is not the same afterwards, or that was
    rounded again. Where weights may not be rounded (not `lossy`), that is a UsageError.
    """

    model: PackedModel
    fits: Mapping[str, Fit]
    dtype: torch.dtype  # of what is not packed, and was in the model's own
    lossy: bool
    losses: dict[str, float] = field(default_factory=dict)

    def packed(self, name: str) -> Packed:
        """Codes and scales of a linear in its fit's format."""
        recipe, scheme = self.model.recipes[name], self.fits[name].scheme
        if recipe.scheme is not None and recipe.scheme.weight == scheme.weight:
            return self.model.packed(name)[0]
        weight = self.model.weight(name)
        packed = pack_weight(name, weight, scheme)
        again = packed_values([packed], Recipe.plain(scheme), weight.shape[1])
        self.losses[name] = relative_error(weight, again)
        return packed

    def kept(self, stored: torch.dtype) -> torch.dtype:
        """What a tensor that is not packed is written in: its own, unless that is the model's."""
        return self.dtype if stored == self.model.dtype else stored

    def unpacked_dtype(self, name: str) -> torch.dtype:
        """Of `unpacked`."""
        if name in self.fits:
            return self.dtype
        return self.kept(self.model.specs[self.model.left_alone_in(name)].dtype)

    def unpacked(self, name: str) -> Tensor:
        """A linear that is not packed there, or an expert's that never was, [N, K]."""
        if name not in self.fits:
            return self._cast(name, self.model.left_alone(name), self.unpacked_dtype(name))
        weight = self.model.weight(name)
        self.losses[name] = relative_error(weight, weight.to(self.dtype))
        return weight.to(self.dtype)

    def dequantized(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A packed linear's [N, K], columns as they come, in `dtype` or the carrier's own."""
        return self._cast(name, self.model.weight(name), dtype or self.dtype)

    def round_scales(self, name: str, packed: Packed, fmt: Format) -> Packed:
        """Float16 scales as `dtype`; others are left alone."""
        if fmt.scale != "float16" or self.dtype == torch.float16:
            return packed
        rounded = packed.weight_scale.to(self.dtype)
        if not torch.equal(rounded.float(), packed.weight_scale.float()):
            if not self.lossy:
                raise UsageError(
                    f"scales are float16, and would be rounded to the model's own dtype ({name}): "
                    "pass --dtype float16, or --lossy"
                )
            recipe = Recipe.plain(self.fits[name].scheme)
            columns = self.model.linears[name].in_features
            same = packed._replace(weight_scale=rounded.to(torch.float16))
            values = (packed_values([p], recipe, columns) for p in (packed, same))
            # What was rounded to another format has lost something before.
            self.losses[name] = self.losses.get(name, 0.0) + relative_error(*values)
        return packed._replace(weight_scale=rounded)

    def plain(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor that is not packed, in `dtype`, or as it is `kept`.

        Raises UsageError for values that are too large for it.
        """
        value = self.model.tensor(name)
        return self._cast(name, value, dtype or self.kept(value.dtype))

    def _cast(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        cast = value.to(dtype)
        if dtype != value.dtype and not torch.equal(cast.double(), value.double()):
            kind, error = str(dtype).removeprefix("torch."), relative_error(value, cast)
            if not torch.isfinite(cast).all():
                raise UsageError(f"{name} is too large for {kind}")
            if error > torch.finfo(dtype).eps and not self.lossy:
                raise UsageError(
                    f"{name} is too small for {kind}: pass --lossy, or another --dtype"
                )
            self.losses[name] = error
        return cast
