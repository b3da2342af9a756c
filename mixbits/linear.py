"""Linears that hold packed weights, linears that only pretend to, and experts made of either.

`PackedLinear` keeps codes and scales and calls the kernels. `FakeLinear` keeps the rounded
weight in float and rounds its input in float: the definition that the packed one must equal up
to the order of summation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .experts import run_experts
from .formats import Scheme, UsageError
from .model import (
    EXPERT_PROJECTIONS,
    FUSED_GROUPS,
    LinearInfo,
    expert_slice,
    is_experts,
    split_expert_name,
)
from .pack import Packed, packed_spec


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise UsageError that names the tensor if it holds a NaN or an infinity."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise UsageError(
            f"weights must be finite: got {bad} NaN or infinite values of {tensor.numel()} ({name})"
        )


def pack_weight(name: str, weight: Tensor, scheme: Scheme) -> Packed:
    """Quantize and pack a weight [N, K] of any float dtype.

    Raises UsageError that names the tensor if it is not finite, or too large for its scales.
    """
    assert scheme.weight is not None
    check_finite(name, weight)
    packed = ops.quantize_pack(weight, scheme.weight)
    if not scheme.weight.is_mx and not torch.isfinite(packed.weight_scale).all():
        raise UsageError(
            f"{scheme.name} needs group scales within float16: got weights up to "
            f"{weight.abs().max().item():.4g} ({name})"
        )
    return packed


class PackedLinear(nn.Module):
    """y = x Q(W)^T + bias from packed weights; x [..., K] -> y [..., N] in x's dtype.

    Buffers as in `mixbits.pack`, empty until a checkpoint or `PackedLinear.from_weight` fills
    them. `backend` forces one of `mixbits.ops.backends()`; `int8_activations` is explained at
    `mixbits.ops.packed_matmul`.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    # How often anything has been set on any packed linear: who remembers addresses and settings
    # of all those of a model sees in one look that they still hold.
    changes = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if scheme.weight is None:
            raise ValueError(f"{scheme.name} does not pack weights")
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.backend: str | None = None
        self.int8_activations = False
        self.siblings: SharedInput | None = None
        self.register_buffer("weight_zero_point", None)
        for name, (dtype, shape) in packed_spec(scheme.weight, out_features, in_features).items():
            self._buffers[name] = torch.empty(shape, dtype=dtype, device=device)
        self.bias = bias

    @classmethod
    def from_weight(
        cls, weight: Tensor, scheme: Scheme, bias: nn.Parameter | None = None, name: str = "weight"
    ) -> PackedLinear:
        """Pack `weight` [N, K]."""
        linear = cls(weight.shape[1], weight.shape[0], scheme, bias)
        for buffer, value in pack_weight(name, weight, scheme)._asdict().items():
            if value is not None:
                setattr(linear, buffer, value)
        return linear

    @property
    def operand(self) -> ops.Operand:
        assert self.scheme.weight is not None
        packed = Packed(self.weight_packed, self.weight_scale, self.weight_zero_point)
        return ops.Operand(packed, self.scheme.weight, self.scheme.activation)

    def forward(self, x: Tensor) -> Tensor:
        y = None if self.siblings is None else self.siblings.product(self, x)
        if y is None:
            rows = x.reshape(-1, self.in_features)
            y = self.multiply(rows, [self.operand])[0].reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiply(self, x: Tensor, operands: list[ops.Operand]) -> list[Tensor]:
        """x [M, K] times weights of this linear's K, in the way this linear is told to."""
        return ops.packed_matmuls_unchecked(x, operands, self.backend, self.int8_activations)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        PackedLinear.changes += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # `.to(bfloat16)` must not round float16 scales: they travel as integers.
        is_float = self.weight_scale.is_floating_point()
        if is_float:
            self.weight_scale = self.weight_scale.view(torch.int16)
        super()._apply(fn, recurse)
        if is_float:
            self.weight_scale = self.weight_scale.view(torch.float16)
        PackedLinear.changes += 1
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.name}"
        )


