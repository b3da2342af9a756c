"""Experts that are held in 3-D parameters: how they lie there, and the one loop that runs them.

Measured, fake-quantized and packed experts all run through `ExpertsLoop`. What an experts module
does is its own code's business, so a `Layout` is what was found to give the same results as that
code, with random weights and inputs (`layout_of`). A module of which that cannot be said has none.

The parameters are `gate_up_proj` (or `up_proj` alone) and `down_proj`, or what a family calls them
(`families.Stacks`), perhaps each with a `..._bias`. Each expert's part lies there as [N, K] or as
[K, N], the rows of gate and up one half after the other or in turn. What is made of the products of
gate and up is act(gate) * up, or what the module's own `_apply_gate` says.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .families import DEFAULT, Stacks, known_stacks
from .twin import plain_numbers, random_copy, same, signature, small_sizes

# (expert, projection, x [M, K]) -> [M, N]
ExpertLinear = Callable[[int, str, Tensor], Tensor]
Activation = Callable[..., Tensor]  # of gate [M, I] and up [M, I], or of up alone -> [M, I]

EXPERT_PROJECTIONS = (*DEFAULT.ffn_inputs, DEFAULT.ffn_output)  # what slices are called here
_, _UP, _DOWN = EXPERT_PROJECTIONS
_SCALES = (0.3, 10.0, 1000.0)  # of inputs: small and large ones, which clamps would cut
_TOLERANCE = 1e-4  # float32 sums of a hundred products, in another order
_NAME = "_mixbits_layout"


@dataclass(frozen=True)
class Layout:
    """How an experts module holds its weights, and what it does with them.

    gated        act(gate) * up; otherwise there is up alone
    biased       every projection has a bias
    transposed   [E, K, N] instead of [E, N, K]
    interleaved  rows of gate and up in turn
    own_gate     gate and up meet in the module's `_apply_gate`
    routed       called with hidden [T, H], top_k_index and top_k_weights [T, k]; otherwise with
                 hidden [E * T, H] that holds each expert's rows, zeros where it has none
    names        of the parameters
    """

    gated: bool = True
    biased: bool = False
    transposed: bool = False
    interleaved: bool = False
    own_gate: bool = False
    routed: bool = True
    names: Stacks = DEFAULT.experts

    @property
    def projections(self) -> tuple[str, ...]:
        return EXPERT_PROJECTIONS if self.gated else EXPERT_PROJECTIONS[1:]

    def stack(self, projection: str) -> str:
        """The parameter that holds a projection of all experts."""
        if self.joins(projection):
            return self.names.joined
        return self.names.down if projection == _DOWN else self.names.up

    def joins(self, projection: str) -> bool:
        """Whether a projection shares its parameter with another."""
        return self.gated and projection != _DOWN

    @property
    def stacks(self) -> tuple[str, ...]:
        """Every parameter, biases too."""
        weights = dict.fromkeys(map(self.stack, self.projections))
        return tuple(w + suffix for w in weights for suffix in ("", "_bias")[: 1 + self.biased])

    def part(self, rows: Tensor, projection: str) -> Tensor:
        """Those of gate or of up, of both one's rows [2I, ...]; a view. Of others, all."""
        if not self.joins(projection):
            return rows
        second = projection == _UP
        if self.interleaved:
            return rows[int(second) :: 2]
        return rows.chunk(2)[int(second)]


STANDARD = Layout()


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of an experts module; None for any other, and for one of unknown ways."""
    if _stacks_of(module) is None:
        return None
    if _NAME not in module.__dict__:
        module.__dict__[_NAME] = _find_layout(module)
    found: Layout | None = module.__dict__[_NAME]
    return found


def _stacks_of(module: nn.Module) -> Stacks | None:
    """The names of a module's parameters, if they are those of experts, biases or not."""
    held = {n for n, p in module._parameters.items() if isinstance(p, nn.Parameter)}
    for names in known_stacks():
        if names.down in held and (names.joined in held or names.up in held):
            return names
    return None


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds experts that can be split into linears."""
    return layout_of(module) is not None


def expert_count(module: Any, layout: Layout) -> int:
    """How many experts a module holds."""
    return len(getattr(module, layout.names.down))


def expert_slice(module: Any, expert: int, projection: str, layout: Layout | None = None) -> Tensor:
    """The [N, K] view of one expert's projection in the 3-D parameters of `module`.

    What is no module has the usual layout.
    """
    if layout is None:
        layout = layout_of(module) if isinstance(module, nn.Module) else STANDARD
    assert layout is not None
    weight: Tensor = getattr(module, layout.stack(projection))[expert]
    return layout.part(weight.T if layout.transposed else weight, projection)


def expert_bias(module: Any, expert: int, projection: str) -> Tensor | None:
    """The [N] view of one expert's bias, or None where experts have none."""
    layout = layout_of(module)
    assert layout is not None
    if not layout.biased:
        return None
    stack: Tensor = getattr(module, f"{layout.stack(projection)}_bias")
    return layout.part(stack[expert], projection)


