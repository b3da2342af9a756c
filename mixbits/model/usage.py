"""What a model's own code does with its linears, seen by running it without storage.

A copy of the model on torch's `meta` device runs a few tokens: shapes flow, no number is computed,
and every torch function that is called shows which tensors it takes. So it is seen

    read        whose weights something else than their own product looks at
    selecting   whose outputs only select: no gradient comes back to them
    scoring     whose outputs, up to element-wise operations, are what an index is made of
    remembered  whose outputs, up to element-wise operations, become keys or values
    outside     which are called while the module that holds them is not
    shared      groups of a module's linears that read one input
    made        linear -> others of its module, whose outputs became its input: number by number,
                and not by additions alone, as the last linear of an FFN has it

Where the code needs numbers (how many tokens an expert has), it gets some that are made up. Where
that goes wrong, what was seen until then stands, and `complete` is False.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .experts import is_experts
from .twin import copy_module

TOKENS = 4
_MATMULS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
_SELECTIONS = {"topk", "argmax", "argmin", "sort", "argsort", "kthvalue", "multinomial", "msort"}
# Operations at which the way back from a tensor ends: what comes before was multiplied by weights.
_PRODUCTS = ("Mm", "Bmm", "Addmm", "Baddbmm", "Convolution", "Embedding", "Attention", "Linear")
# Those that only bring numbers elsewhere, or add them; and those that make one number of several.
_MOVES: tuple[str, ...] = (
    *("Add", "Sub", "View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias", "Slice", "Split"),
    *("Select", "TBack", "Transpose", "Permute", "Clone", "Expand", "ToCopy", "Squeeze"),
    *("Unsqueeze", "Unbind", "Cat", "Stack"),
)
_REDUCTIONS: tuple[str, ...] = (
    *("Norm", "Mean", "Sum", "Logsumexp", "Var", "Std", "Softmax", "MaxBack", "AmaxBack"),
    *("MinBack", "AminBack", "Prod", "Cum", "Sort", "Topk", "Kthvalue", "Fft"),
    *("Index", "Gather", "Scatter"),
)
_MOST_NODES = 500


@dataclass
class Usage:
    """Names of linears, as the module's docstring says."""

    read: set[str] = field(default_factory=set)
    selecting: set[str] = field(default_factory=set)
    scoring: set[str] = field(default_factory=set)
    remembered: set[str] = field(default_factory=set)
    outside: set[str] = field(default_factory=set)
    shared: set[tuple[str, ...]] = field(default_factory=set)
    made: dict[str, tuple[str, ...]] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    complete: bool = False


def usage_of(model: nn.Module, blocks: Sequence[str], linears: Collection[str]) -> Usage:
    """Run a copy of a language model; `blocks` are its decoder blocks, `linears` plain ones there.

    Blocks of the same classes, sizes and choices are alike: the first of them runs for all.
    """
    seen, leaders = Usage(), {}
    with suppress(Exception):  # foreign code raises whatever it likes
        twin = copy_module(model, lambda t: torch.empty_like(t, device="meta"), {})
        leaders = _leaders(twin, blocks)
        modules = {
            f"{block}.{name}" if name else block: module
            for block in dict.fromkeys(leaders.values())
            for name, module in twin.get_submodule(block).named_modules()
        }
        _stand_in(twin, leaders, modules)
        watch = _Watch(seen, {n: modules[n] for n in linears if n in modules})
        watch.watch_parents(modules)
        with torch.device("meta"), torch.enable_grad():
            with watch:
                ids = torch.zeros(1, TOKENS, dtype=torch.int64)
                logits = twin(input_ids=ids, use_cache=False).logits
            watch.find_selecting(logits)
        seen.complete = True
    return _for_all(seen, leaders)


def _leaders(twin: nn.Module, blocks: Sequence[str]) -> dict[str, str]:
    """Block -> the first one that is like it."""
    first: dict[Any, str] = {}
    return {name: first.setdefault(_structure(twin.get_submodule(name)), name) for name in blocks}


