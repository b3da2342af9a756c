"""Which parameters of a model touch its residual stream, and how: seen in runs of a small copy.

The *stream* is the sum that goes from block to block. A module

    reads    where each row that it is given is one of the stream, or of what a norm made of it, but
             for a factor of the row
    writes   where what is added to its output is added, but for a factor of the row, to what the
             next norm reads

A norm is one of the stream's where a row that is added to the embeddings, far larger than all
else, is nearly all that it reads. Nothing is told by names. A module that does neither is the
inside of a block, whatever its width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .experts import layout_of
from .layout import CausalLM
from .recognise import is_conv1d, linear_weight

TOKENS = (2, 24)
_SAME = 1e-4  # of a row's length: float32, through a few products
_HUGE = 1e6


@dataclass(frozen=True)
class Touch:
    """A parameter's `axis` runs along the stream: it is read, after `norm` if any, or written."""

    parameter: str
    axis: int
    reads: bool = False
    norm: str | None = None


@dataclass(frozen=True)
class Stream:
    """`norms`: names of those that read the stream for others; `whys`: what cannot be folded."""

    touches: list[Touch]
    norms: list[str]
    whys: list[str]


@dataclass
class _Call:
    """Of a module: what it was given and what it made, [rows, width], None of another width."""

    name: str
    given: Tensor | None
    made: Tensor | None


