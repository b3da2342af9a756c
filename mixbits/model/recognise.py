"""What the parts of a decoder block are: told by what they do and where they stand.

A *plain linear* computes what nn.Linear computes and has nothing beside weight and bias. A *router*
decides where tokens go. An order of columns *folds* into the rows before it where that leaves a
module's output as it is. Names are a sign among others: of routers, and of what may fold.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from .families import DEFAULT, Family
from .twin import plain_numbers, random_copy, same, signature, small_sizes

_EXPERT_COUNT = re.compile(r"(moe_)?(n|num)_(routed_|local_)?experts")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SCALES = (1.0, 100.0)  # of inputs
_TOLERANCE = 1e-4  # float32 sums in another order
# What was found of modules of a signature.
_PRODUCTS: dict[Any, tuple[Any, bool]] = {}
_FOLDS: dict[Any, tuple[Any, bool]] = {}


# --- linears ---------------------------------------------------------------------------------


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's `Conv1D`, whose name is all that an optional import needs."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_weight(module: nn.Module) -> Tensor | None:
    """The [N, K] weight of a linear, of which `Conv1D` holds the transpose; None for the others."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return cast("Tensor", weight)
    return cast("Tensor", weight.T) if is_conv1d(module) else None


def why_not_plain(module: nn.Module) -> str | None:
    """What makes an nn.Linear or Conv1D more than that; None for a plain one."""
    held = {name for name, value in module._parameters.items() if value is not None}
    if not {"weight"} <= held <= {"weight", "bias"} or module._buffers or module._modules:
        return "they hold more than a weight and a bias"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "they have hooks"
    kind: Any = type(module)
    is_own = "forward" in module.__dict__ or kind.__call__ is not nn.Module.__call__
    if is_own or (kind.forward is not nn.Linear.forward and not _computes_a_product(module)):
        return "they compute something else than nn.Linear"
    return None


def _computes_a_product(module: nn.Module) -> bool:
    """Whether code of its own, with weight and bias alone, gives what nn.Linear gives."""
    key = signature(module)
    if key not in _PRODUCTS:
        _PRODUCTS[key] = [_settings(module)], _try_product(module)
    return _PRODUCTS[key][1]


@plain_numbers()
def _try_product(module: nn.Module) -> bool:
    with suppress(Exception):  # foreign code raises whatever it likes
        rows, columns = cast("Tensor", linear_weight(module)).shape
        twin = random_copy(module, small_sizes(rows, columns))
        weight = cast("Tensor", linear_weight(twin))
        x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(1))
        wanted = [nn.functional.linear(x * scale, weight, twin.bias) for scale in _SCALES]
        found = [twin(x * scale) for scale in _SCALES]
        is_narrow = twin.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        return is_narrow and same(found, wanted, _TOLERANCE)
    return False


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a signature knows by its address, to be kept as long as that."""
    return {k: v for k, v in module.__dict__.items() if not k.startswith("_")}


def shared_parameters(model: Any) -> set[str]:
    """Names of parameters that several modules hold, or that transformers will tie to another."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    several = {name for names in owners.values() if len(names) > 1 for name in names}
    return several | set(tied) | set(tied.values())


# --- experts and routers ---------------------------------------------------------------------


def expert_lists(block: nn.Module, prefix: str) -> list[str]:
    """Lists of modules that are alike and hold linears: each may see a part of the tokens only."""
    found = []
    for name, module in block.named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1:
            children = list(module.children())
            shapes = {
                (type(child), *((n, *p.shape) for n, p in child.named_parameters()))
                for child in children
            }
            inner = (m for child in children for m in child.modules())
            if len(shapes) == 1 and any(isinstance(m, nn.Linear) for m in inner):
                found.append(name)
    return found


def holds_stacks(module: nn.Module) -> bool:
    """Whether a module's own parameters are matrices of several experts, known or not."""
    is_convolution = "conv" in type(module).__name__.lower()
    return not is_convolution and any(p is not None and p.dim() == 3 for p in _own(module))


def _own(module: nn.Module) -> list[Any]:
    return list(module._parameters.values())


def expert_counts(config: Any) -> set[int]:
    """How many experts a configuration speaks of, in whatever words."""
    found: set[int] = set()
    for key, value in config.to_dict().items():
        if _EXPERT_COUNT.fullmatch(key):
            values = value if isinstance(value, list | tuple) else [value]
            found |= {v for v in values if type(v) is int and v > 1}
    return found


def is_router_name(name: str, family: Family = DEFAULT) -> bool:
    """Whether a module of this name, or what holds it, is called a router."""
    parts = name.split(".")
    return parts[-1] in family.gates or _is_routing(parts, family)


def _is_routing(parts: Sequence[str], family: Family) -> bool:
    return any(re.fullmatch(family.routers, part) for part in parts)


