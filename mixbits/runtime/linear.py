"""Linears that hold packed weights, and experts made of them.

`PackedLinear` keeps codes and scales and calls the kernels; `MixedLinear` is made of several, each
for some of its columns.
What they must equal, up to the order of summation, is in `mixbits.runtime.fake`.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import gradients
from ..errors import UsageError
from ..formats import checks
from ..formats.arrange import Arrangement, check_order
from ..formats.pack import Mix, Operand, Packed, order_dtype, packed_spec
from ..formats.schemes import Mixed, Recipe, Scheme
from ..model.experts import ExpertsLoop, expert_bias, expert_slice, is_experts, layout_of, loop_of
from ..model.families import DEFAULT
from ..model.layout import expert_parent, linear_weight


def check_loaded(linear: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Raise UsageError unless a state dict's tensors are of the shapes and dtypes of the buffers.

    torch looks at shapes only, and casts: a code or a scale would become another.
    """
    for name, buffer in linear._buffers.items():
        value = state.get(prefix + name)
        if buffer is None or value is None or name in linear._non_persistent_buffers_set:
            continue
        wanted, got = ((tuple(t.shape), t.dtype) for t in (buffer, value))
        if wanted != got:
            raise UsageError(
                f"{prefix}{name} must have shape {wanted[0]} and be {wanted[1]}: got {got[0]} and "
                f"{got[1]}"
            )
        if name == "order" and not value.is_meta:
            check_order(checks.in_memory(name, value), len(value), prefix + name)


class _Watched(nn.Module):
    """Counts whatever is set on it in `PackedLinear.changes`; loads only what fits its buffers."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        PackedLinear.changes += 1

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        check_loaded(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *args)
        PackedLinear.changes += 1


class PackedLinear(_Watched):
    """y = x Q(W)^T + bias from packed weights; x [..., K] -> y [..., N] in x's dtype.

    Buffers as in `mixbits.formats.pack`, empty until a checkpoint or `PackedLinear.from_weight`
    fills them. `backend` forces one of `mixbits.ops.backends()`; `int8_activations` is explained at
    `mixbits.ops.packed_matmul`, and `row_scale`, which says that activations may be 8-bit floats,
    at `mixbits.ops.packed_matmul_fp8`.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    row_scale: Tensor | None
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
        # No buffers as long as they are None: accelerate moves buffers, and takes all for tensors.
        self.weight_zero_point = self.row_scale = None
        for name, (dtype, shape) in packed_spec(scheme.weight, out_features, in_features).items():
            vars(self).pop(name, None)
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self.bias = bias

    @classmethod
    def from_weight(
        cls, weight: Tensor, scheme: Scheme, bias: nn.Parameter | None = None, name: str = "weight"
    ) -> PackedLinear:
        """Pack `weight` [N, K]."""
        linear = cls(weight.shape[1], weight.shape[0], scheme, bias)
        from ..rounding.nearest import pack_weight  # what only loads needs none of it

        for buffer, value in pack_weight(name, weight, scheme)._asdict().items():
            if value is not None:
                setattr(linear, buffer, value)
        return linear

    @property
    def operand(self) -> Operand:
        assert self.scheme.weight is not None
        found = self._buffers.get  # at once, where torch would look in three places
        codes, scale, zero_point = map(found, Packed._fields)
        if codes is None or scale is None:
            codes, scale = self.weight_packed, self.weight_scale
        if zero_point is None:
            zero_point = self.weight_zero_point
        return Operand(Packed(codes, scale, zero_point), self.scheme.weight, self.scheme.activation)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self._buffers.values() if tensor is not None]

    def checked(self, device: torch.device) -> Operand:
        """`operand`, as kernels on `device` can have it.

        Buffers are anybody's to replace, to resize and to move: every call looks whether they are
        what they were. Raises ValueError or TypeError that says which is not as it must be.
        """
        operand = self.operand
        place = _place(device, operand.packed)
        if place is not None and place == self.__dict__.get("_place"):
            return operand
        found = checks.checked_operand(operand, self.in_features, device)
        if all(map(is_, found.packed, operand.packed)) and checks.keep_size(found.packed):
            self.__dict__["_place"] = place  # by this way it is no change
        return found

    @property
    def weight(self) -> Tensor:
        """float32 [N, K], made anew at every look: for models that look at their linears'."""
        assert self.scheme.weight is not None
        return ops.dequantize(self.operand.packed, self.scheme.weight, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.row_scale is None or torch.compiler.is_compiling():
            return _forward(self, x)
        packed, fmt, _ = self.operand
        rows = x.reshape(-1, self.in_features)
        y = ops.packed_matmul_fp8(rows, packed, fmt, self.row_scale, self.backend)
        return _add_bias(self, y.reshape(*x.shape[:-1], self.out_features))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # `.to(bfloat16)` must not round float16 scales: they travel as integers.
        is_float = self.weight_scale is not None and self.weight_scale.is_floating_point()
        if is_float:
            self.weight_scale = self.weight_scale.view(torch.int16)
        super()._apply(fn, recurse)
        if is_float:
            self.weight_scale = self.weight_scale.view(torch.float16)
        PackedLinear.changes += 1
        return self

    def extra_repr(self) -> str:
        mode = "" if self.row_scale is None else ", activations may be fp8"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self.scheme.name}{mode}"


