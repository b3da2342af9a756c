"""The CUDA kernels, as far as compilers can tell; tests/backends/test_cuda_kernels.py runs them.

compile   nvcc builds every file for every architecture that runs it: no spills, registers within
          limits, and in the machine code the instructions that the kernels are about
numerics  csrc/formats.h and the fragment maps, compiled by the host compiler
"""

import csv
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sass
import torch
from compiled import CSRC, needs_gpp, output_of
from conftest import FLOATS, assert_same_bits

from mixbits.formats import reference
from mixbits.formats.schemes import MINIFLOATS

TESTS = Path(__file__).resolve().parent
SOURCES = {
    "_".join(path.relative_to(CSRC / "cuda").with_suffix("").parts): path
    for path in sorted(CSRC.glob("cuda/**/*.cu"))
}
# Registers per thread of files whose kernels want more than 64, which let two thirds of an SM's
# warps be resident. What the matrix kernels may have follows from their launch bounds.
MAX_REGISTERS = {"matmul_simple": 128, "matmul_mma": 255, "matmul_wgmma": 168, "matmul_e4m3": 168}
HOPPER = ("matmul_wgmma", "matmul_e4m3")
BUDGETS = TESTS / "cuda_budgets.csv"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
needs_cuobjdump = pytest.mark.skipif(
    sass.find_cuobjdump() is None, reason="Triton, which ships cuobjdump, is not installed"
)


# --- compile ---------------------------------------------------------------------------------


def architectures(name: str) -> list[str]:
    return ["90a"] if name in HOPPER else ["80", "90a", "100a", "120a"]


BUILDS = [(name, arch) for name in SOURCES for arch in architectures(name)]


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """(file, architecture) -> (object file, nvcc's exit code and log), all of them at once."""
    folder = tmp_path_factory.mktemp("objects")

    def build(name: str, arch: str) -> tuple[Path, int, str]:
        target = folder / f"{name}.{arch}.o"
        # The host's half of a file is the same for all architectures: one of them compiles it.
        output = "-c" if arch == "90a" else "-cubin"
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", f"-I{CSRC}", output]
        command += [str(SOURCES[name])]
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return target, result.returncode, result.stdout + result.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(BUILDS, pool.map(lambda job: build(*job), BUILDS), strict=True))


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(("name", "arch"), BUILDS)
def test_compiles_without_spills(builds, name, arch):
    _, code, log = builds[name, arch]
    assert code == 0, log[-4000:]
    assert "warning" not in log, log[-4000:]
    # ptxas only informs when it gives up the asynchrony of wgmma (C7510 and its neighbours).
    assert "Potential Performance Loss" not in log, log[-4000:]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    assert registers and len(spills) == 2 * len(registers)
    assert max(spills) == 0
    assert max(registers) <= MAX_REGISTERS.get(name, 64)


def code_load(element: int) -> str:
    """The opcode that loads a lane's codes: 16 bytes, of int2 8, no place in L1, whole L2 lines."""
    return f"LDG.E.NA.LTC128B.{64 if element == 3 else 128}.CONSTANT"


def plain_and_mixed(path: Path) -> tuple[list[sass.Kernel], list[sass.Kernel]]:
    """Kernels for weights of one format, and those for weights in segments."""
    kernels = sass.disassemble(sass.find_cuobjdump(), path)
    mixed = [kernel for kernel in kernels if "mixed" in kernel.name]
    return [kernel for kernel in kernels if kernel not in mixed], mixed


