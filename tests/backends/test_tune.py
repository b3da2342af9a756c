"""The choice among a few configurations: the first, or the measured one, and what is remembered."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from mixbits.kernels import gemm, tune

from mixbits.formats.schemes import Format

CONFIGS = [("slow", 1), ("fast", 2), ("broken", 3)]


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """Tuning is on; returns the configurations that were measured."""
    measured = []

    def milliseconds(run):
        run()
        name = measured[-1][0]
        return {"slow": 2.0, "fast": 1.0}.get(name, float("inf"))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "_winners", {})
    monkeypatch.setattr(tune, "enabled", lambda: True)
    monkeypatch.setattr(tune, "_milliseconds", milliseconds)
    return measured


def test_off_it_is_the_first_and_nothing_runs(monkeypatch):
    monkeypatch.delenv("MIXBITS_AUTOTUNE", raising=False)
    monkeypatch.setattr(tune, "_winners", {})
    assert not tune.enabled()
    assert tune.choose("a", CONFIGS, lambda config: pytest.fail("ran")) == CONFIGS[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be measured")
def test_it_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("MIXBITS_AUTOTUNE", "1")
    assert not tune.enabled()


def test_the_fastest_is_measured_once_and_remembered(tuning, monkeypatch):
    for _ in range(2):
        assert tune.choose("a", CONFIGS, tuning.append) == CONFIGS[1]
    assert tuning == CONFIGS
    assert tune.choose("b", CONFIGS[:1], tuning.append) == CONFIGS[0]  # nothing to choose from
    assert tune.choose("c", CONFIGS[::-1], tuning.append) == CONFIGS[1]
    assert json.loads(tune.cache_file().read_text()) == dict.fromkeys("ac", "('fast', 2)")
    tuning.clear()
    monkeypatch.setattr(tune, "_winners", {})  # another process
    assert tune.choose("a", CONFIGS, tuning.append) == CONFIGS[1]
    assert tuning == []


def test_a_file_that_says_something_else_is_measured_over(tuning):
    path = tune.cache_file()
    path.parent.mkdir(parents=True)
    for text in ("no json", "[]", json.dumps({"a": "('gone', 9)"})):
        path.write_text(text)
        tune._winners.clear()
        assert tune.choose("a", CONFIGS, tuning.append) == CONFIGS[1]
    assert len(tuning) == 3 * len(CONFIGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4096, 4096), (64, 1024, 4096), (256, 70, 172)])
@pytest.mark.parametrize(
    "formats",
    [
        ["e2m1", 32],
        ["int4", 128],
        ["int2", 64],
        ["e4m3", 32, "e2m1", 32],
        ["int8", 128, "int4", 32],
    ],
    ids=str,
)
def test_every_candidate_fits_its_kernel(formats, shape, dtype):
    m, n, k = shape
    segments = tuple((Format(*pair), k) for pair in zip(*[iter(formats)] * 2, strict=True))
    for shared in (99 << 10, 227 << 10):  # of consumer GPUs, and of an H100
        configs = gemm.candidates(m, n, segments, dtype, shared)
        assert 1 <= len(configs) <= 4 and len(set(configs)) == len(configs)
        for config in configs:
            assert config.block_m >= min(m, 32) and config.block_m <= 128
            most = 0
            sizes = zip(segments, config.block_k, config.scale_first, strict=True)
            for (fmt, columns), block_k, scale_first in sizes:
                assert block_k % fmt.group_size == 0
                assert scale_first or block_k == fmt.group_size
                most += -(-columns // block_k)
                tile = block_k * (config.block_m * dtype.itemsize + config.block_n * fmt.bits / 8)
                values = config.block_n * block_k * dtype.itemsize
                assert config.num_stages >= 1 and config.num_stages * tile + values <= shared
            assert 1 <= config.split_k <= most
        assert configs is gemm.candidates(m, n, segments, dtype, shared)