class MixedLinear(_Watched):
    """y = x' Q(W')^T + bias from segments, each packed in a scheme of its own; x' and W' are x and
    W arranged (`mixbits.formats.arrange`).

    Buffers as in `mixbits.formats.pack`. `segments` are `PackedLinear`s, whose settings hold for
    the whole linear: all of them must have the same.
    """

    order: Tensor | None

    def __init__(
        self,
        out_features: int,
        recipe: Mixed,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.recipe = recipe.in_features, out_features, recipe
        self.columns = tuple(columns for _, columns in recipe.segments)
        self.siblings: SharedInput | None = None
        if recipe.order is None or recipe.folded:
            self.order = None  # no buffer: accelerate takes all for tensors
        else:
            dtype = order_dtype(self.in_features)
            self.register_buffer("order", torch.tensor(recipe.order, dtype=dtype, device=device))
        self.segments = nn.ModuleList(
            PackedLinear(columns, out_features, scheme, device=device)
            for scheme, columns in recipe.segments
        )
        self.bias = bias

    @property
    def parts(self) -> list[PackedLinear]:
        return cast("list[PackedLinear]", list(self.segments))

    @property
    def operand(self) -> Mix:
        operands = tuple(part.operand for part in self.parts)
        return Mix(operands, self.columns, self.order, self.recipe.rotated)

    def checked(self, device: torch.device) -> Mix:
        """As of `PackedLinear`. An order is gone through again when somebody has written to it."""
        mix, order = self.operand, self.order
        tensors = [order, *itertools.chain.from_iterable(one.packed for one in mix.operands)]
        version = None if order is None or order.is_inference() else order._version
        place = _place(device, tensors), version
        if place[0] is not None and place == self.__dict__.get("_place"):
            return mix
        found = checks.checked_mix(mix, self.in_features, device)
        kept = [found.order, *itertools.chain.from_iterable(one.packed for one in found.operands)]
        if all(map(is_, kept, tensors)) and checks.keep_size(kept):
            self.__dict__["_place"] = place
        return found

    @property
    def tensors(self) -> list[Tensor]:
        parts = [tensor for part in self.parts for tensor in part.tensors]
        return parts if self.order is None else [self.order, *parts]

    @property
    def weight(self) -> Tensor:
        """As of `PackedLinear`, its columns as x has them."""
        arranged = torch.cat([part.weight for part in self.parts], 1)
        order = None if self.order is None else self.order.long()
        return Arrangement(order, self.recipe.rotated).restore(arranged)

    @property
    def backend(self) -> str | None:
        return self.parts[0].backend

    @property
    def int8_activations(self) -> bool:
        return self.parts[0].int8_activations

    def forward(self, x: Tensor) -> Tensor:
        if self.parts[0].weight_packed.is_meta:
            return self._forward_offloaded(x)
        return _forward(self, x)

    def _forward_offloaded(self, x: Tensor) -> Tensor:
        """accelerate brings a module's weights when that is called, and segments never are."""
        hooks: list[Any] = [getattr(part, "_hf_hook", None) for part in self.parts]
        if None in hooks:
            raise UsageError(f"a packed linear must have its weights: they are meta ({self})")
        try:
            for part, hook in zip(self.parts, hooks, strict=True):
                hook.pre_forward(part)
            return _forward(self, x)
        finally:
            for part, hook in zip(self.parts, hooks, strict=True):
                hook.post_forward(part, None)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


AnyPacked: TypeAlias = PackedLinear | MixedLinear


def _place(device: torch.device, tensors: Iterable[Tensor | None]) -> object:
    """Where tensors lie in memory, and how much they take there; None if that has no answer.

    What has been checked, and `checks.keep_size`d, and lies where it lay, can be read as it was.
    """
    try:
        places = [
            None if x is None else (x.data_ptr(), x.nbytes, x.is_contiguous(), x.is_neg())
            for x in tensors
        ]
    except (AttributeError, NotImplementedError, RuntimeError):  # no tensor, or a strange one
        return None
    return PackedLinear.changes, device, places


def _forward(linear: AnyPacked, x: Tensor) -> Tensor:
    y = None if linear.siblings is None else linear.siblings.product(linear, x)
    if y is None:
        y = _products([linear], x)[0]
    return _add_bias(linear, y)


def _add_bias(linear: AnyPacked, y: Tensor) -> Tensor:
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


def _products(linears: Sequence[AnyPacked], x: Tensor) -> list[Tensor]:
    """x [..., K] times the weights of linears that see it, in the way the first is told to."""
    first, columns = linears[0], linears[0].in_features
    if not x.dim() or x.shape[-1] != columns:
        raise ValueError(f"x must have shape [..., {columns}]: got {tuple(x.shape)}")
    rows = x.reshape(-1, columns)
    if torch.compiler.is_compiling():
        operands = [linear.operand for linear in linears]
    else:
        operands = [linear.checked(x.device) for linear in linears]
    outs = ops.packed_matmuls_unchecked(rows, operands, first.backend, first.int8_activations)
    return outs if x.dim() == 2 else [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


def allow_fp8_activations(model: nn.Module) -> None:
    """Let activations of MXFP4A16 linears be 8-bit floats, where the weights' scales allow it.

    The others stay as they are: other schemes, linears of several segments, and those with a row
    whose block scales do not lie within 15 binades (`mixbits.formats.fp8_weights`). Weights must
    be there, and stay. Raises UsageError if no linear is left.
    """
    segments = {part for m in model.modules() if isinstance(m, MixedLinear) for part in m.parts}
    linears = [m for m in model.modules() if isinstance(m, PackedLinear) and m not in segments]
    chosen = [m for m in linears if m.operand.format.element == "e2m1" and not m.operand.activation]
    for one in chosen:
        packed, fmt, _ = one.operand
        row_scale = ops.fold_rows(packed, fmt, one.in_features)
        if row_scale is not None:
            del one.row_scale
            one.register_buffer("row_scale", row_scale, persistent=False)
    if all(one.row_scale is None for one in chosen):
        raise UsageError(
            f"fp8_activations needs MXFP4A16 linears with block scales within 15 binades per row: "
            f"got {len(chosen)} MXFP4A16 linears of {len(linears)} packed in one scheme"
        )


def packed_linear(weight: Tensor, recipe: Recipe, bias: nn.Parameter | None = None) -> AnyPacked:
    """An empty linear for what `recipe` makes of a weight like this one [N, K], on its device."""
    rows, columns = weight.shape
    if isinstance(recipe, Mixed):
        return MixedLinear(rows, recipe, bias, weight.device)
    return PackedLinear(columns, rows, recipe, bias, weight.device)


class _Waiting:
    """Products of one input that nobody has asked for yet; they go when the input does.

    What the input holds is compared byte by byte, so that it does not matter who has changed it,
    or through which of its views: a tensor knows its address and a version, and neither tells.
    """

    def __init__(self, x: Tensor, products: dict[AnyPacked, Tensor]) -> None:
        self.content, self.products, self.left = content_of(x), products, len(products)
        self.states = {linear: _state(linear) for linear in products}
        self.end = weakref.ref(x, lambda _: products.clear())

    def take(self, linear: AnyPacked, x: Tensor) -> Tensor | None:
        """The product of a linear with x; None if there is none of this x."""
        if self.states.get(linear) != _state(linear) or self.content != content_of(x):
            return None
        self.left -= 1
        return self.products.pop(linear, None)


def content_of(x: Tensor) -> object:
    """What a contiguous tensor on the CPU holds, to be compared with what it holds later."""
    x = checks.in_memory("x", x)
    return x.shape, x.dtype, ctypes.string_at(x.data_ptr(), x.nbytes)


def _state(linear: AnyPacked) -> object:
    """What a product depends on besides its input, and whether autograd may use it later."""
    versions = [(tensor.data_ptr(), tensor._version) for tensor in linear.tensors]
    return PackedLinear.changes, torch.is_inference_mode_enabled(), versions


class SharedInput:
    """Packed linears that a module calls one after the other with the same input.

    The first call multiplies x with the weights of all, so that x is prepared and the threads
    are woken once; the others find their products waiting, if x, their weights and settings are
    what they were. Products wait in the thread that made them, until the next call at most. A
    module that does not call all of its linears with one input makes that a waste: after some such
    calls in a row it is given up. With more than `MAX_TOKENS` nothing is won. What needs a gradient
    is left to each linear, so that each has a graph of its own.
    """

    MAX_TOKENS = 64
    MISSES = 3

    def __init__(self, linears: list[AnyPacked]) -> None:
        self.linears = linears
        self.misses_left = self.MISSES
        self._thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"linears": self.linears}  # a copy begins anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["linears"])  # type: ignore[misc]

    def product(self, linear: AnyPacked, x: Tensor) -> Tensor | None:
        """x times the weight of `linear`, without its bias; None to leave it to the linear."""
        waiting: _Waiting | None = self._thread.__dict__.pop("waiting", None)
        if (
            self.misses_left == 0
            or torch.compiler.is_compiling()
            or x.device.type != "cpu"
            or x.numel() > self.MAX_TOKENS * linear.in_features
            or x.is_neg()
            or not x.is_contiguous()
            or gradients.is_wanted(x)
        ):
            return None
        if waiting is not None and waiting.left:
            y = waiting.take(linear, x)
            if y is not None:
                self._thread.waiting = waiting
                self.misses_left = self.misses_left if waiting.left else self.MISSES
                return y
            self.misses_left -= 1
        if not self._is_shareable():
            return None
        products = dict(zip(self.linears, _products(self.linears, x), strict=True))
        y = products.pop(linear)
        self._thread.waiting = _Waiting(x, products)
        return y

    def _is_shareable(self) -> bool:
        """Whether all are here, to be multiplied in one way, and tell when they change."""
        ways = {(one.backend, one.int8_activations) for one in self.linears}
        tensors = [tensor for one in self.linears for tensor in one.tensors]
        return len(ways) == 1 and all(t.is_cpu and not t.is_inference() for t in tensors)


def share_inputs(model: nn.Module, groups: Iterable[Sequence[str]] | None = None) -> None:
    """Let linears of a module that read one input be multiplied in one call where all are packed.

    `groups` has their names; without, those are taken that most models call so: q/k/v, gate/up.
    """
    modules = dict(model.named_modules())
    if groups is None:
        groups = [
            [f"{name}.{leaf}".lstrip(".") for leaf in leaves]
            for name in modules
            for leaves in DEFAULT.shared_inputs
        ]
    for names in groups:
        group = [m for n in names if isinstance(m := modules.get(n), AnyPacked)]
        if len(group) > 1 and len({linear.in_features for linear in group}) == 1:
            shared = SharedInput(group)
            for linear in group:
                linear.siblings = shared


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
