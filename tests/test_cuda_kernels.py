"""The CUDA kernels run: their own source as host code, on any machine, and on a GPU.

tests/emulation stands in for the CUDA headers and for csrc/cuda/ptx.cuh. What it shows is that
indexing, fragment layouts, swizzles and the order of barriers are right; what only a GPU can show
is that the instructions do what the stand-in takes them to do, and speed.
"""

import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import nullcontext
from pathlib import Path

import pytest
import test_triton as checks
import torch
from conftest import FORMATS, INT_FORMATS, MX_FORMATS, assert_same_bits, format_id
from torch import Tensor

from mixbits import pack, reference
from mixbits.backends import cuda
from mixbits.formats import INTEGERS, MINIFLOATS, Format

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")
needs_gpu = pytest.mark.skipif(
    cuda.why_unavailable() is not None, reason=f"cuda backend: {cuda.why_unavailable()}"
)

# --- emulate ---------------------------------------------------------------------------------

LAUNCH = re.compile(r"([\w:]+(?:<[^;<>]*>)?)\s*<<<(.*?),([^,]*),([^,]*)>>>\s*\((.*?)\);", re.DOTALL)
DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")


def build_emulation(folder: Path) -> Path:
    """Compiles csrc/cuda for the host into `folder`; the path of the extension module."""
    import pybind11

    shutil.copytree(CSRC, folder / "csrc")
    for header in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"):
        (folder / header).write_text('#pragma once\n#include "stand_in.h"\n')
    shutil.copy(TESTS / "emulation/stand_in.h", folder)
    shutil.copy(TESTS / "emulation/ptx.cuh", folder / "csrc/cuda")
    include = (folder, folder / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-w", "-DMB_WGMMA"]
    command += [f"-I{path}" for path in include]
    sources = [folder / "csrc/bindings_cuda.cpp"]
    for path in sorted((folder / "csrc/cuda").glob("*.cu")):
        text = LAUNCH.sub(r"emulate::launch(\2,\3, [=] { \1(\5); });", path.read_text())
        text = DYNAMIC.sub(r"\1* \2 = emulate::shared<\1>();", text)
        sources.append(path.with_suffix(".cpp"))
        sources[-1].write_text(text)
    objects = [str(source.with_suffix(".o")) for source in sources]
    for source, target in zip(sources, objects, strict=True):
        subprocess.run([*command, "-c", str(source), "-o", target], check=True)
    library = folder / f"_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    subprocess.run(["g++", "-shared", *objects, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """The extension module of the kernels as host code."""
    pytest.importorskip("pybind11")
    library = build_emulation(tmp_path_factory.mktemp("emulation"))
    before = sys.modules.get("mixbits._cuda")
    spec = importlib.util.spec_from_file_location("mixbits._cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("mixbits._cuda", None)
    if before is not None:
        sys.modules["mixbits._cuda"] = before
    return module


@pytest.fixture
def emulated(emulation, monkeypatch):
    """The cuda backend on CPU tensors: the emulated kernels of an H100, no stream, no device."""
    monkeypatch.setattr(cuda, "_native", lambda: emulation)
    monkeypatch.setattr(cuda, "_stream", lambda x: 0)
    monkeypatch.setattr(cuda, "_device_facts", lambda device: ((9, 0), 132))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return cuda
CPU = torch.device("cpu")
EMULATED_FORMATS = [MX_FORMATS[0], MX_FORMATS[4], MX_FORMATS[8]]
EMULATED_FORMATS += [f for f in INT_FORMATS if f.symmetric == (f.group_size == 64)]
each_emulated_format = pytest.mark.parametrize("fmt", EMULATED_FORMATS, ids=format_id)


@pytest.mark.slow
@needs_gpp
@pytest.mark.parametrize("columns", [33, 640])
@each_emulated_format
def test_emulated_round_trip(emulated, fmt, columns):
    checks.check_round_trip(emulated, CPU, fmt, columns)


@pytest.mark.slow
@needs_gpp
@pytest.mark.parametrize("shape", [(1, 5, 33), (3, 17, 172), (11, 18, 640), (17, 9, 64)], ids=str)
@pytest.mark.parametrize("element", [*MINIFLOATS, *INTEGERS])
def test_emulated_matmul(emulated, element, shape, monkeypatch):
    monkeypatch.setattr(cuda, "SCRATCH_BYTES", 4 * 64 * 4)  # four float32 rows: several blocks
    fmt = Format(element, 32, symmetric=element in MINIFLOATS)
    checks.check_matmul(emulated, CPU, fmt, shape)


@pytest.mark.slow
@needs_gpp
@pytest.mark.parametrize("element", MINIFLOATS)
def test_emulated_codes_and_scales(emulated, element):
    checks.check_all_codes_and_scales(emulated, CPU, element)


@pytest.mark.slow
@needs_gpp
def test_emulated_statistics(emulated):
    checks.check_statistics(emulated, CPU, 172, FORMATS[5:22])  # 17 formats: two passes


@pytest.mark.slow
@needs_gpp
def test_emulated_empty(emulated):
    checks.check_empty(emulated, CPU, INT_FORMATS[1])


# --- GPU -------------------------------------------------------------------------------------

GPU = torch.device("cuda")


@needs_gpu
@pytest.mark.parametrize("columns", [1, 33, 172, 640])
@checks.each_format
def test_round_trip(fmt, columns):
    checks.check_round_trip(cuda, GPU, fmt, columns)


@needs_gpu
@pytest.mark.parametrize("element", MINIFLOATS)
def test_codes_and_scales(element):
    checks.check_all_codes_and_scales(cuda, GPU, element)


@needs_gpu
@pytest.mark.parametrize("columns", [31, 172, 4096])
def test_statistics(columns):
    checks.check_statistics(cuda, GPU, columns)


@needs_gpu
@pytest.mark.parametrize(
    "shape", [(1, 5, 33), (3, 64, 256), (16, 70, 172), (118, 65, 640)], ids=str
)
@checks.each_format
def test_matmul(fmt, shape):
    checks.check_matmul(cuda, GPU, fmt, shape)


@needs_gpu
@pytest.mark.parametrize("tokens", [3, 40])
def test_graph_replay(tokens):
    """A captured product gives the bits of an eager one, on new input in the same place."""
    fmt = MX_FORMATS[0]
    packed = cuda.quantize_pack(torch.randn(256, 512, device=GPU), fmt)
    x = torch.randn(tokens, 512, device=GPU, dtype=torch.bfloat16)
    cuda.packed_matmul(x, packed, fmt, fmt)  # cuBLAS sets itself up outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.packed_matmul(x, packed, fmt, fmt)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, cuda.packed_matmul(x, packed, fmt, fmt))
