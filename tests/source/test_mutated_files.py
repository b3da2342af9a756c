"""Files of ours and others, changed at random: a result or one sentence, at once.

For a second or for MIXBITS_FUZZ_SECONDS; a failure prints its seed and the content.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from odd_files import CONFIG, packed_config

from mixbits.checkpoint.transformers_quantizer import read_config
from mixbits.errors import UsageError
from mixbits.formats.schemes import parse_scheme
from mixbits.measuring.scores import Scores, _digest
from mixbits.model.layout import LinearInfo
from mixbits.planning.plan import Plan, average_bits
from mixbits.source.source import open_source
from mixbits.source.weights import Files

LINEARS = [LinearInfo("a.q_proj", 4, 96, 0), LinearInfo("a.down_proj", 8, 172, 0)]
MODES = {"weight_scale_mode": "floor", "act_scale_mode": "floor"}


def a_plan() -> dict[str, Any]:
    slabs = {"MXFP8": "0,2", "MXFP4": "1"}
    order = list(reversed(range(96)))
    first: dict[str, Any] = {"unit": "q", "slabs": slabs, "order": order, "rotated": ["a.q_proj"]}
    units = [
        {**first, "linears": {"a.q_proj": "all"}},
        {"unit": "d", "scheme": "W4A16", "linears": {"a.down_proj": "all"}},
    ]
    told = {"mixbits_plan": 1, "strategy": "optimal", "budget": {"avg_bits": 5.0}, **MODES}
    return {**told, "predicted_loss": 0.5, "lower_bound": 0.4, "slab_columns": 32, "units": units}


def some_scores() -> dict[str, Any]:
    slabs = {i.name: {"MXFP4": [0.5] * -(-i.in_features // 32)} for i in LINEARS}
    calibration = {"source": "x", "nsamples": 2, "seqlen": 8, "prefix": [1], "sha256": "2" * 64}
    told = {"name": "m", "sha256": "1" * 64}
    data = Scores.build(slabs, LINEARS, "fisher", ("floor", "floor"), told, calibration).data
    data["linears"]["a.q_proj"]["order"] = list(range(96))
    return copy.deepcopy(data)


def use_plan(path: Path) -> None:
    plan = Plan.read(path, LINEARS)
    assert 0 < average_bits(LINEARS, plan.assignment) <= 17
    assert set(plan.assignment) <= {info.name for info in LINEARS}


def use_scores(path: Path) -> None:
    with suppress(ValueError):  # no JSON any more
        data = json.loads(path.read_text())
        if isinstance(data, dict):
            path.write_text(json.dumps({**data, "sha256": _digest(data)}))
    scores, scheme = Scores.read(path), parse_scheme("MXFP4")
    scores.check(path, LINEARS, [scheme], ("floor", "floor"), None)
    for info in LINEARS:
        losses = [scores.score(info.name, scheme), *scores.slab_scores(info.name, scheme, 64)]
        assert all(math.isfinite(loss) and loss >= 0 for loss in losses)
        order = scores.order(info.name)
        assert order is None or sorted(order) == list(range(info.in_features))


def use_packed(path: Path) -> None:
    assert all(recipe.packed for recipe in read_config(path.parent).recipes().values())


def use_model(path: Path) -> None:
    assert sum(p.numel() for p in open_source(str(path.parent)).shapes.parameters()) > 0


def use_weights(path: Path) -> None:
    for name, (dtype, shape) in Files([path]).headers.items():
        assert dtype.itemsize * math.prod(shape) <= path.stat().st_size, name


ODD: list[Any] = [None, True, False, 0, -1, 1, 2, 31, 33, 2**31, 2**63, 10**12, 10**30, -(2**70)]
ODD += [1.5, -0.5, math.nan, math.inf, 1e308, "", "x", "0", "0-99999999999", "9" * 20, "0-1,1"]
ODD += ["all", "MXFP4", "BF16", "\n", "\ud83d", "\0", "a" * 5000]
ODD += [[], {}, [[]], [None], {"": 0}, {"a": {}}]


def mutate(value: Any, rng: random.Random) -> Any:
    """The value with one of its parts, whichever, replaced, removed, doubled or renamed."""
    is_leaf = not isinstance(value, dict | list) or not value
    if is_leaf or rng.random() < 0.15:
        return copy.deepcopy(rng.choice(ODD))
    if isinstance(value, list):
        place = rng.randrange(len(value))
        way = rng.randrange(6)
        if way == 0:
            return value[:place] + value[place + 1 :]
        if way == 1:
            return value + value
        return [*value[:place], mutate(value[place], rng), *value[place + 1 :]]
    key = rng.choice(sorted(value))
    way = rng.randrange(8)
    if way == 0:
        return {k: v for k, v in value.items() if k != key}
    if way == 1:
        return {str(rng.choice(ODD)) if k == key else k: v for k, v in value.items()}
    return {k: mutate(v, rng) if k == key else v for k, v in value.items()}


def as_header(data: Any) -> bytes:
    text = json.dumps(data).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


def as_json(data: Any) -> bytes:
    return json.dumps(data).encode()


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
    "b": {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]},
}
TARGETS: dict[str, tuple[str, Callable[[], Any], Callable[[Any], bytes], Any]] = {
    "plan": ("plan.json", a_plan, as_json, use_plan),
    "scores": ("scores.json", some_scores, as_json, use_scores),
    "packed": ("config.json", packed_config, as_json, use_packed),
    "model": ("config.json", lambda: CONFIG, as_json, use_model),
    "weights": ("model.safetensors", lambda: HEADER, as_header, use_weights),
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Once in ten times, a byte is another, or the end is gone."""
    way = rng.randrange(20)
    if way == 0:
        return content[: rng.randrange(len(content) + 1)]
    if way == 1 and content:
        place = rng.randrange(len(content))
        return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    return content


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files(target: str, tmp_path: Path) -> None:
    """Any mutation is used rightly or refused in one sentence, soon and with little memory."""
    name, make, write, use = TARGETS[target]
    path = tmp_path / name
    path.write_bytes(write(make()))
    use(path)  # as it is
    seed = int(os.environ.get("MIXBITS_FUZZ_SEED", "0")) or random.randrange(1 << 32)
    rng, refused = random.Random(seed), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.monotonic() + float(os.environ.get("MIXBITS_FUZZ_SECONDS", "1")) / len(TARGETS)

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"no end: seed {seed}: {content[:2000]!r}")

    handler = signal.signal(signal.SIGALRM, stop)
    try:
        for count in range(1_000_000):
            if count >= 5 and time.monotonic() > end:
                break
            data = make()
            for _ in range(rng.choice((1, 1, 2, 4))):
                data = mutate(data, rng)
            content = damaged(write(data), rng)
            path.write_bytes(content)
            signal.alarm(60)
            try:
                use(path)
            except UsageError as error:
                said, refused = str(error), refused + 1
                assert "\n" not in said and len(said) < 1000, f"seed {seed}: {said}"
            except Exception as error:
                pytest.fail(f"seed {seed}, {target}: {error!r} of {content[:4000]!r}")
            signal.alarm(0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 20, f"seed {seed}: {grown} kB"
    assert refused
    print(f"{target}: {count} mutations, {refused} refused")