def check_mixed(mixed: sass.Kernel, parts: list[sass.Kernel], products: str) -> None:
    """It has the products, loads and calls of its parts, one for each format, and no stack.

    sm_80 has a call in every kernel, of a shared tail; a format's code must not be another.
    """
    for pattern in (products, "CALL", *map(re.escape, (code_load(0), code_load(3)))):
        assert mixed.count(pattern) == sum(part.count(pattern) for part in parts), mixed.name
    assert mixed.count(products)
    assert not mixed.count("LDL|STL"), mixed.name
    assert len(mixed.code) <= sum(len(part.code) for part in parts), mixed.name


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("arch", ["80", "90a", "100a", "120a"])
def test_mma_machine_code(builds, arch):
    """Tensor cores, wide loads of codes, nothing in local memory."""
    kernels, mixed = plain_and_mixed(builds["matmul_mma", arch][0])
    assert len(mixed) == 2 * 2  # dtypes, shapes
    for kernel in mixed:
        dtype, shape = re.search(r"kernelI(\d+\D+\d*)((?:Li\dE)+)E", kernel.name).groups()
        parts = [k for k in kernels if re.search(f"kernelI{dtype}Li\\dE{shape}E", k.name)]
        assert len(parts) == 6
        check_mixed(kernel, parts, "HMMA.16816.F32")
    assert len(kernels) == 2 * 7 * 3  # dtypes, elements (NVFP4 among them), shapes
    for kernel in kernels:
        loop = kernel.inner_loop("HMMA")
        element = int(re.search(r"Li(\d+)ELi\dELi\dE", kernel.name)[1])
        assert any(op.startswith("HMMA.16816.F32") for op in loop), kernel.name
        assert loop.count(code_load(element)) == 4 * 2, kernel.name  # chunks, rows
        assert not kernel.count("LDL|STL"), kernel.name


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
def test_wgmma_machine_code(builds):
    """Warpgroup products from registers in the loop, bulk copies, registers given and taken."""
    kernels, mixed = plain_and_mixed(builds["matmul_wgmma", "90a"][0])
    assert len(mixed) == 2 * 2  # dtypes; e2m1 and e4m3, integers
    for kernel in mixed:
        dtype, mx = re.search(r"kernelI(\d+\D+\d*)Lb(\d)E", kernel.name).groups()
        family = "[01]" if mx == "1" else "[345]"
        parts = [k for k in kernels if re.search(f"kernelI{dtype}Li{family}ELi128E", k.name)]
        check_mixed(kernel, parts, "HGMMA.64x128x16.F32")
        assert kernel.count("UBLKCP") and kernel.count("SYNCS")
    assert len(kernels) == 2 * 6 * 3  # dtypes, elements, tokens of a block
    for kernel in kernels:
        element, tokens = map(int, re.search(r"Li(\d)ELi(\d+)E", kernel.name).groups())
        loop = kernel.inner_loop("HGMMA")
        wide = [op for op in loop if op.startswith(f"HGMMA.64x{tokens}x16.F32")]
        assert len(wide) == 16, kernel.name  # two tiles of 8 steps
        chunks = 2 if element in (1, 2, 5) else 1  # of 128 columns: 8-bit elements have two
        assert loop.count(code_load(element)) == 2 * chunks * 2, kernel.name  # tiles, rows
        assert kernel.count("UBLKCP") and kernel.count("SYNCS")
        assert kernel.count("USETMAXREG") == 2
        assert not kernel.writes_under_way(), kernel.name
        assert not kernel.count("LDL|STL"), kernel.name


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
def test_e4m3_machine_code(builds):
    """Warpgroup products of 8-bit floats, each finished before the next begins."""
    kernels = sass.disassemble(sass.find_cuobjdump(), builds["matmul_e4m3", "90a"][0])
    products = [kernel for kernel in kernels if "e4m3_kernel" in kernel.name]
    preparing = [kernel for kernel in kernels if "prepare_kernel" in kernel.name]
    assert len(products) == len(preparing) == 2 and len(kernels) == 4  # dtypes
    for kernel in products:
        loop = kernel.inner_loop("QGMMA")
        assert loop.count("QGMMA.64x128x32.F32.E4M3.E4M3") == 2 * 4, kernel.name  # tiles, steps
        assert loop.count(code_load(0)) == 2 * 2, kernel.name  # tiles, rows
        assert loop.count("FADD") == 2 * 64, kernel.name  # what leaves the 14 digits
        assert kernel.count("UBLKCP.*MULTICAST") and kernel.count("SYNCS")
        assert kernel.count("USETMAXREG") == 2
        assert not kernel.writes_under_way("QGMMA", waits_needed=1), kernel.name
    for kernel in preparing:
        assert kernel.count("F2FP.SATFINITE.E4M3") and kernel.count("LDG.E.64"), kernel.name
    assert not any(kernel.count("LDL|STL") for kernel in kernels)


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize(
    ("name", "store", "count"),  # prepare: rows, and tiles
    [
        ("ops_dequantize", "STG.E.128", 1),
        ("ops_fake_quant", "STG.E.64", 1),
        ("matmul_prepare", "STG.E.64", 2),
    ],
)
def test_16_bit_values_move_together(builds, name, store, count):
    """8 or 16 bytes per lane and store: the compiler splits copies of structs of 16-bit values."""
    for kernel in sass.disassemble(sass.find_cuobjdump(), builds[name, "90a"][0]):
        if ("6__half" in kernel.name or "bfloat16" in kernel.name) and "fEEv" not in kernel.name:
            assert kernel.count(re.escape(store)) == count, kernel.name
            assert not kernel.count("LDL|STL"), kernel.name


