"""Put other linears in the place of a model's own: `nn.Linear`s, and those of experts.

Experts mostly are slices of 3-D weights: they become modules of their own (`Experts`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.experts import ExpertsLoop, expert_bias, expert_slice, is_experts, layout_of, loop_of
from ..model.layout import expert_parent, linear_weight


class PlainLinear(nn.Module):
    """y = x W^T + bias: an expert that was left alone among packed ones.

    Its parameter is not called `weight`, or transformers would fold it into a 3-D parameter.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        # A copy: a view would keep the weights of all experts.
        copied = weight.detach().clone(memory_format=torch.contiguous_format)
        self.weight_plain = nn.Parameter(copied, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight_plain.to(x.dtype), bias)


class Experts(nn.Module):
    """Experts as modules of their own, named `<expert>.<projection>`, in place of 3-D weights."""

    def __init__(self, loop: ExpertsLoop, linears: dict[str, nn.Module]) -> None:
        super().__init__()
        self.loop = loop
        for name, linear in linears.items():
            expert, projection = name.split(".")
            if expert not in self._modules:
                self.add_module(expert, nn.Module())
            self.get_submodule(expert).add_module(projection, linear)

    @property
    def num_experts(self) -> int:
        return self.loop.num_experts

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of the module whose place it takes: hidden [T, H], and mostly where tokens go."""

        def linear(expert: int, projection: str, x: Tensor) -> Tensor:
            out: Tensor = self.get_submodule(f"{expert}.{projection}")(x)
            return out

        return self.loop(linear, *args, **kwargs)


# (linear's name, weight [N, K], bias) -> the module that takes its place
MakeLinear = Callable[[str, Tensor, "nn.Parameter | None"], nn.Module]


def swap_linears(model: nn.Module, names: list[str], make: MakeLinear) -> None:
    """Replace the linears called `names` in place; experts modules become `Experts`.

    Names of experts' linears may be some of a module's; the others become `PlainLinear`.
    """
    experts: dict[str, set[str]] = {}
    for name in names:
        parent = expert_parent(name)
        if parent is not None and is_experts(model.get_submodule(parent)):
            experts.setdefault(parent, set()).add(name)
            continue
        linear: Any = model.get_submodule(name)
        weight = linear_weight(linear)
        assert weight is not None
        model.set_submodule(name, make(name, weight, linear.bias))
    for parent, chosen in experts.items():
        model.set_submodule(parent, _as_modules(model.get_submodule(parent), parent, chosen, make))


def _as_modules(module: Any, parent: str, chosen: set[str], make: MakeLinear) -> Experts:
    linears: dict[str, nn.Module] = {}
    loop, layout = loop_of(module, keep=True), layout_of(module)
    assert layout is not None
    for expert in range(loop.num_experts):
        for projection in layout.projections:
            weight, bias = (f(module, expert, projection) for f in (expert_slice, expert_bias))
            assert weight is not None
            own = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
            name = f"{parent}.{expert}.{projection}"
            linear = make(name, weight, own) if name in chosen else PlainLinear(weight, own)
            linears[f"{expert}.{projection}"] = linear
    return Experts(loop, linears)
