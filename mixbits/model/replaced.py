"""Another's function, or setting, stands aside for a while: every such patch is made here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner.name` be `value`, for the duration; `owner` is an object or a module.

    Afterwards it is as it was: what the owner had from its class comes from there again. Threads
    see it too, so that whoever calls this must know that none uses the owner.
    """
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
