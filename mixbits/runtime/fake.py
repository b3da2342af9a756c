"""Linears that only pretend to be packed: rounded weights and inputs, kept in float.

This is the definition of a quantized model: the packed one equals it up to the order of
summation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..formats.arrange import arrangement_of
from ..formats.schemes import Assignment, Recipe
from ..rounding.nearest import fake_input, fake_weight, rounds_activations
from .swap import swap_linears


class FakeLinear(nn.Module):
    """y = Qa(x') Q(W')^T + bias in x's dtype, from a float copy of Q(W') [N, K].

    x may be float64 too: sums are then exact for comparisons, rounding is still that of float32.
    A weight that `is_rounded` already, its columns as x has them, is arranged and kept as it is.
    """

    def __init__(
        self,
        weight: Tensor,
        recipe: Recipe,
        bias: Tensor | None = None,
        is_rounded: bool = False,
    ) -> None:
        super().__init__()
        self.recipe, self.bias = recipe, bias
        self.arrangement = arrangement_of(recipe, weight.device)
        if is_rounded:
            weight = self.arrangement.weight(weight)
        elif recipe.packed:
            weight = fake_weight(weight, recipe)
        self.weight_fake = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rounded = fake_input(x, self.recipe, self.arrangement)
        y = torch.nn.functional.linear(rounded, self.weight_fake.to(rounded.dtype)).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def fake_quantize_model(model: nn.Module, recipes: Assignment) -> None:
    """Replace linears (name -> recipe) by `FakeLinear`: what the packed model must equal."""

    def make(name: str, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        return FakeLinear(weight, recipes[name], bias)

    swap_linears(model, [n for n, r in recipes.items() if r.packed], make)


def round_activations(model: nn.Module, recipes: Assignment) -> bool:
    """Let a plain model of rounded weights (`round_weights`) round activations as recipes say.

    Whether any linear does.
    """

    def make(name: str, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        return FakeLinear(weight, recipes[name], bias, is_rounded=True)

    names = [name for name, recipe in recipes.items() if rounds_activations(recipe)]
    swap_linears(model, names, make)
    return bool(names)