class SharedInput:
    """Packed linears that a module calls one after the other with the same tensor.

    The first call multiplies x with the weights of all, so that x is prepared and the threads
    are woken once; the others find their products waiting. Products are kept per thread, for the
    very tensor object that they belong to, until each is taken. A module that does not call all
    of its linears with one tensor makes that a waste: after some such calls it is given up.
    """

    def __init__(self, linears: list[PackedLinear]) -> None:
        self.linears = linears
        self.misses_left = 3
        self._waiting: dict[int, tuple[Tensor, dict[PackedLinear, Tensor]]] = {}

    def product(self, linear: PackedLinear, x: Tensor) -> Tensor | None:
        """x times the weight of `linear`, without its bias; None to leave it to the linear."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or self.misses_left == 0:
            return None
        thread = threading.get_ident()
        owner, products = self._waiting.pop(thread, (None, {}))
        if owner is not x or linear not in products:
            self.misses_left -= bool(products)
            rows = x.reshape(-1, linear.in_features)
            outs = linear.multiply(rows, [other.operand for other in self.linears])
            shaped = [out.view(*x.shape[:-1], out.shape[1]) for out in outs]
            products = dict(zip(self.linears, shaped, strict=True))
        y = products.pop(linear)
        if products:
            self._waiting[thread] = (x, products)
        return y


def share_inputs(model: nn.Module) -> None:
    """Let q/k/v, and gate/up, of every module be multiplied in one call where both are packed."""
    for module in model.modules():
        for names in FUSED_GROUPS:
            linears = [getattr(module, name, None) for name in names]
            group = [linear for linear in linears if isinstance(linear, PackedLinear)]
            if len(group) > 1 and len({linear.in_features for linear in group}) == 1:
                shared = SharedInput(group)
                for linear in group:
                    linear.siblings = shared


class PlainLinear(nn.Module):
    """y = x W^T: an expert that was left alone among packed ones.

    Its parameter is not called `weight`, or transformers would fold it into a 3-D parameter.
    """

    def __init__(self, in_features: int, out_features: int, like: Tensor) -> None:
        super().__init__()
        data = torch.empty(out_features, in_features, dtype=like.dtype, device=like.device)
        self.weight_plain = nn.Parameter(data, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight_plain.to(x.dtype))


class FakeLinear(nn.Module):
    """y = Qa(x) Q(W)^T + bias in x's dtype, from a float copy of Q(W) [N, K].

    x may be float64 too: sums are then exact for comparisons, rounding is still that of float32.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, bias: Tensor | None = None) -> None:
        super().__init__()
        self.scheme, self.bias = scheme, bias
        rounded = ops.fake_quantize(weight.float(), scheme.weight) if scheme.weight else weight
        self.weight_fake = nn.Parameter(rounded, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme.activation is not None:
            narrow = x.float() if x.dtype == torch.float64 else x
            x = ops.fake_quantize(narrow, self.scheme.activation).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight_fake.to(x.dtype), bias)


class Experts(nn.Module):
    """Experts as modules of their own, named `<expert>.<projection>`, in place of 3-D weights."""

    def __init__(self, act_fn: Callable[[Tensor], Tensor], linears: dict[str, nn.Module]) -> None:
        super().__init__()
        self.act_fn = act_fn
        for name, linear in linears.items():
            expert, projection = name.split(".")
            if expert not in self._modules:
                self.add_module(expert, nn.Module())
            self.get_submodule(expert).add_module(projection, linear)
        self.num_experts = len(linears) // len(EXPERT_PROJECTIONS)

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        def linear(expert: int, projection: str, x: Tensor) -> Tensor:
            out: Tensor = self.get_submodule(f"{expert}.{projection}")(x)
            return out

        return run_experts(
            hidden, top_k_index, top_k_weights, self.act_fn, linear, self.num_experts
        )


# (linear's name, weight [N, K], bias) -> the module that takes its place
MakeLinear = Callable[[str, Tensor, "nn.Parameter | None"], nn.Module]


def swap_linears(model: nn.Module, names: list[str], make: MakeLinear) -> None:
    """Replace the linears called `names` in place; experts modules become `Experts`.

    Names of experts' linears may be some of a module's; the others become `PlainLinear`.
    """
    experts: dict[str, set[str]] = {}
    for name in names:
        parent = name.rsplit(".", 2)[0] if name.count(".") > 1 else name
        module = model.get_submodule(parent)
        if is_experts(module):
            experts.setdefault(parent, set()).add(name)
            continue
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, make(name, linear.weight, linear.bias))
    for parent, chosen in experts.items():
        model.set_submodule(parent, _as_modules(model.get_submodule(parent), parent, chosen, make))


def _as_modules(module: Any, parent: str, chosen: set[str], make: MakeLinear) -> Experts:
    linears: dict[str, nn.Module] = {}
    for expert in range(len(module.down_proj)):
        for projection in EXPERT_PROJECTIONS:
            weight = expert_slice(module, expert, projection)
            name = f"{parent}.{expert}.{projection}"
            if name in chosen:
                linears[f"{expert}.{projection}"] = make(name, weight, None)
                continue
            plain = PlainLinear(weight.shape[1], weight.shape[0], weight)
            if not weight.is_meta:
                plain.weight_plain.data.copy_(weight)
            linears[f"{expert}.{projection}"] = plain
    return Experts(module.act_fn, linears)


def fake_quantize_model(model: nn.Module, schemes: dict[str, Scheme]) -> None:
    """Replace linears (name -> scheme) by `FakeLinear`: what the packed model must equal."""

    def make(name: str, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        return FakeLinear(weight, schemes[name], bias)

    swap_linears(model, [n for n, s in schemes.items() if s.weight is not None], make)


def round_weights(model: nn.Module, linears: list[LinearInfo], schemes: dict[str, Scheme]) -> None:
    """Round the weights of `linears` in place, in the model's dtype; the model stays plain."""
    for info in linears:
        scheme = schemes[info.name]
        if scheme.weight is None:
            continue
        if info.is_expert:
            parent, expert, projection = split_expert_name(info.name)
            target = expert_slice(model.get_submodule(parent), expert, projection)
            check_finite(info.name, target)
            target.data.copy_(ops.fake_quantize(target, scheme.weight))
        else:
            module = model.get_submodule(info.name)
            assert isinstance(module, nn.Linear)
            check_finite(info.name, module.weight)
            # A new parameter, so that a tied embedding keeps its own values.
            rounded = ops.fake_quantize(module.weight, scheme.weight)
            module.weight = nn.Parameter(rounded, requires_grad=False)