def token_ids(model: CausalLM) -> Tensor:
    """The tokens that a small model is tried on, int64 [2, 24]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        0, model.get_input_embeddings().weight.shape[0], TOKENS, generator=generator
    )


def logits_of(model: CausalLM) -> Tensor:
    logits: Tensor = model(input_ids=token_ids(model), use_cache=False).logits
    return logits


def stream_of(model: CausalLM) -> Stream:
    """What touches the stream of a small model, whose numbers must be random."""
    probe = _Probe(model)
    calls = probe.run()
    of_stream = probe.stream_norms()
    normed = {c.name: c.made for c in calls if c.name in of_stream and c.made is not None}
    raw = [c.given for c in calls if c.name in of_stream and c.given is not None]
    sources = {
        c.name: found
        for c in calls
        if c.name not in normed and (found := _source(c.given, normed, raw)) is not None
    }
    norms = [name for name in normed if name in sources.values()]
    writers = [c.name for c in calls if c.made is not None and probe.writes(c.name, norms, calls)]
    whys = [f"{name} takes no part where there is text alone" for name in probe.idle(calls)]
    whys += [f"{n} stands between a block and the stream" for n in writers if n in probe.norms]
    if not norms:
        whys.append("no norm with a weight reads what its blocks add up")
    touches: list[Touch] = []
    for name in dict.fromkeys([*sources, *writers]):
        own = _touches(probe, name, sources.get(name), name in writers)
        if own is None:
            whys.append(f"what {name} does with the stream is not known")
        touches.extend(own or ())
    return Stream(touches, norms, whys)


def _row(width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(2))


def _source(given: Tensor | None, normed: dict[str, Tensor], raw: list[Tensor]) -> str | None:
    """The norm that made what a module reads, "" for the stream itself; None for neither."""
    if given is None:
        return None
    for name, rows in normed.items():
        if _are_rows_of(given, rows):
            return name
    return "" if any(_are_rows_of(given, rows) for rows in raw) else None


def _unit(rows: Tensor) -> Tensor:
    lengths = rows.norm(dim=-1, keepdim=True)
    return (rows / lengths)[lengths[:, 0] > 0]


def _are_rows_of(given: Tensor, rows: Tensor) -> bool:
    cosines = _unit(given) @ _unit(rows).T
    return bool(len(cosines)) and bool((cosines.abs().max(-1).values > 1 - _SAME).all())


def _touches(probe: _Probe, name: str, source: str | None, writes: bool) -> list[Touch] | None:
    """The parameters of a module that reads (from `source`) or writes; None where it is unclear."""
    module, width = probe.modules[name], probe.width

    def touch(parameter: str, axis: int, reads: bool) -> Touch:
        return Touch(f"{name}.{parameter}", axis, reads, (source or None) if reads else None)

    if linear_weight(module) is not None:
        columns = 0 if is_conv1d(module) else 1
        found = [touch("weight", columns, True)] if source is not None else []
        found += [touch("weight", 1 - columns, False)] if writes else []
        return found + ([touch("bias", 0, False)] if writes and module.bias is not None else [])
    layout = layout_of(module)
    if layout is not None:
        found = []
        for stack in layout.stacks:
            is_bias = stack.endswith("_bias")
            is_down = stack.removesuffix("_bias") == layout.names.down
            if is_down:
                found.append(touch(stack, 1 if is_bias or not layout.transposed else 2, False))
            elif not is_bias:
                found.append(touch(stack, 1 if layout.transposed else 2, True))
        return found if writes and source is not None else None
    if writes and source is not None:
        return None
    found = []
    for own, parameter in module.named_parameters(recurse=False):
        axes = [axis for axis, size in enumerate(parameter.shape) if size == width]
        if len(axes) > 1 or (not axes and parameter.dim() > 1):
            return None
        found += [touch(own, axis, not writes) for axis in axes]
    return found


class _Probe:
    """Runs a model, and sees what goes into its modules and comes out, or changes that."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.width = model.get_input_embeddings().weight.shape[-1]
        self.modules: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if any(self.width in p.shape for p in module.parameters(recurse=False))
        }
        self.norms = {name for name, module in self.modules.items() if self._is_norm(module)}

    def _is_norm(self, module: nn.Module) -> bool:
        own = dict(module.named_parameters(recurse=False))
        shapes = [tuple(p.shape) for p in own.values()]
        return {"weight"} <= own.keys() <= {"weight", "bias"} and set(shapes) == {(self.width,)}

    def run(self, change: Callable[[str, Tensor], Tensor] = lambda name, y: y) -> list[_Call]:
        """One run; `change` may make another output of a module's."""
        calls: list[_Call] = []
        with self._hooked(calls, change):
            logits_of(self.model)
        return calls

    @contextmanager
    def _hooked(
        self, calls: list[_Call], change: Callable[[str, Tensor], Tensor]
    ) -> Iterator[None]:
        def hook(name: str) -> Callable[..., Any]:
            def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
                given = next(filter(self._is_wide, (*args, *kwargs.values())), None)
                if not self._is_wide(output):
                    calls.append(_Call(name, self._rows(given), None))
                    return output
                calls.append(_Call(name, self._rows(given), self._rows(output)))
                return change(name, output)

            return after

        handles = [
            module.register_forward_hook(hook(name), with_kwargs=True)
            for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _is_wide(self, value: Any) -> bool:
        is_floating = isinstance(value, Tensor) and value.is_floating_point()
        return is_floating and value.dim() > 1 and value.shape[-1] == self.width

    def _rows(self, value: Any) -> Tensor | None:
        return None if value is None else value.detach().reshape(-1, self.width).clone()

    def stream_norms(self) -> set[str]:
        """Norms that read the sum of embeddings and blocks."""
        embedding = self.model.get_input_embeddings()
        added = _row(self.width)
        calls = self.run(lambda n, y: y + _HUGE * added if self.modules[n] is embedding else y)
        return {
            c.name
            for c in calls
            if c.name in self.norms and c.given is not None and _are_rows_of(c.given, added[None])
        }

    def idle(self, calls: list[_Call]) -> Iterator[str]:
        """Modules that are not called, and whose parameters nothing else reads."""
        before = logits_of(self.model)
        for name in sorted(self.modules.keys() - {call.name for call in calls}):
            own = list(self.modules[name].parameters(recurse=False))
            values = [p.data for p in own]
            for parameter in own:
                parameter.data = parameter.data + 1
            same = torch.equal(logits_of(self.model), before)
            for parameter, value in zip(own, values, strict=True):
                parameter.data = value
            if same:
                yield name

    def writes(self, name: str, norms: list[str], before: list[_Call]) -> bool:
        """Whether what is added to a module's output reaches the next norm as it is.

        `before` are the calls without that.
        """
        added = _row(self.width)
        after = self.run(lambda n, y: y + added if n == name else y)
        seen = False
        for old, new in zip(before, after, strict=True):
            if seen and old.name in norms and old.given is not None and new.given is not None:
                moved = new.given - old.given
                if moved.abs().max() > _SAME * old.given.abs().max():
                    return _are_rows_of(moved, added[None])
            seen = seen or old.name == name
        return False
