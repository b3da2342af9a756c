"""Small copies of a module with random weights: they show what its own code computes.

A model may have no storage yet, or hundreds of gigabytes of it; what its modules compute shows as
well with random weights of a few columns. So a copy keeps classes, settings and code, and gets
tensors of its own. Numbers among the settings that are sizes of the original (`hidden_size`,
`num_experts`) become those of the copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 128  # sizes above this are worth shrinking
_FEWEST = 16  # columns of a copy
_MOST = 1 << 24  # weights of a copy whose sizes have no common divisor

MakeTensor = Callable[[Tensor], Tensor]


def copy_module(module: nn.Module, make: MakeTensor, sizes: Mapping[int, int]) -> Any:
    """A copy whose tensors are what `make` gives for the module's own; settings are shared.

    `sizes` maps whole numbers among the settings to those of the copy. Hooks stay behind.
    """
    made: dict[int, Any] = {}

    def tensor(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if id(value) not in made:
            new = make(value)
            is_parameter = isinstance(value, nn.Parameter)
            made[id(value)] = nn.Parameter(new, requires_grad=False) if is_parameter else new
        found: Tensor = made[id(value)]
        return found

    def module_copy(one: nn.Module | None) -> nn.Module | None:
        if one is None:
            return None
        if id(one) not in made:
            twin: Any = type(one).__new__(type(one))
            made[id(one)] = twin
            twin.__dict__ = {k: _resized(v, sizes) for k, v in one.__dict__.items()}
            for name in [n for n in one.__dict__ if n.endswith("_hooks") and n.startswith("_")]:
                twin.__dict__[name] = type(one.__dict__[name])()
            twin.__dict__["_parameters"] = {k: tensor(v) for k, v in one._parameters.items()}
            twin.__dict__["_buffers"] = {k: tensor(v) for k, v in one._buffers.items()}
            twin.__dict__["_modules"] = {k: module_copy(v) for k, v in one._modules.items()}
            twin.__dict__["training"] = False
        found: nn.Module = made[id(one)]
        return found

    return module_copy(module)


def _resized(value: Any, sizes: Mapping[int, int]) -> Any:
    if type(value) is int:
        return sizes.get(value, value)
    if type(value) is tuple or isinstance(value, torch.Size):
        return tuple(_resized(v, sizes) for v in value)
    return value


def small_sizes(*sizes: int) -> dict[int, int]:
    """Smaller numbers in the same proportions, of which one may be twice another; {} if none.

    With them, their doubles: gate and up projections may lie in one tensor.
    """
    divisor = math.gcd(*sizes)
    factor = -(-_FEWEST // (min(sizes) // divisor))
    if max(sizes) <= LARGE or factor >= divisor:
        return {}
    small = {s: s // divisor * factor for s in sizes}
    return {2 * s: 2 * n for s, n in small.items()} | small


@contextmanager
def plain_numbers() -> Iterator[None]:
    """float32 on the CPU, without gradients, whatever is set: models are built amid other settings.

    What a small copy computes is to be computed within this.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)


def random_copy(module: nn.Module, sizes: Mapping[int, int]) -> Any:
    """`copy_module` with random float32 tensors on the CPU, always the same ones.

    Raises ValueError where it would still be large.
    """
    generator = torch.Generator().manual_seed(0)
    left = _MOST

    def make(tensor: Tensor) -> Tensor:
        nonlocal left
        shape = [sizes.get(size, size) for size in tensor.shape]
        left -= math.prod(shape)
        if left < 0:
            raise ValueError("too large to be copied")
        if tensor.dtype == torch.bool:
            return torch.rand(shape, generator=generator) < 0.5
        if not tensor.is_floating_point():
            return torch.randint(0, 2, shape, generator=generator).to(tensor.dtype)
        values = torch.randn(shape, generator=generator)
        return values / math.sqrt(shape[-1]) if len(shape) > 1 else values + 0.5

    return copy_module(module, make, sizes)


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules of the same classes, sizes and settings: they compute the same."""
    return tuple(
        (
            name,
            type(part),
            type(part).forward,
            *((n, *p.shape) for n, p in part._parameters.items() if p is not None),
            *((n, *b.shape) for n, b in part._buffers.items() if b is not None),
            *((k, _comparable(v)) for k, v in part.__dict__.items() if not k.startswith("_")),
        )
        for name, part in module.named_modules()
    )


def _comparable(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_comparable, value))
    return type(value), id(value)


def same(one: Any, other: Any, tolerance: float) -> bool:
    """Whether results are the same: every tensor finite, and its values within `tolerance` of the
    largest."""
    pairs = list(zip(_tensors(one), _tensors(other), strict=True))
    return bool(pairs) and all(
        a.shape == b.shape
        and bool(torch.isfinite(b).all())
        and bool((a - b).abs().max() <= tolerance * b.abs().max())
        for a, b in pairs
    )


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value.double()
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
