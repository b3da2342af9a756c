"""Linears that hold packed weights, and share the preparation of an input.

`PackedLinear` keeps codes and scales, of one to eight segments of its columns, and calls the
kernels.
What they must equal, up to the order of summation, is in `mixbits.runtime.fake`.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import gradients
from ..errors import UsageError
from ..formats import checks
from ..formats.arrange import Arrangement, check_order
from ..formats.fp8_weights import can_fold
from ..formats.pack import Operand, Packed, Part, order_dtype, packed_spec, recipe_tensors
from ..formats.schemes import Format, Recipe, Scheme
from ..model.families import DEFAULT


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


class Segment(_Watched):
    """Some columns of a packed linear, in one scheme: what is stored of them.

    Buffers as in `mixbits.formats.pack`, empty until somebody fills them.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_global_scale: Tensor | None
    format: Format
    activation: Format | None

    def _hold(
        self, scheme: Scheme, rows: int, columns: int, device: torch.device | str | None
    ) -> None:
        self.format, self.activation = scheme.format, scheme.activation
        # No buffer as long as it is None: accelerate moves buffers, and takes all for tensors.
        self.weight_zero_point = self.weight_global_scale = None
        for name, (dtype, shape) in packed_spec(scheme.format, rows, columns).items():
            vars(self).pop(name, None)
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    @property
    def part(self) -> Part:
        found = self._buffers.get  # at once, where torch would look in three places
        codes, scale, zero_point, whole = map(found, Packed._fields)
        if codes is None or scale is None:
            codes, scale = self.weight_packed, self.weight_scale
        if zero_point is None:
            zero_point = self.weight_zero_point
        if whole is None:
            whole = self.weight_global_scale
        return Part(Packed(codes, scale, zero_point, whole), self.format, self.activation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Segment:
        # `.to(bfloat16)` must not round scales: they travel as integers.
        scales = {n: getattr(self, n, None) for n in ("weight_scale", "weight_global_scale")}
        dtypes = {n: s.dtype for n, s in scales.items() if s is not None and s.is_floating_point()}
        for name, dtype in dtypes.items():
            bits = torch.int16 if dtype.itemsize == 2 else torch.int32
            setattr(self, name, getattr(self, name).view(bits))
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            setattr(self, name, getattr(self, name).view(dtype))
        PackedLinear.changes += 1
        return self


class _Siblings(Protocol):
    """Linears of one input: `SharedInput`."""

    def product(self, linear: PackedLinear, x: Tensor) -> Tensor | None: ...


class PackedLinear(Segment):
    """y = x' Q(W')^T + bias from packed weights; x [..., K] -> y [..., N] in x's dtype.

    x' and W' are x and W as the recipe arranges them (`mixbits.formats.arrange`). A linear with a
    plain recipe is its own only segment; others have theirs in `segments`, and `order` where that
    is stored. `backend` forces one of `mixbits.ops.backends()`; `int8_activations` is explained at
    `mixbits.ops.packed_matmul`, and `row_scale`, which says that activations may be 8-bit floats,
    at `mixbits.ops.packed_matmul_fp8`.
    """

    order: Tensor | None
    row_scale: Tensor | None
    # How often an attribute of any packed linear was set in this process. While it stays, what was
    # found out about any of them holds. To set one of another model costs all a new look; a count
    # for each linear would cost a look at each for every token.
    changes = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        recipe: Recipe,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.recipe = in_features, out_features, recipe
        parts = recipe.parts(in_features)
        self.columns = tuple(columns for _, columns in parts)
        self.rotated, self.has_segments = recipe.rotated, not recipe.is_plain
        self.backend: str | None = None
        self.int8_activations = False
        self.siblings: _Siblings | None = None
        self.order = self.row_scale = None  # no buffers, as above
        if recipe.order is not None and not recipe.order_in_producer:
            dtype = order_dtype(in_features)
            del self.order
            self.register_buffer("order", torch.tensor(recipe.order, dtype=dtype, device=device))
        holders: list[Segment] = [self]
        if self.has_segments:
            holders = [Segment() for _ in parts]
            self.segments = nn.ModuleList(holders)
        for holder, (scheme, columns) in zip(holders, parts, strict=True):
            holder._hold(scheme, out_features, columns, device)
        self.bias = bias

    @classmethod
    def from_weight(
        cls, weight: Tensor, recipe: Recipe, bias: nn.Parameter | None = None, name: str = "weight"
    ) -> PackedLinear:
        """Pack `weight` [N, K]."""
        from ..rounding.nearest import pack_recipe  # what only loads needs none of it

        linear = cls(weight.shape[1], weight.shape[0], recipe, bias)
        return linear.fill(recipe_tensors(recipe, pack_recipe(name, weight, recipe)))

    def fill(self, tensors: Mapping[str, Tensor]) -> PackedLinear:
        """Take tensors, named as in `mixbits.formats.pack.recipe_spec`, as the buffers."""
        for name, value in tensors.items():
            path, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(path), leaf, value)
        return self

    @property
    def parts(self) -> list[Segment]:
        """What holds each segment's tensors."""
        if not self.has_segments:
            return [self]
        segments: Any = self._modules["segments"]
        return list(segments._modules.values())

    @property
    def operand(self) -> Operand:
        if not self.has_segments:
            return Operand((self.part,), self.columns)
        return Operand(tuple(s.part for s in self.parts), self.columns, self.order, self.rotated)

    @property
    def tensors(self) -> list[Tensor]:
        holders = [self, *self.parts] if self.has_segments else [self]
        return [x for holder in holders for x in holder._buffers.values() if x is not None]

    def checked(self, device: torch.device) -> Operand:
        """`operand`, as kernels on `device` can have it.

        Buffers are anybody's to replace, to resize and to move: every call looks whether they are
        what they were. An order is gone through again when somebody has written to it. Raises
        ValueError or TypeError that says which is not as it must be.
        """
        operand = self.operand
        place = _place(device, operand)
        if place is not None and place == self.__dict__.get("_place"):
            return operand
        found = checks.checked_operand(operand, self.in_features, device)
        tensors = _tensors(operand)
        if all(map(is_, _tensors(found), tensors)) and checks.keep_size(tensors):
            self.__dict__["_place"] = place  # by this way it is no change
        return found

    @property
    def weight(self) -> Tensor:
        """float32 [N, K], made anew at every look: for models that look at their linears'."""
        operand = self.operand
        pieces = [ops.dequantize(*piece) for piece in operand.pieces]
        arranged = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        order = None if operand.order is None else operand.order.long()
        return Arrangement(order, operand.rotated).restore(arranged)

    def forward(self, x: Tensor) -> Tensor:
        if self.has_segments and self.parts[0].weight_packed.is_meta:
            return self._forward_offloaded(x)
        if self.row_scale is None or torch.compiler.is_compiling():
            return _forward(self, x)
        packed, fmt, _ = self.part
        rows = x.reshape(-1, self.in_features)
        y = ops.packed_matmul_fp8(rows, packed, fmt, self.row_scale, self.backend)
        return _add_bias(self, y.reshape(*x.shape[:-1], self.out_features))

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
        mode = "" if self.row_scale is None else ", activations may be fp8"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self.recipe.name}{mode}"