class Routers:
    """Tells the routers among a block's linears.

    counts   how many experts there may be
    scoring  linears whose outputs an index is made of, and `selecting`, whose outputs do nothing
             else (`mixbits.model.usage`)
    family   says what routers are called
    """

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        counts: Collection[int],
        scoring: Collection[str],
        selecting: Collection[str],
        family: Family = DEFAULT,
    ) -> None:
        self.prefix, self.counts, self.family = prefix, set(counts), family
        self.scoring, self.selecting = scoring, selecting
        self.modules = dict(block.named_modules(prefix=prefix))
        self.holders = set(expert_lists(block, prefix))
        self.holders |= {name for name, m in self.modules.items() if holds_stacks(m)}
        for name in self.holders:
            held: Any = self.modules[name]
            stacks = [p for p in _own(held) if p is not None and p.dim() == 3]
            self.counts |= {stacks[0].shape[0] if stacks else len(held)}

    def __contains__(self, name: str) -> bool:
        rows, columns = self._shape(name)
        return (
            name in self.selecting
            or (name in self.scoring and rows <= columns // 2)
            or self._is_called_so(name, rows, columns)
            or (
                (rows in self.counts or rows == 1)
                and self._is_beside_experts(name)
                and not self._is_of_an_mlp(name)
            )
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        weight = linear_weight(self.modules[name])
        return () if weight is None else tuple(weight.shape)

    def _is_called_so(self, name: str, rows: int, columns: int) -> bool:
        parts = name.removeprefix(f"{self.prefix}.").split(".")
        if _is_routing(parts, self.family):
            return True
        is_narrow = rows in self.counts or rows <= columns // 2
        return (
            not self.family.gates.isdisjoint(parts) and is_narrow and not self._is_of_an_mlp(name)
        )

    def _is_of_an_mlp(self, name: str) -> bool:
        """Whether a linear beside it reads as many columns as it has rows, as a down does.

        Or has its shape, as gate and up have; but two routers may have that as well.
        """
        parent, _, leaf = name.rpartition(".")
        mine = self._shape(name)
        others = [child for child, _ in self.modules[parent].named_children() if child != leaf]
        shapes = [self._shape(f"{parent}.{other}") for other in others]
        is_read = any(shape[1:] == mine[:1] for shape in shapes)
        return is_read or (mine in shapes and mine[0] not in self.counts)

    def _is_beside_experts(self, name: str) -> bool:
        """Whether a module that holds the linear, not the whole block, holds experts as well."""
        if any(name.startswith(f"{holder}.") for holder in self.holders):
            return False
        parent = name.rpartition(".")[0]
        nearest = parent
        while nearest != self.prefix:
            if any(holder.startswith(f"{nearest}.") for holder in self.holders):
                return True
            nearest = nearest.rpartition(".")[0]
        beside = {holder for holder in self.holders if holder.rpartition(".")[0] == self.prefix}
        return parent == self.prefix and bool(beside)


# --- orders of columns -----------------------------------------------------------------------


def folds(parent: nn.Module, reader: str, makers: Sequence[str]) -> bool:
    """Whether the columns of `parent`'s reader may be put in any order with the makers' rows.

    That is tried: the module's own code must give the same output. Modules that are alike are
    tried once.
    """
    key = (reader, *makers, signature(parent))
    if key not in _FOLDS:
        found = _try_to_fold(parent, reader, makers)
        _FOLDS[key] = list(map(_settings, parent.modules())), found
    return _FOLDS[key][1]


@plain_numbers()
def _try_to_fold(parent: Any, reader: str, makers: Sequence[str]) -> bool:
    shape, *makes = (getattr(parent, name).weight.shape for name in (reader, *makers))
    if any(rows != shape[1] for rows, _ in makes):
        return False
    small = small_sizes(*{size for sides in (shape, *makes) for size in sides})
    for sizes in (small, {})[not small :]:  # settings may hold sizes that are not seen
        with suppress(Exception):  # foreign code raises whatever it likes
            return _is_unmoved(random_copy(parent, sizes), reader, makers)
    return False


def _is_unmoved(twin: Any, reader: str, makers: Sequence[str]) -> bool:
    generator = torch.Generator().manual_seed(1)
    last, linears = getattr(twin, reader), [getattr(twin, name) for name in makers]
    x = torch.randn(1, 5, linears[0].weight.shape[1], generator=generator)
    before = [twin(x * scale) for scale in _SCALES]
    order = torch.randperm(last.weight.shape[1], generator=generator)
    for linear in linears:
        linear.weight.data = linear.weight.data[order]
        if linear.bias is not None:
            linear.bias.data = linear.bias.data[order]
    last.weight.data = last.weight.data[:, order]
    return all(
        same(twin(x * scale), y, _TOLERANCE) for scale, y in zip(_SCALES, before, strict=True)
    )