def loop_sizes(builds) -> dict[tuple[str, str], int]:
    """(file, template arguments) -> instructions of the loop around the matrix unit, bfloat16.

    A loop holds 4 chunks of two rows of mma, or two tiles of 128 columns of the others; and, out
    of the way, the branches that repair rare values.
    """
    sizes = {}
    units = {"matmul_mma": "HMMA", "matmul_wgmma": "HGMMA", "matmul_e4m3": "QGMMA"}
    for name, pattern in units.items():
        for kernel in sass.disassemble(sass.find_cuobjdump(), builds[name, "90a"][0]):
            if "prepare" in kernel.name or "mixed" in kernel.name:  # the latter are made of these
                continue
            if match := re.search(r"kernelI13__nv_bfloat16((?:Li\d+E)*)E", kernel.name):
                arguments = " ".join(re.findall(r"\d+", match[1]))
                sizes[name, arguments] = len(kernel.inner_loop(pattern))
    return sizes


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
def test_instruction_budgets(builds):
    """Loops do not grow by more than a compiler's whim over tests/backends/cuda_budgets.csv
    (sm_90a).

    MIXBITS_WRITE_BUDGETS=1 writes the file.
    """
    sizes = loop_sizes(builds)
    if os.environ.get("MIXBITS_WRITE_BUDGETS") == "1":
        with BUDGETS.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", "template arguments", "instructions of the loop"])
            writer.writerows([*key, size] for key, size in sorted(sizes.items()))
    with BUDGETS.open() as file:
        budgets = {(row[0], row[1]): int(row[2]) for row in list(csv.reader(file))[1:]}
    assert budgets.keys() == sizes.keys()
    grown = {key: (budgets[key], size) for key, size in sizes.items() if size > 1.05 * budgets[key]}
    assert not grown, grown


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
    output = output_of(NUMERICS_PROGRAM, tmp_path)
    floats = torch.frombuffer(bytearray(output), dtype=torch.float32)

    scales = reference.e8m0_to_float(torch.arange(256, dtype=torch.uint8))[:, None]
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    ties = ((torch.arange(65536) << 16 | 0x8000).to(torch.int32)).view(torch.float32)
    expected = []
    for element in map(MINIFLOATS.__getitem__, FLOATS):
        codes = torch.arange(1 << element.bits, dtype=torch.uint8)
        values = reference.minifloat_decode(codes, element)
        expected += [(values * scales).flatten(), codes.float()]
        expected[-1][values.isnan()] = -1
    expected += [halves.float(), torch.stack([ties.bfloat16().float(), ties.half().float()], 1)]
    assert_same_bits(floats, torch.cat([t.flatten() for t in expected]))