def _tensors(operand: Operand) -> list[Tensor | None]:
    """What an operand is made of."""
    return [operand.order, *itertools.chain.from_iterable(part.packed for part in operand.parts)]


def _place(device: torch.device, operand: Operand) -> object:
    """Where tensors lie in memory, and how much they take there; None if that has no answer.

    What has been checked, and `checks.keep_size`d, and lies where it lay, can be read as it was; an
    order, if nobody has written to it.
    """
    order = operand.order
    try:
        places: list[object] = [
            None if x is None else (x.data_ptr(), x.nbytes, x.is_contiguous(), x.is_neg())
            for part in operand.parts
            for x in part.packed
        ]
        if order is not None:
            version = None if order.is_inference() else order._version
            places += (order.data_ptr(), order.nbytes, order.is_contiguous(), order.is_neg())
            places.append(version)
    except (AttributeError, NotImplementedError, RuntimeError):  # no tensor, or a strange one
        return None
    return PackedLinear.changes, device, places


def _forward(linear: PackedLinear, x: Tensor) -> Tensor:
    y = None if linear.siblings is None else linear.siblings.product(linear, x)
    if y is None:
        y = _products([linear], x)[0]
    return _add_bias(linear, y)


def _add_bias(linear: PackedLinear, y: Tensor) -> Tensor:
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


def _products(linears: Sequence[PackedLinear], x: Tensor) -> list[Tensor]:
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
    packed_ones = [m for m in model.modules() if isinstance(m, PackedLinear)]
    parts = {m: m.part for m in packed_ones if not m.has_segments}
    chosen = [m for m, p in parts.items() if can_fold(p.format) and not p.activation]
    for one in chosen:
        row_scale = ops.fold_rows(parts[one].packed, parts[one].format, one.in_features)
        if row_scale is not None:
            del one.row_scale
            one.register_buffer("row_scale", row_scale, persistent=False)
    if all(one.row_scale is None for one in chosen):
        raise UsageError(
            f"fp8_activations needs MXFP4A16 linears with block scales within 15 binades per row: "
            f"got {len(chosen)} MXFP4A16 linears of {len(parts)} packed in one scheme"
        )


def packed_linear(weight: Tensor, recipe: Recipe, bias: nn.Parameter | None = None) -> PackedLinear:
    """An empty linear for what `recipe` makes of a weight like this one [N, K], on its device."""
    rows, columns = weight.shape
    return PackedLinear(columns, rows, recipe, bias, weight.device)


class _Waiting:
    """Products of one input that nobody has asked for yet; they go when the input does.

    What the input holds is compared byte by byte, so that it does not matter who has changed it,
    or through which of its views: a tensor knows its address and a version, and neither tells.
    """

    def __init__(self, x: Tensor, products: dict[PackedLinear, Tensor]) -> None:
        self.content, self.products, self.left = content_of(x), products, len(products)
        self.states = {linear: _state(linear) for linear in products}
        self.end = weakref.ref(x, lambda _: products.clear())

    def take(self, linear: PackedLinear, x: Tensor) -> Tensor | None:
        """The product of a linear with x; None if there is none of this x."""
        if self.states.get(linear) != _state(linear) or self.content != content_of(x):
            return None
        self.left -= 1
        return self.products.pop(linear, None)


def content_of(x: Tensor) -> object:
    """What a contiguous tensor on the CPU holds, to be compared with what it holds later."""
    x = checks.in_memory("x", x)
    return x.shape, x.dtype, ctypes.string_at(x.data_ptr(), x.nbytes)


def _state(linear: PackedLinear) -> object:
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

    def __init__(self, linears: list[PackedLinear]) -> None:
        self.linears = linears
        self.misses_left = self.MISSES
        self._thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"linears": self.linears}  # a copy begins anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["linears"])  # type: ignore[misc]

    def product(self, linear: PackedLinear, x: Tensor) -> Tensor | None:
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
        group = [m for n in names if isinstance(m := modules.get(n), PackedLinear)]
        if len(group) > 1 and len({linear.in_features for linear in group}) == 1:
            shared = SharedInput(group)
            for linear in group:
                linear.siblings = shared
