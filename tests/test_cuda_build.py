"""The CUDA kernels, as far as a machine without a GPU can tell, and on a GPU.

compile   nvcc builds every file for sm_80 and sm_90a: no spills, registers within limits
numerics  csrc/formats.h, compiled by the host compiler, over all codes and scales
emulate   the kernels' own source, compiled by the host compiler with a small stand-in for
          the CUDA headers, runs every operation through mixbits/backends/cuda.py on the CPU.
          The lanes of a warp are coroutines; shuffles and barriers switch between them, and
          a lane that others wait for in vain is reported as a deadlock
GPU       the same checks on a device, and the replay of a CUDA graph
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

from mixbits import reference
from mixbits.backends import cuda
from mixbits.formats import INTEGERS, MINIFLOATS, Format

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted(CSRC.glob("cuda/*.cu"))
# Registers per thread: 64 let two thirds of an SM's warps be resident, 128 a quarter.
MAX_REGISTERS = {"matmul": 128}

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")
needs_gpu = pytest.mark.skipif(
    cuda.why_unavailable() is not None, reason=f"cuda backend: {cuda.why_unavailable()}"
)


# --- compile ---------------------------------------------------------------------------------


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, architecture, tmp_path):
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-c", str(source)]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-o", str(tmp_path / "out.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    log = result.stdout + result.stderr
    assert "warning" not in log, log[-4000:]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    assert registers and len(spills) == 2 * len(registers)
    assert max(spills) == 0
    assert max(registers) <= MAX_REGISTERS.get(source.stem, 64)


# --- numerics --------------------------------------------------------------------------------

NUMERICS_PROGRAM = r"""
#include <stdio.h>
#include "formats.h"
using namespace mixbits;
template <class T>
void put(T value) { fwrite(&value, sizeof(value), 1, stdout); }
int main() {
  for (int element = 0; element < 3; ++element) {
    const Minifloat f = minifloat(element);
    for (int scale = 0; scale < 256; ++scale) {
      for (int code = 0; code < 1 << f.bits; ++code) {
        put(minifloat_decode<float, int32_t>(code, f) * e8m0_to_float(scale));
      }
    }
    for (int code = 0; code < 1 << f.bits; ++code) {
      const float value = minifloat_decode<float, int32_t>(code, f);
      put(float(value == value ? minifloat_encode<float, int32_t>(value, f) : -1));
    }
  }
  for (int h = 0; h < 65536; ++h) put(half_to_float(uint16_t(h)));
  for (int h = 0; h < 65536; ++h) {  // halfway between two bfloat16: ties to even
    const float tie = bit_cast<float>(uint32_t(h) << 16 | 0x8000u);
    put(bfloat16_to_float(float_to_bfloat16(tie)));
    put(half_to_float(float_to_half(tie)));
  }
}
"""


@needs_gpp
def test_host_numerics(tmp_path):
    source, program = tmp_path / "numerics.cpp", tmp_path / "numerics"
    source.write_text(NUMERICS_PROGRAM)
    command = ["g++", "-std=c++17", "-O2", "-ffp-contract=off", f"-I{CSRC}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    output = subprocess.run([str(program)], capture_output=True, check=True).stdout
    floats = torch.frombuffer(bytearray(output), dtype=torch.float32)

    scales = reference.e8m0_to_float(torch.arange(256, dtype=torch.uint8))[:, None]
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    ties = ((torch.arange(65536) << 16 | 0x8000).to(torch.int32)).view(torch.float32)
    expected = []
    for element in MINIFLOATS.values():
        codes = torch.arange(1 << element.bits, dtype=torch.uint8)
        values = reference.minifloat_decode(codes, element)
        expected += [(values * scales).flatten(), codes.float()]
        expected[-1][values.isnan()] = -1
    expected += [halves.float(), torch.stack([ties.bfloat16().float(), ties.half().float()], 1)]
    assert_same_bits(floats, torch.cat([t.flatten() for t in expected]))


# --- emulate ---------------------------------------------------------------------------------

STAND_IN = r"""
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <functional>
#include "formats.h"
#define __device__
#define __global__
#define __launch_bounds__(...)
using std::max;
using std::min;
struct dim3 { unsigned x, y; dim3(unsigned a = 1, unsigned b = 1) : x(a), y(b) {} };
typedef void* cudaStream_t;
typedef int cudaError_t;
enum { cudaSuccess = 0 };
struct cudaFuncAttributes {};
template <class F> int cudaFuncGetAttributes(cudaFuncAttributes*, F) { return 0; }
inline int cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(int) { return ""; }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {
constexpr int kMaxThreads = 256;
struct Barrier { int waiting = 0, passed = 0; };
inline ucontext_t scheduler, threads[kMaxThreads];
inline char stacks[kMaxThreads][1 << 16], shared[48 << 10];
inline bool done[kMaxThreads];
inline uint64_t slots[kMaxThreads];
inline Barrier warps[kMaxThreads / 32], block;
inline int running;
inline long progress;
inline std::function<void()> body;
inline void wait(Barrier& barrier, int count) {
  const int pass = barrier.passed;
  ++progress;
  if (++barrier.waiting == count) { barrier.waiting = 0; ++barrier.passed; }
  while (barrier.passed == pass) swapcontext(&threads[running], &scheduler);
}
inline void thread_main() {
  body();
  done[running] = true;
  ++progress;
  swapcontext(&threads[running], &scheduler);
}
inline void run_block(int count) {
  memset(shared, 0xcd, sizeof shared);
  for (auto& warp : warps) warp = Barrier();
  block = Barrier();
  for (int t = 0; t < count; ++t) {
    done[t] = false;
    getcontext(&threads[t]);
    threads[t].uc_stack.ss_sp = stacks[t];
    threads[t].uc_stack.ss_size = sizeof stacks[t];
    makecontext(&threads[t], thread_main, 0);
  }
  for (int left = count; left > 0;) {
    const long before = progress;
    left = 0;
    for (int t = 0; t < count; ++t) {
      if (done[t]) continue;
      ++left, running = t, threadIdx = dim3(t);
      swapcontext(&scheduler, &threads[t]);
    }
    if (left > 0 && progress == before) { fprintf(stderr, "deadlock in a kernel\n"); abort(); }
  }
}
inline void launch(dim3 grid, int count, size_t shared_bytes, std::function<void()> kernel) {
  if (shared_bytes > sizeof shared || count > kMaxThreads) abort();
  body = kernel, gridDim = grid, blockDim = dim3(count);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) blockIdx = dim3(x, y), run_block(count);
  }
}
}  // namespace emulate