def make_stack(
    layout: Layout, name: str, like: Tensor, value: Callable[[int, str], Tensor]
) -> Tensor:
    """A parameter of an experts module, of the shape, dtype and device of `like`.

    `value` gives the [N, K], or the [N] of biases, of an expert and a projection.
    """
    stack = torch.empty_like(like)
    is_bias = name.endswith("_bias")
    for expert, rows in enumerate(stack):
        turned = rows.T if layout.transposed and not is_bias else rows
        for projection in layout.projections:
            if layout.stack(projection) == name.removesuffix("_bias"):
                layout.part(turned, projection).copy_(value(expert, projection))
    return stack


# --- running ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnGate:
    """What a module's `_apply_gate` makes of gate and up, which it takes in one tensor."""

    module: Any
    interleaved: bool

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        both = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else None
        out: Tensor = self.module._apply_gate(torch.cat((gate, up), -1) if both is None else both)
        return out


@dataclass(frozen=True)
class GatedActivation:
    """act(gate) * up."""

    act_fn: Callable[[Tensor], Tensor]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up


@dataclass(frozen=True)
class ExpertsLoop:
    """Experts one after the other, each on the tokens that are routed to it.

    Same result as the `forward` of the module that `loop_of` takes it from. Indices of
    `num_experts` and above mark tokens of other ranks and are skipped, as there.
    """

    num_experts: int
    activation: Activation
    layout: Layout = STANDARD
    arguments: tuple[str, ...] = ()  # names of those of the module's `forward`

    def __call__(self, linear: ExpertLinear, *args: Any, **kwargs: Any) -> Tensor:
        """`linear` applies a projection of an expert; the others are `forward`'s arguments."""
        args += tuple(kwargs.pop(name) for name in self.arguments[len(args) :] if name in kwargs)
        if kwargs:
            raise TypeError(f"experts take {', '.join(self.arguments)}: got {', '.join(kwargs)}")
        return self._routed(linear, *args) if self.layout.routed else self._sorted(linear, *args)

    def _expert(self, linear: ExpertLinear, expert: int, x: Tensor) -> Tensor:
        first = [linear(expert, p, x) for p in self.layout.projections[:-1]]
        return linear(expert, _DOWN, self.activation(*first))

    def _routed(
        self, linear: ExpertLinear, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            if expert < 0:
                raise ValueError(f"indices of experts must be from 0 on: got {expert}")
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(index == expert)
            y = self._expert(linear, expert, hidden[token]) * weights[token, slot, None]
            out = out.index_add(0, token, y.to(out.dtype))
        return out

    def _sorted(self, linear: ExpertLinear, hidden: Tensor) -> Tensor:
        outs = []
        for expert, x in enumerate(hidden.unflatten(0, (self.num_experts, -1))):
            # Rows of zeros belong to other experts: they would count as tokens of this one.
            (token,) = torch.where(x.any(-1))
            out = torch.zeros_like(x)
            if len(token):
                out = out.index_add(0, token, self._expert(linear, expert, x[token]).to(x.dtype))
            outs.append(out)
        return torch.cat(outs)


def loop_of(module: Any, keep: bool = False) -> ExpertsLoop:
    """The loop that stands for the `forward` of an experts module, with its activation.

    `keep` is for a loop that outlives the module: it then keeps none of its weights.
    """
    layout = layout_of(module)
    assert layout is not None
    count = expert_count(module, layout)
    return _loop(_without_weights(module) if keep else module, layout, count)


def _loop(module: Any, layout: Layout, num_experts: int) -> ExpertsLoop:
    activation: Activation
    if layout.own_gate:
        activation = OwnGate(module, layout.interleaved)
    else:
        activation = GatedActivation(module.act_fn) if layout.gated else module.act_fn
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    return ExpertsLoop(num_experts, activation, layout, arguments)


def _without_weights(module: nn.Module) -> nn.Module:
    bare: nn.Module = type(module).__new__(type(module))
    bare.__dict__ = {**module.__dict__, "_parameters": {}}
    return bare


# --- recognising -----------------------------------------------------------------------------

_FOUND: dict[Any, tuple[Any, Layout | None]] = {}  # with settings that a key knows by address
_NOTHING: dict[str, Any] = dict.fromkeys(("_parameters", "_buffers", "_modules"))


def _find_layout(module: nn.Module) -> Layout | None:
    """By what the module does; modules that are alike are tried once."""
    held = {n for n, p in module._parameters.items() if p is not None}
    has_more = len(list(module.parameters())) > len(held) or next(module.buffers(), None)
    hooks = module._forward_hooks or module._forward_pre_hooks
    names = _stacks_of(module)
    if names is None or has_more is True or isinstance(has_more, Tensor) or hooks:
        return None
    kinds = [
        layout
        for gated, biased in itertools.product((True, False), (False, True))
        if set((layout := Layout(gated, biased, names=names)).stacks) == held
    ]
    if not kinds:
        return None
    key = signature(module)
    if key not in _FOUND:
        settings = [{**part.__dict__, **_NOTHING} for part in module.modules()]
        _FOUND[key] = settings, _try_layouts(module, kinds[0])
    return _FOUND[key][1]


def _candidates(module: nn.Module, kind: Layout) -> Iterator[Layout]:
    """Layouts that fit the shapes; those with the fewest peculiarities first."""
    own = (False, True) if kind.gated and hasattr(module, "_apply_gate") else (False,)
    sides, turns = (False, True), (False, True) if kind.gated else (False,)
    parameters: dict[str, Any] = module._parameters
    first, down = (parameters[kind.stack(p)].shape for p in (_UP, _DOWN))
    for own_gate, routed, transposed, interleaved in itertools.product(
        own, (True, False), sides, turns
    ):
        outer, inner = (down[2], down[1]) if transposed else (down[1], down[2])
        rows = inner * (1 + kind.gated)
        wanted = (down[0], outer, rows) if transposed else (down[0], rows, outer)
        is_known = own_gate or hasattr(module, "act_fn")
        if tuple(first) == wanted and is_known:
            yield Layout(
                kind.gated, kind.biased, transposed, interleaved, own_gate, routed, kind.names
            )


@plain_numbers()
def _try_layouts(module: nn.Module, kind: Layout) -> Layout | None:
    """`kind` has the names, and whether there are gates and biases."""
    down = module._parameters[kind.names.down]
    if down is None or down.dim() != 3:
        return None
    count, *sides = down.shape
    small = small_sizes(*sides)
    # Settings may hold sizes that are not seen: then the module's own are tried.
    for sizes in ({count: min(count, 4)} | small, {count: min(count, 2)})[: 1 + bool(small)]:
        try:
            twin = random_copy(module, sizes)
        except ValueError:
            return None
        _run_plainly(twin)
        for layout in _candidates(twin, kind):
            with suppress(Exception):  # foreign code raises whatever it likes
                if _is_elementwise(twin, layout) and _does_the_same(twin, layout):
                    return layout
    return None


def _run_plainly(twin: Any) -> None:
    """Let transformers' experts run their own `forward`, and not a fused one in its place."""
    config = twin.__dict__.get("config")
    if hasattr(config, "_experts_implementation_internal"):
        kind: Any = type(config)
        own = kind.__new__(kind)
        own.__dict__ = {**config.__dict__, "_experts_implementation_internal": "eager"}
        twin.__dict__["config"] = own


def _is_elementwise(twin: Any, layout: Layout) -> bool:
    """Whether column i of gate, and of up, changes column i of what they become, and no other.

    This also tells how the columns lie that `_apply_gate` takes.
    """
    inner = getattr(twin, layout.names.down).shape[1 if layout.transposed else 2]
    activation = _loop(twin, layout, 1).activation
    count = 1 + layout.gated
    base = torch.randn(count, inner, generator=torch.Generator().manual_seed(1))
    before = activation(*base[:, None])
    for number in range(count):
        moved = base[:, None].repeat(1, inner, 1)
        moved[number] += 0.1 * torch.eye(inner)
        after = activation(*moved)
        others = ~torch.eye(inner).bool()  # their last bits may differ, for they lie elsewhere
        if after.shape != (inner, inner) or not torch.allclose(
            after[others], before.expand_as(after)[others], rtol=1e-5, atol=1e-6
        ):
            return False
    return True


def _does_the_same(twin: Any, layout: Layout) -> bool:
    """Whether the loop gives what the module's own code gives."""
    count, generator = expert_count(twin, layout), torch.Generator().manual_seed(2)
    hidden = expert_slice(twin, 0, layout.projections[0], layout).shape[1]
    loop = _loop(twin, layout, count)

    def linear(expert: int, projection: str, x: Tensor) -> Tensor:
        bias = None
        if layout.biased:
            stack = getattr(twin, f"{layout.stack(projection)}_bias")
            bias = layout.part(stack[expert], projection)
        weight = expert_slice(twin, expert, projection, layout)
        return nn.functional.linear(x, weight, bias)

    def agree(*args: Tensor) -> bool:
        return same(loop(linear, *args), twin(*args), _TOLERANCE)

    x = torch.randn(count * 3, hidden, generator=generator)
    x[1] = 0.0
    if not layout.routed:
        return all(agree(x * scale) for scale in _SCALES)
    index = torch.randint(0, count, (len(x), 2), generator=generator)
    weights = torch.rand(index.shape, generator=generator)
    if not all(agree(x * scale, index, weights) for scale in _SCALES):
        return False
    for beyond in (count, count + 1):  # experts that are none: skipped, if they may occur at all
        index[0, 0] = beyond
        try:
            own = twin(x, index, weights)
        except (AssertionError, LookupError, RuntimeError, ValueError):  # as torch does, or it
            continue
        if not same(loop(linear, x, index, weights), own, _TOLERANCE):
            return False
    return True
