"""Which backend an operation runs on: the one that is asked for, or the best that can.

A backend that has no code for a format is never given it: the next best takes the call, where none
was asked for by name.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..formats.schemes import Format

BACKENDS = ("cuda", "triton", "cpu", "reference")
_PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


@functools.cache
def module_of(name: str) -> Any:
    return importlib.import_module(f"mixbits.backends.{name}")


def backends() -> dict[str, str | None]:
    """Every backend's name -> None when it can be used, else why it cannot."""
    return {name: module_of(name).why_unavailable() for name in BACKENDS}


@functools.cache
def choose_backend(device_type: str, requested: str | None) -> str:
    """The name of the backend for tensors on `device_type` ("cpu", "cuda").

    `requested` names one, or is None for the best there is. Raises UsageError that says why when
    it cannot be used.
    """
    if requested is None:
        candidates = _PREFERENCE.get(device_type, ("reference",))
        return next(name for name in candidates if module_of(name).why_unavailable() is None)
    if requested not in BACKENDS:
        raise UsageError(f"backend must be one of {', '.join(BACKENDS)}: got {requested!r}")
    why = module_of(requested).why_unavailable()
    if why is not None:
        raise UsageError(f"backend {requested!r} cannot be used: {why}")
    if not module_of(requested).supports(torch.device(device_type)):
        raise UsageError(f"backend {requested!r} cannot be used for tensors on {device_type}")
    return requested


def requested_backend(backend: str | None) -> str | None:
    return backend or os.environ.get("MIXBITS_BACKEND") or None


def _lacking(name: str, formats: Iterable[int], decoded: Iterable[int]) -> list[Format]:
    module = module_of(name)
    decodes = getattr(module, "decodes", module.holds)
    missing = [fmt for fmt in map(Format.from_code, decoded) if not decodes(fmt)]
    return missing + [fmt for fmt in map(Format.from_code, formats) if not module.holds(fmt)]


def holder(
    device_type: str,
    requested: str | None,
    formats: Sequence[Format],
    decoded: Sequence[Format] = (),
) -> str:
    """`choose_backend` among those that hold all `formats`; the one requested, or none.

    Packed weights in `decoded` are read only, for which a backend may have `decodes(fmt)`.
    """
    codes = tuple([fmt.code for fmt in formats]), tuple([fmt.code for fmt in decoded])
    return _holder(device_type, requested, *codes)


@functools.cache  # of numbers, which are hashed at once: every product asks
def _holder(
    device_type: str,
    requested: str | None,
    formats: tuple[int, ...],
    decoded: tuple[int, ...],
) -> str:
    chosen = choose_backend(device_type, requested)
    lacking = _lacking(chosen, formats, decoded)
    if not lacking:
        return chosen
    if requested is not None:
        raise UsageError(f"backend {requested!r} cannot take {lacking[0]}")
    others = _PREFERENCE.get(device_type, ("reference",))
    left = others[others.index(chosen) + 1 :]
    able = (n for n in left if module_of(n).why_unavailable() is None)
    return next(n for n in able if not _lacking(n, formats, decoded))


def backend_for(
    x: Tensor,
    requested: str | None,
    formats: Sequence[Format],
    decoded: Sequence[Format] = (),
) -> Any:
    if requested is not None and not isinstance(requested, str):
        raise TypeError(f"backend must be the name of one, or None: got {requested!s:.80}")
    return module_of(holder(x.device.type, requested_backend(requested), formats, decoded))


def by_holder(
    x: Tensor,
    formats: Sequence[Format],
    backend: str | None,
    call: Callable[[Any, list[Format]], Tensor],
    shared: int = 0,
) -> Tensor:
    """Rows of `call(backend, formats)`, one of each format, each from the best that holds it.

    The first `shared` rows are of no format, and alike whoever is asked.
    """
    groups: dict[Any, list[int]] = {}
    for place, fmt in enumerate(formats):
        groups.setdefault(backend_for(x, backend, (fmt,)), []).append(place)
    if len(groups) < 2:
        return call(next(iter(groups), None) or backend_for(x, backend, ()), list(formats))
    rows: list[Tensor] = [x] * len(formats)
    for module, places in groups.items():
        found = call(module, [formats[place] for place in places])
        for place, row in zip(places, found[shared:], strict=True):
            rows[place] = row
    return torch.stack([*found[:shared], *rows])
