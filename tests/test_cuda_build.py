"""The CUDA kernels, as far as a compiler can tell: registers, spills, instructions; numerics.

compile   nvcc builds every file for the architectures that run it, and its machine code is looked at
numerics  csrc/formats.h, and the fragment maps, compiled by the host compiler

tests/test_cuda_kernels.py runs the kernels, emulated or on a GPU.
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


