"""Which of a few configurations a kernel runs with.

The first one, unless MIXBITS_AUTOTUNE=1: then each is compiled and timed once for every kind of
call, and the winners are kept in a file beside Triton's own cache. That takes a second or so per
kind. It is off by default because another configuration may add in another order: results would
then depend on a stopwatch, in their last digits.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

import triton
from triton.testing import do_bench

Config = TypeVar("Config", bound=tuple)

_winners: dict[str, int] = {}


def enabled() -> bool:
    """Whether to measure: asked for, on a GPU, and not while a CUDA graph is being captured."""
    asked = os.environ.get("MIXBITS_AUTOTUNE") == "1" and torch.cuda.is_available()
    return asked and not torch.cuda.is_current_stream_capturing()


def cache_file() -> Path:
    """Winners by device and Triton's version: neither says anything about another."""
    folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    name = f"mixbits-{device}-triton{triton.__version__}.json"
    return Path(folder) / name.replace(" ", "_").replace("/", "_")


def _read() -> dict[str, str]:
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(key: str, config: object) -> None:
    """Add one winner to the file; a run beside this one may lose its own, and measures again."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({**_read(), key: repr(config)}, indent=1), encoding="utf-8")
    temporary.replace(path)


def _milliseconds(run: Callable[[], object]) -> float:
    """Median of the call; infinite where it does not compile or fit."""
    try:
        return float(do_bench(run, warmup=5, rep=20, return_mode="median"))
    except (RuntimeError, triton.TritonError):  # too much shared memory, a compiler's failure
        return float("inf")


def choose(key: str, configs: Sequence[Config], run: Callable[[Config], object]) -> Config:
    """The configuration for calls of the kind `key`: measured once where tuning is on."""
    if key not in _winners:
        if len(configs) == 1 or not enabled():
            return configs[0]
        names = [repr(config) for config in configs]
        known = _read().get(key)
        if known in names:
            _winners[key] = names.index(known)
        else:
            times = [_milliseconds(lambda config=config: run(config)) for config in configs]
            _winners[key] = times.index(min(times))
            _remember(key, configs[_winners[key]])
    return configs[_winners[key]]