FRAGMENTS_PROGRAM = r"""
#include <stdio.h>
#include "cuda/codes/fragments.h"
using namespace mixbits::cuda;
int main() {
  for (int bits = 2; bits <= 8; bits *= 2) {
    for (int pair = 0; pair < chunk_columns(bits) / 2; ++pair) {
      printf("pair %d %d %d\n", bits, pair_column(bits, pair, 0), pair_column(bits, pair, 1));
    }
    for (int column = 0; column < kPreparedColumns; ++column) {
      printf("prepared %d %d %d\n", bits, column, prepared_position(bits, column));
    }
  }
  for (int token = 0; token < 64; ++token) {
    for (int position = 0; position < kPreparedColumns; ++position) {
      printf("byte %d %d %d\n", token, position, prepared_byte(64, token, position));
      printf("e4m3_byte %d %d %d\n", token, position, e4m3_byte(token, position));
    }
  }
  for (int column = 0; column < kPreparedColumns; ++column) {
    printf("e4m3 %d %d\n", column, e4m3_position(column));
  }
}
"""


@pytest.fixture(scope="module")
def fragment_maps(tmp_path_factory):
    """Rows of integers by the name of their map."""
    folder = tmp_path_factory.mktemp("fragments")
    source, program = folder / "fragments.cpp", folder / "fragments"
    source.write_text(FRAGMENTS_PROGRAM)
    command = ["g++", "-std=c++17", f"-I{CSRC}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    output = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    rows: dict[str, list[tuple[int, ...]]] = {}
    for line in output.splitlines():
        name, *numbers = line.split()
        rows.setdefault(name, []).append(tuple(map(int, numbers)))
    return rows


@needs_gpp
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pairs_cover_a_chunk(fragment_maps, bits):
    """Every column of a lane's 16 bytes (8 of int2) once, the two of a pair 16 bits apart."""
    pairs = [(low, high) for b, low, high in fragment_maps["pair"] if b == bits]
    columns = sorted(column for pair in pairs for column in pair)
    assert columns == list(range(16 if bits == 8 else 32))
    assert all((high - low) * bits == 16 for low, high in pairs)


@needs_gpp
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_prepared_order_is_that_of_the_fragments(fragment_maps, bits):
    """Position 16 s + 8 u + 2 q + e holds what lane q's register 2u of step s has in its half e."""
    prepared = {column: at for b, column, at in fragment_maps["prepared"] if b == bits}
    assert sorted(prepared.values()) == list(range(128))
    pairs = [(low, high) for b, low, high in fragment_maps["pair"] if b == bits]
    chunk = 2 * len(pairs)
    for tile in range(128 // (4 * chunk)):
        for lane in range(4):
            for number, pair in enumerate(pairs):
                step, upper = tile * len(pairs) // 2 + number // 2, number % 2
                for half, column in enumerate(pair):
                    at = prepared[tile * 4 * chunk + lane * chunk + column]
                    assert at == 16 * step + 8 * upper + 2 * lane + half


@needs_gpp
def test_prepared_bytes_are_swizzled(fragment_maps):
    """Two sets of 128-byte rows, bits 4-6 of a byte's place xor-ed with bits 7-9."""
    places = [place for _, _, place in fragment_maps["byte"]]
    assert sorted(places) == list(range(0, 64 * 256, 2))
    for token, position, place in fragment_maps["byte"]:
        plain = (position // 64 * 64 + token) * 128 + position % 64 * 2
        assert place == plain ^ (plain >> 7 & 7) << 4


@needs_gpp
def test_e4m3_order_is_that_of_the_fragments(fragment_maps):
    """Position 32 s + 16 u + 4 q + e holds what lane q's register 2u of step s has in byte e."""
    positions = dict(fragment_maps["e4m3"])
    for lane in range(4):
        for step in range(4):
            for code in range(8):  # of the word that the step takes: four for each register
                upper, byte = divmod(code, 4)
                column = 32 * lane + 8 * step + code
                assert positions[column] == 32 * step + 16 * upper + 4 * lane + byte
    for token, position, place in fragment_maps["e4m3_byte"]:
        plain = token * 128 + position
        assert place == plain ^ (plain >> 7 & 7) << 4