inline void __syncthreads() { emulate::wait(emulate::block, emulate::kMaxThreads); }
template <class T> T __shfl_xor_sync(unsigned, T value, int distance) {
  const int me = emulate::running;
  memcpy(&emulate::slots[me], &value, sizeof value);
  emulate::wait(emulate::warps[me / 32], 32);
  memcpy(&value, &emulate::slots[me ^ distance], sizeof value);
  emulate::wait(emulate::warps[me / 32], 32);
  return value;
}
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
inline float __half2float(__half h) { return mixbits::half_to_float(h.bits); }
inline __half __float2half_rn(float x) { return {mixbits::float_to_half(x)}; }
inline float __bfloat162float(__nv_bfloat16 h) { return mixbits::bfloat16_to_float(h.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {mixbits::float_to_bfloat16(x)}; }
"""
LAUNCH = re.compile(r"([\w:]+(?:<[^;<>]*>)?)\s*<<<(.*?),([^,]*)>>>\s*\((.*?)\);", re.DOTALL)


def build_emulation(folder: Path) -> Path:
    """Compiles csrc/cuda for the host into `folder`; the path of the extension module."""
    import pybind11

    for header in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"):
        (folder / header).write_text('#pragma once\n#include "stand_in.h"\n')
    (folder / "stand_in.h").write_text(STAND_IN)
    shutil.copytree(CSRC, folder / "csrc")
    include = (folder, folder / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-w"]
    command += [f"-I{path}" for path in include]
    sources = [folder / "csrc/bindings_cuda.cpp"]
    for path in (folder / "csrc/cuda").glob("*.cu"):
        text = LAUNCH.sub(r"emulate::launch(\2, [=] { \1(\4); });", path.read_text())
        shared = "double* sums = reinterpret_cast<double*>(emulate::shared);"
        sources.append(path.with_suffix(".cpp"))
        sources[-1].write_text(text.replace("extern __shared__ double sums[];", shared))
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
    """The cuda backend on CPU tensors: the emulated kernels, no stream and no device."""
    monkeypatch.setattr(cuda, "_native", lambda: emulation)
    monkeypatch.setattr(cuda, "_stream", lambda x: 0)
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
