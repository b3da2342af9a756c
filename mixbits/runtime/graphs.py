"""One-token steps of `generate` as CUDA graphs: the whole step is launched at once.

A step of a packed model is some hundred short kernels, and launching them takes longer than running
them. So the step is captured once and replayed: the cache, the token, its position and the mask lie
at fixed addresses, and a call copies its own into these.

What can be captured is one new token per sequence with a static cache that sees every position
(transformers' StaticCache made of StaticLayer). All else runs as it would have: prompts, sliding
windows, experts, whose routing asks the host, and steps whose capture fails, which is said once.
`generate` makes a new cache for each call: it is given the memory of the one that was captured.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from ..errors import first_line
from ..model.experts import is_experts
from .linear import PackedLinear
from .swap import Experts

WARM_UP = 2  # steps before the capture: kernels are compiled and chosen, workspaces allocated

Replay = Callable[[], None]
# Prepares to repeat a step: (step) -> (replay, the step's result, which replay overwrites)
Record = Callable[[Callable[[], Tensor]], "tuple[Replay, Tensor]"]


def capture(step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """The step as a CUDA graph. Nothing in it may wait for the device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def is_static(cache: object) -> bool:
    """Whether every layer of `cache` keeps all positions at a fixed place."""
    return isinstance(cache, StaticCache) and all(type(x) is StaticLayer for x in cache.layers)