def _structure(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that differ in numbers only, such as their place."""
    return tuple(
        (
            name,
            type(part),
            *((n, *p.shape) for n, p in part._parameters.items() if p is not None),
            *sorted((k, v) for k, v in part.__dict__.items() if isinstance(v, bool | str)),
        )
        for name, part in block.named_modules()
    )


def _stand_in(twin: nn.Module, leaders: Mapping[str, str], modules: Mapping[str, Any]) -> None:
    """Let something quick stand for blocks that are like others, and for known experts."""
    for module in modules.values():
        if is_experts(module):
            module.__dict__["forward"] = _stand_in_for_experts
    outputs: dict[str, Any] = {}

    def leader(name: str, block: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            outputs[name] = type(block).forward(block, *args, **kwargs)
            return outputs[name]

        return run

    def follower(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, out = (*args, *kwargs.values())[0], outputs[name]
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        return run

    for name, first in leaders.items():
        block: Any = twin.get_submodule(name)
        block.__dict__["forward"] = leader(name, block) if name == first else follower(first)


def _for_all(seen: Usage, leaders: Mapping[str, str]) -> Usage:
    """What was seen in a block, said of all that are like it."""
    followers: dict[str, list[str]] = {}
    for name, first in leaders.items():
        followers.setdefault(first, []).append(name)

    def spread(names: set[str]) -> set[str]:
        return {
            f"{other}{name.removeprefix(first)}"
            for first, others in followers.items()
            for name in names
            if name.startswith(f"{first}.")
            for other in others
        }

    def in_block(block: str, first: str, name: str) -> str:
        return f"{block}{name.removeprefix(first)}"

    shared, made = set[tuple[str, ...]](), dict[str, tuple[str, ...]]()
    for block, first in leaders.items():
        for names in seen.shared:
            if names[0].startswith(f"{first}."):
                shared.add(tuple(in_block(block, first, name) for name in names))
        for name, sources in seen.made.items():
            if name.startswith(f"{first}."):
                mine = tuple(in_block(block, first, source) for source in sources)
                made[in_block(block, first, name)] = mine
    return Usage(
        spread(seen.read),
        spread(seen.selecting),
        spread(seen.scoring),
        spread(seen.remembered),
        spread(seen.outside),
        shared,
        made,
        spread(seen.called),
        seen.complete,
    )


def _stand_in_for_experts(hidden: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
    """Shapes, and what depends on what: tokens and their weights become outputs."""
    parts = [t.sum() for t in (*routing, *named.values()) if t.is_floating_point()]
    return hidden * (1 + sum(parts)) if parts else hidden * 1


class _Watch(TorchFunctionMode):
    """Looks at every torch function that a model calls."""

    def __init__(self, found: Usage, linears: Mapping[str, Any]) -> None:
        super().__init__()
        self.found = found
        self.leaves: dict[str, Tensor] = {}  # added to a linear's output: gradients name it
        self._names: dict[int, str] = {}  # of leaves
        self._weights: dict[int, str] = {}
        self._kept: list[Tensor] = []  # so that no address is used twice
        self._own = False  # inside of a linear's own product
        self._lost = False  # values were dropped on the way: missing gradients say nothing
        self._active: set[str] = set()
        self._inputs: dict[Any, list[str]] = {}  # what holds an input -> linears that read it
        # Attention that is written out: nodes of products, with what they multiply, and of softmax.
        self._products: dict[Any, Tensor] = {}
        self._softmax: set[Any] = set()
        parents: dict[str, list[str]] = {}
        for name, linear in linears.items():
            parents.setdefault(name.rpartition(".")[0], []).append(name)
            for parameter in linear.parameters():
                self._weights[id(parameter)] = name
            linear.__dict__["forward"] = self._linear(name, linear)
        self._parents = set(parents)

    def watch_parents(self, modules: Mapping[str, Any]) -> None:
        for name in self._parents & modules.keys():
            module = modules[name]
            module.__dict__["forward"] = self._parent(name, module)

    def _parent(self, name: str, module: Any) -> Callable[..., Any]:
        own = module.__dict__.get("forward") or type(module).forward.__get__(module)

        def run(*args: Any, **kwargs: Any) -> Any:
            self._active.add(name)
            try:
                return own(*args, **kwargs)
            finally:
                self._active.discard(name)

        return run

    def _linear(self, name: str, linear: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            self._own = True
            try:
                if name not in self.found.called:
                    self._note_input(name, x)
                y: Tensor = type(linear).forward(linear, x)
                if name not in self.leaves and torch.is_grad_enabled():
                    leaf = torch.zeros(y.shape[-1], dtype=y.dtype, device="meta")
                    self.leaves[name] = leaf.requires_grad_()
                    self._names[id(leaf)] = name
                y = y + self.leaves.get(name, 0)
            finally:
                self._own = False
            if name.rpartition(".")[0] not in self._active:
                self.found.outside.add(name)
            return y

        return run

    def _note_input(self, name: str, x: Tensor) -> None:
        """What a linear reads when it is first called, and who has read the same."""
        self.found.called.add(name)
        parent, storage = name.rpartition(".")[0], x.untyped_storage()
        self._kept.append(x)
        key = parent, storage._cdata, x.storage_offset(), x.numel(), x.shape[-1], x._version
        readers = self._inputs.setdefault(key, [])
        self.found.shared.discard(tuple(readers))
        readers.append(name)
        if len(readers) > 1:
            self.found.shared.add(tuple(readers))
        makers = self._number_by_number(x)
        if makers and all(maker.rpartition(".")[0] == parent for maker in makers):
            self.found.made[name] = tuple(sorted(makers, key=list(self.leaves).index))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._own:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _SELECTIONS and args and isinstance(args[0], Tensor):
            self.found.scoring |= self._made_of(args[0])
        elif name == "scaled_dot_product_attention":
            for tensor in (*args[1:3], *(kwargs[k] for k in ("key", "value") if k in kwargs)):
                self.found.remembered |= self._made_of(tensor)
        made_up = self._make_up(name, args, kwargs)
        result = func(*args, **kwargs) if made_up is None else made_up[0]
        self._note_attention(name, args, result)
        self._note_reading(name, args, kwargs, result)
        return result

    def _note_attention(self, name: str, args: Any, result: Any) -> None:
        """Keys are what a softmax's input was multiplied by, and values what its output is."""
        if not isinstance(result, Tensor) or result.grad_fn is None:
            return
        operands = [t for t in _tensors(args) if t.dim() > 2][-2:]
        if name in _MATMULS and len(operands) == 2:
            self._products[result.grad_fn] = operands[1]
            if any(node in self._softmax for node in self._before(operands[0])):
                self.found.remembered |= self._made_of(operands[1])
        elif name == "softmax" and args and isinstance(args[0], Tensor):
            scores = self._before(args[0]) & self._products.keys()
            self._softmax |= {result.grad_fn} if scores else set()
            for node in scores:
                self.found.remembered |= self._made_of(self._products[node])

    def _note_reading(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """A weight is read by whatever makes a tensor of it; a view of it is the weight still."""
        if not isinstance(result, Tensor | tuple | list):
            return
        if name == "type_as" or (name == "to" and len(args) > 1 and isinstance(args[1], Tensor)):
            args = args[:1]  # of the other it takes the dtype and device only
        for tensor in _tensors((args, tuple(kwargs.values()))):
            linear = self._weights.get(id(tensor))
            if linear is None:
                continue
            if name == "__get__" and isinstance(result, Tensor):
                self._weights[id(result)] = linear
                self._kept.append(result)
            elif name not in ("__get__", "size", "stride", "__format__", "__repr__"):
                self.found.read.add(linear)

    def _make_up(self, name: str, args: Any, kwargs: Any) -> tuple[Any] | None:
        """The result of what needs numbers that are not there, in a tuple; None for the rest."""
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is None:
            return None
        if name in ("__bool__", "equal", "allclose"):
            return (False,)
        if name in ("item", "__int__", "__float__", "__index__"):
            return (0.0 if x.is_floating_point() and name != "__int__" else 0,)
        if name == "tolist":
            return (_zeros(tuple(x.shape)),)
        if name == "nonzero" or (name == "where" and len(args) == 1 and not kwargs):
            found = torch.zeros(1, x.dim(), dtype=torch.int64, device="meta")
            as_tuple = name == "where" or kwargs.get("as_tuple")
            return (found.unbind(1) if as_tuple else found,)
        if name in ("unique", "unique_consecutive") and len(args) + len(kwargs) == 1:
            return (x.flatten()[:1],)
        masks = [k for k in _tensors(args[1:2]) if k.dtype == torch.bool]
        if name == "__getitem__" and masks and isinstance(args[1], Tensor):
            return (x.flatten(0, args[1].dim() - 1)[:1],)
        if name == "__setitem__" and masks:
            self._lost = True
            return (None,)
        return None

    def _made_of(self, tensor: Tensor) -> set[str]:
        """Linears whose outputs, up to element-wise operations, a tensor is made of."""
        found: set[str] = set()
        for node in self._before(tensor):
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self._names:
                found.add(self._names[id(variable)])
        return found

    def _before(self, tensor: Tensor) -> set[Any]:
        """Nodes that a tensor comes from, up to the last products."""
        seen: set[Any] = set()
        nodes: list[Any] = [tensor.grad_fn]
        while nodes and len(seen) < _MOST_NODES:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if not any(product in node.name() for product in _PRODUCTS):
                nodes += [before for before, _ in node.next_functions]
        return seen

    def _number_by_number(self, tensor: Tensor) -> set[str]:
        """Linears whose outputs, and nothing else that was computed, a tensor is made of.

        None where numbers of different columns meet, and where nothing but moves and sums is done.
        """
        found: set[str] = set()
        seen: set[Any] = set()
        nodes: list[Any] = [tensor.grad_fn]
        changes = False
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            before = [one for one, _ in node.next_functions if one is not None]
            leaves = [getattr(one, "variable", None) for one in before]
            linears = {self._names[id(leaf)] for leaf in leaves if id(leaf) in self._names}
            if linears:  # a linear's output; how that was made is its own affair
                found |= linears
                continue
            kind = node.name()
            if len(seen) > _MOST_NODES or any(k in kind for k in (*_PRODUCTS, *_REDUCTIONS)):
                return set()
            changes = changes or not kind.startswith(_MOVES)
            nodes += before
        return found if changes else set()

    def find_selecting(self, logits: Tensor) -> None:
        """Linears to which no gradient comes back from the logits."""
        if self._lost or not self.leaves:
            return
        leaves = list(self.leaves.values())
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            logits.sum(), leaves, allow_unused=True
        )
        for name, gradient in zip(self.leaves, gradients, strict=True):
            if gradient is None:
                self.found.selecting.add(name)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


def _zeros(shape: tuple[int, ...]) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0
