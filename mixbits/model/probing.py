"""Let something else stand for a model's linears: what measures them, or rounds them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .experts import expert_bias, expert_slice, is_experts, loop_of
from .layout import LinearInfo, linear_weight, split_expert_name
from .streaming import patched

# x [M, K], weight [N, K], bias -> y [M, N], leaving its record behind
Probe = Callable[[str, Tensor, Tensor, "Tensor | None"], Tensor]


@contextmanager
def probed(model: nn.Module, linears: Sequence[LinearInfo], probe: Probe) -> Iterator[None]:
    """Let every linear, and every expert, run through `probe` for the duration."""
    names = {info.name for info in linears}
    experts = {split_expert_name(info.name)[0] for info in linears if info.is_expert}

    def plain(name: str, linear: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            weight = linear_weight(linear)  # the one that is resident now
            assert weight is not None
            return probe(name, x, weight, linear.bias)

        return run

    def routed(name: str, module: Any) -> Callable[..., Tensor]:
        def linear(expert: int, projection: str, x: Tensor) -> Tensor:
            weight, bias = (f(module, expert, projection) for f in (expert_slice, expert_bias))
            assert weight is not None
            return probe(f"{name}.{expert}.{projection}", x, weight, bias)

        return functools.partial(loop_of(module), linear)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in names:
                stack.enter_context(patched(module, plain(name, module)))
            elif name in experts and is_experts(module):
                stack.enter_context(patched(module, routed(name, module)))
        yield