def _tensors(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    return layer.keys, layer.values, layer.cumulative_length


def _layers(cache: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [_tensors(layer) for layer in cache.layers]


class _CacheMemory:
    """The tensors that a captured step works on, and the cache whose they are now."""

    def __init__(self, cache: Any) -> None:
        self.layers = _layers(cache)
        self.owner = weakref.ref(cache)
        self.cache = copy.copy(cache)  # what the step is given: it outlives its first owner
        self.cache.layers = [copy.copy(layer) for layer in cache.layers]

    def fits(self, cache: Any) -> bool:
        mine, other = (
            [(t.shape, t.dtype, t.device) for layer in layers for t in layer]
            for layers in (self.layers, _layers(cache))
        )
        return mine == other

    def give_to(self, cache: Any) -> None:
        """Let `cache` keep its contents here; an owner that is still in use gets a copy of its."""
        owner = self.owner()
        if owner is not None and owner is not cache and self._holds(owner):
            _attach(owner, [tuple(t.clone() for t in layer) for layer in self.layers])
        if not self._holds(cache):  # a new one, or beam search has put others in their place
            for mine, theirs in zip(self.layers, _layers(cache), strict=True):
                for target, source in zip(mine, theirs, strict=True):
                    target.copy_(source)
            _attach(cache, self.layers)
        self.owner = weakref.ref(cache)

    def _holds(self, cache: Any) -> bool:
        return all(
            ours is theirs
            for mine, other in zip(self.layers, _layers(cache), strict=True)
            for ours, theirs in zip(mine, other, strict=True)
        )


def _attach(cache: Any, memory: list[Any]) -> None:
    for layer, (keys, values, length) in zip(cache.layers, memory, strict=True):
        layer.keys, layer.values, layer.cumulative_length = keys, values, length


class _Step:
    """A captured step: its fixed inputs, its cache memory and its logits."""

    def __init__(
        self,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        cache: Any,
        record: Record,
    ) -> None:
        arguments = tree_map_only(Tensor, Tensor.clone, arguments)
        self.inputs = _tensors_in(arguments)
        self.memory = memory = _CacheMemory(cache)

        def run() -> Tensor:
            logits: Tensor = forward(**arguments, past_key_values=memory.cache).logits
            return logits

        lengths = [length.clone() for *_, length in self.memory.layers]
        for _ in range(WARM_UP):  # writes at its position what the replay will write there again
            run()
            self._set_lengths(lengths)
        self.replay, self.logits = record(run)
        self._set_lengths(lengths)

    def _set_lengths(self, lengths: list[Tensor]) -> None:
        for (*_, length), before in zip(self.memory.layers, lengths, strict=True):
            length.copy_(before)

    def __call__(self, arguments: dict[str, Any], cache: Any) -> Tensor:
        self.memory.give_to(cache)
        for mine, given in zip(self.inputs, _tensors_in(arguments), strict=True):
            mine.copy_(given)
        self.replay()
        return self.logits.clone()


def _tensors_in(arguments: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _kind(arguments: dict[str, Any]) -> object:
    """What two calls must agree on to share a captured step."""

    def describe(leaf: object) -> object:
        return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf

    return tree_map(describe, arguments)


_KNOWN = ("torch", "transformers", "mixbits")  # packages whose modules keep settings elsewhere


class _Captured:
    """The modules, tensors and settings that a captured step has been made of."""

    def __init__(self, model: nn.Module) -> None:
        self.places: list[tuple[dict[str, Any], str, Any]] = []
        self.hooks: list[dict[int, Any]] = []
        for module in model.modules():
            self._keep(module._modules, module._parameters, module._buffers)
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
            if isinstance(module, PackedLinear):
                self.places.append((vars(module), "backend", module.backend))
            if type(module).__module__.partition(".")[0] not in _KNOWN:  # adapters, for one
                inside = [value for value in vars(module).values() if type(value) is dict]
                self._keep(vars(module), *inside)
        self.counts = [len(hooks) for hooks in self.hooks]
        self.tensors = [x for *_, x in self.places if isinstance(x, Tensor)]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]

    def _keep(self, *owners: dict[str, Any]) -> None:
        self.places += [(owner, name, x) for owner in owners for name, x in owner.items()]

    def holds(self) -> bool:
        return (
            all(owner.get(name) is x for owner, name, x in self.places)
            and [len(hooks) for hooks in self.hooks] == self.counts
            and [tensor.data_ptr() for tensor in self.tensors] == self.addresses
        )


class GraphedForward:
    """A model's `forward` that replays one-token steps; the latest kind of step is kept."""

    def __init__(self, model: Any, record: Record = capture) -> None:
        self.forward: Callable[..., Any] = model.forward
        self._model = model
        self._captured: _Captured | None = None
        self.record = record
        self.works = True
        self._lock = threading.Lock()  # threads take turns with the one step's memory
        self._kind: object = None
        self._step: _Step | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("tokenizer", None)  # of generate, for stop strings: no model reads it
        if self._is_step(args, kwargs):
            with self._lock:
                logits = self._replayed(dict(kwargs))
            if logits is not None:
                from transformers.modeling_outputs import CausalLMOutputWithPast

                return CausalLMOutputWithPast(
                    logits=logits,
                    past_key_values=kwargs["past_key_values"],
                )
        return self.forward(*args, **kwargs)

    def _is_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        return (
            self.works
            and not args
            and isinstance(ids, Tensor)
            and ids.shape[1:] == (1,)
            and is_static(cache)
            and all(layer.is_initialized for layer in cache.layers)  # type: ignore[union-attr]
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states"))
            and kwargs.get("labels") is None
            and kwargs.get("return_dict") is not False
            and all(leaf is None or isinstance(leaf, _PLAIN) for leaf in tree_leaves(kwargs))
        )

    def _replayed(self, kwargs: dict[str, Any]) -> Tensor | None:
        """The step's logits, or None where it cannot be captured."""
        cache = kwargs.pop("past_key_values")
        kind = _kind(kwargs)
        if (
            self._step is None
            or kind != self._kind
            or not self._step.memory.fits(cache)
            or self._captured is None
            or not self._captured.holds()
        ):
            self._step = None  # its memory goes first
            lengths = [layer.cumulative_length.clone() for layer in cache.layers]
            try:
                self._step = _Step(self.forward, kwargs, cache, self.record)
            except RuntimeError as error:
                self.works = False
                for layer, length in zip(cache.layers, lengths, strict=True):
                    layer.cumulative_length.copy_(length)
                warnings.warn(f"no CUDA graphs: {first_line(error)}", stacklevel=3)
                return None
            self._kind, self._captured = kind, _Captured(self._model)
        return self._step(kwargs, cache)


_PLAIN = (Tensor, StaticCache, bool, int, float, str)


def why_not(model: Any) -> str | None:
    """None where steps of `model` may be captured, else one sentence that says why not."""
    if any(isinstance(m, Experts) or is_experts(m) for m in model.modules()):
        return "experts: their routing asks the host"
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=1)
    return None if is_static(cache) else "its cache is not all of one static kind"


# What `generate` is asked for with these is not compatible with a static cache, or is decided.
_OWN_CACHE = (
    *("past_key_values", "cache_implementation", "assistant_model", "prompt_lookup_num_tokens"),
    "custom_generate",
)


def _static_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`, with a static cache unless they are about the cache themselves.

    Nothing is compiled: transformers would else call torch.compile for a static cache.
    """
    config = kwargs.get("generation_config")
    decided = any(kwargs.get(n) is not None or getattr(config, n, None) for n in _OWN_CACHE)
    if decided or kwargs.get("use_cache") is False or getattr(config, "use_cache", True) is False:
        return kwargs
    return {"cache_implementation": "static", "disable_compile": True, **kwargs}


def use_graphs(model: Any, record: Record = capture) -> str | None:
    """Let `generate` use a static cache and replay its steps; returns why not, or None."""
    reason = why_not(model)
    if reason is not None:
        return reason
    graphed, plain_generate = GraphedForward(model, record), model.generate

    @functools.wraps(graphed.forward)  # generate looks at the names of its arguments
    def forward(*args: Any, **kwargs: Any) -> Any:
        return graphed(*args, **kwargs)

    @functools.wraps(plain_generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        return plain_generate(*args, **_static_cache(kwargs))

    model.forward, model.generate = forward, generate
    return None


def drop_graphs(model: nn.Module) -> None:
    """Undo `use_graphs`, and free what it holds."""
    for name in ("forward", "generate"):
        model.__dict__.pop(name, None)
