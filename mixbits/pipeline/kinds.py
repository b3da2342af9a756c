"""What values of settings are: text of the command line, or values of Python, made what is needed.

Each parser takes either, and raises `WrongKind`, whose sentence follows the name of the option.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..formats.menus import expanded

LEAST_BYTES = 10_000  # of a model's files; a size below that has lost its unit


class WrongKind(argparse.ArgumentTypeError, ValueError):
    """A value that is none of its kind: `must be ...: got ...`."""


def _number(
    kind: type[int] | type[float], fits: Callable[[float], bool], what: str
) -> Callable[[Any], Any]:
    def parse(value: Any) -> int | float:
        try:
            if isinstance(value, bool) or (kind is int and isinstance(value, float)):
                raise ValueError
            found = kind(value)
        except (ValueError, TypeError, OverflowError):
            found = None
        if found is None or not fits(found):
            raise WrongKind(f"must be {what}: got {value!r}")
        return found

    return parse


bits = _number(float, lambda v: 0 < v <= 16, "above 0 and at most 16")
nats = _number(float, lambda v: 0 < v < math.inf, "a number above 0")
share = _number(float, lambda v: 0 <= v <= 1, "between 0 and 1")
positive = _number(int, lambda v: v >= 1, "a whole number of at least 1")


def whole(value: Any) -> int:
    """A whole number, which may be negative."""
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        return int(value)
    except (ValueError, TypeError) as error:
        raise WrongKind(f"invalid int value: {value!r}") from error


def size(value: Any) -> int:
    """Bytes, of `4.2GB`, `800MiB`, or a number of them."""
    text = str(value).strip()
    match = re.fullmatch(r"([\d.]+)\s*(|k|M|G|T)(i?)(B?)", text)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match and not (match[2] or match[4]) and 0 < number < LEAST_BYTES:
        raise WrongKind(f"must have a unit: got {value!r} ({text}GB?)")
    if match is None or not number > 0:
        raise WrongKind(f"must be a size such as 4.2GB or 800MiB: got {value!r}")
    return int(number * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


def path(value: Any) -> Path:
    if not isinstance(value, (str, Path)):
        raise WrongKind(f"must be a path: got {value!r:.160}")
    return Path(value)


class DatasetName(str):
    """A dataset's name as it was typed: whatever it looks like, it is no text to read."""

    __slots__ = ()


def datasets(value: Any) -> tuple[str, ...]:
    """Names of datasets, one or several; a comma may be part of one."""
    found = tuple(value) if _is_several(value) else (value,)
    if not found or not all(isinstance(name, (str, Path)) for name in found):
        raise WrongKind(f"must be a name, or several: got {value!r:.160}")
    return tuple(map(str, found))


def words(value: Any) -> tuple[str, ...]:
    """One text, or several."""
    found = (value,) if isinstance(value, str) else tuple(value) if _is_several(value) else None
    if found is None or not all(isinstance(word, str) for word in found):
        raise WrongKind(f"must be texts: got {value!r:.160}")
    return found


def names(value: Any) -> tuple[str, ...]:
    """Names, one text with commas between them or several texts."""
    return tuple(name for word in words(value) for name in word.split(","))


def scheme_names(value: Any) -> tuple[str, ...]:
    """Names of schemes and of menus, as `names`; those of a menu in its place."""
    return expanded(names(value))


def _is_several(value: Any) -> bool:
    return isinstance(value, (list, tuple))
