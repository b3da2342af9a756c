"""`python -m mixbits.info` says what there is, and why the rest is not."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest
import torch

import mixbits
from mixbits import info, ops
from mixbits.formats.menus import MENUS
from mixbits.formats.schemes import parse_scheme


def test_it_prints_versions_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    out = capsys.readouterr().out
    assert out.startswith(f"mixbits {mixbits.__version__}, Python {sys.version.split()[0]}")
    for package in ("torch", "transformers", "safetensors"):
        assert re.search(
            rf"^  {package} +{re.escape(importlib.metadata.version(package))}$", out, re.M
        )
    assert f"threads   {torch.get_num_threads()} (OMP_WAIT_POLICY passive)\n" in out
    for name, why in ops.backends().items():
        state = "on" if why is None else re.escape(f"off: {why}")
        assert re.search(rf"^  {name} +{state}$", out, re.M)
    assert re.search(r"^  reference +on$", out, re.M)


def test_a_package_that_is_missing_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "_PACKAGES", ("no-such-package",))
    info.main([])
    assert "  no-such-package not installed\n" in capsys.readouterr().out


def test_a_backend_that_is_off_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mixbits.backends import cpu

    monkeypatch.setattr(cpu, "why_unavailable", lambda: "it was not built")
    info.main([])
    out = capsys.readouterr().out
    assert re.search(r"^  cpu +off: it was not built$", out, re.M)
    assert "cpu kernels use" not in out


def test_it_says_which_way_a_product_takes(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--matmul", "64x128"])
    out = capsys.readouterr().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"products with a packed [64, 128] on {device}\n" in out
    backend = ops.choose_backend(device, None)
    assert len(re.findall(rf"^  (?:MXFP|W)\w+ +M=\d+ +{backend}", out, re.M)) == 25
    with pytest.raises(SystemExit):
        info.main(["--matmul", "64"])


def test_it_lists_schemes_and_menus(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--schemes"])
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    for name in (*info._USUAL, *(name for menu in MENUS.values() for name in menu)):
        assert parse_scheme(name).name == name
        assert name in rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = ops.choose_backend(device, None)
    assert re.search(
        rf"^  MXFP4A16 +4\.2500 +{backend} +compressed-tensors, vllm, gguf$", out, re.M
    )
    assert re.search(r"^  NVFP4 +4\.5000 +\w+ ", out, re.M)
    assert re.search(r"^  w4a4 +MXFP4, NVFP4, MXFP6, MXFP8$", out, re.M)


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mixbits.info"], capture_output=True, text=True, check=True
    )
    assert "backends\n" in done.stdout and done.stderr == ""
