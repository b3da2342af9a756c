"""Builds the native libraries: mixbits._cpu always, mixbits._cuda where asked for or possible.

No torch is needed to build. Environment variables:

    MIXBITS_CPU         0: install without the native CPU library (plain torch is used, slowly)
    MIXBITS_CUDA        auto (default): build when nvcc and a GPU are here; 1: build or fail; 0
    MIXBITS_CUDA_ARCH   compute capabilities, default "80;90a;100a;120a"
    CXX, NVCC, MAX_JOBS compilers, and how many of them run at a time

Each file of csrc/cpu but simd/dispatch.cpp is compiled once per instruction set; the CPU picks
when the library is loaded. No -march=native: a wheel built here runs elsewhere. No -ffast-math, and
no contraction of a*b+c: results are defined to the bit.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -fno-math-errno"
NVCC_FLAGS = "-std=c++17 -O3 -cudart static --threads 0 -Xcompiler -fPIC,-fvisibility=hidden"
AVX2 = "-mavx2 -mfma -mf16c"
AVX512VNNI = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
X86 = {
    "avx512bf16": f"{AVX512VNNI} -mavx512bf16 -mavx512vbmi",
    "avx512vnni": AVX512VNNI,
    "avx2": AVX2,
    "scalar": "",
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def find_nvcc() -> str | None:
    """nvcc from NVCC, CUDA_HOME or the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def wants_cuda() -> bool:
    """The decision of MIXBITS_CUDA; SystemExit when it cannot be honoured."""
    mode = os.environ.get("MIXBITS_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"MIXBITS_CUDA must be auto, 0 or 1: got {mode!r}")
    if mode == "1" and find_nvcc() is None:
        raise SystemExit("MIXBITS_CUDA=1 needs nvcc: set CUDA_HOME, or put nvcc on the PATH")
    has_gpu = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    return mode == "1" or (mode == "auto" and has_gpu and find_nvcc() is not None)


def object_name(source: Path, folder: str) -> str:
    """csrc/cpu/matmul/dot.cpp -> matmul_dot: no two files of a library have the same."""
    return "_".join(source.relative_to(ROOT / folder).with_suffix("").parts)


def cpu_objects() -> list[tuple[str, str, str]]:
    """(source, name of its object, extra flags)."""
    dispatch = "csrc/cpu/simd/dispatch.cpp"
    objects = [("csrc/bindings.cpp", "bindings", ""), (dispatch, "simd_dispatch", "")]
    for isa, flags in X86.items() if IS_X86 else [("scalar", "")]:
        for source in sorted((ROOT / "csrc/cpu").rglob("*.cpp")):
            path, name = source.relative_to(ROOT).as_posix(), object_name(source, "csrc/cpu")
            if path != dispatch:
                objects.append((path, f"{name}.{isa}", f"-DMB_ISA={isa} {flags}"))
    return objects


def cuda_objects() -> list[tuple[str, str, str]]:
    """wgmma exists on sm_90a only, so its files are compiled for that alone, or left out."""
    archs = os.environ.get("MIXBITS_CUDA_ARCH", "80;90a;100a;120a").replace(",", ";").split(";")
    gencode = {a: f"-gencode arch=compute_{a},code=sm_{a}" for a in archs if a}
    flags = "-DMB_WGMMA" if "90a" in gencode else ""
    objects = [("csrc/bindings_cuda.cpp", "bindings_cuda", flags)]
    for source in sorted((ROOT / "csrc/cuda").rglob("*.cu")):
        name = object_name(source, "csrc/cuda")
        only = ["90a"] if name in ("matmul_wgmma", "matmul_e4m3") else list(gencode)
        flags = " ".join(gencode[a] for a in only if a in gencode)
        if flags:
            objects.append((source.relative_to(ROOT).as_posix(), name, flags))
    return objects


def kept_pybind11(folder: Path) -> Path:
    """A copy of pybind11's headers: pip has them in a new place for each build.

    What names them would be compiled again each time.
    """
    import pybind11

    kept = folder / f"pybind11-{pybind11.__version__}"
    if not kept.exists():
        part = kept.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), part)
        part.rename(kept)
    return kept


class NinjaBuild(build_ext):
    """Writes a build.ninja per library and runs it: parallel, and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        is_cuda = ext.name.endswith("_cuda")
        # An editable build is given a new temporary folder each time: its objects stay here.
        kept = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
        folder = ((kept if self.editable_mode else Path(self.build_temp)) / ext.name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = cuda_objects() if is_cuda else cpu_objects()
        (folder / "build.ninja").write_text(self.rules(is_cuda, objects, target, folder))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), *jobs], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            hint = "MIXBITS_CUDA=0" if is_cuda else "a C++17 compiler (CXX), or MIXBITS_CPU=0"
            raise SystemExit(f"building {ext.name} failed ({error}): try {hint}") from error

    def rules(
        self, is_cuda: bool, objects: list[tuple[str, str, str]], target: Path, folder: Path
    ) -> str:
        cxx = os.environ.get("CXX", "c++")
        common = f"-I{ROOT / 'csrc'}" + (" -DMB_X86" if IS_X86 else "")
        # Not for the kernels, too: another Python, and all of them would be compiled again.
        python = " ".join(f"-I{path}" for path in (*self.include_dirs, kept_pybind11(folder)))
        link = f"{find_nvcc()} -shared -cudart static" if is_cuda else f"{cxx} -shared -fopenmp -s"
        files = "-MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
        lines = [
            f"rule cxx\n  command = {cxx} {CXX_FLAGS} {common} $flags {files}",
            f"rule nvcc\n  command = {find_nvcc()} {NVCC_FLAGS} $flags {common} {files}",
            f"rule link\n  command = {link} $in -o $out",
        ]
        for source, name, flags in objects:
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            flags += f" {python}" if name.startswith("bindings") else ""
            lines.append(f"build {name}.o: {rule} {ROOT / source}\n  flags = {flags}")
        lines.append(f"build {target}: link {' '.join(f'{name}.o' for _, name, _ in objects)}")
        return "\n".join(lines) + "\n"


libraries = [] if os.environ.get("MIXBITS_CPU") == "0" else ["mixbits._cpu"]
libraries += ["mixbits._cuda"] if wants_cuda() else []
setup(
    packages=[*find_packages(include=["mixbits", "mixbits.*"]), "mixbits.kernels"],
    package_dir={"mixbits.kernels": "kernels/triton"},
    package_data={
        "mixbits": ["py.typed"],
        "mixbits.demo": ["model/*", "tasks/*"],
        "mixbits.report": ["templates/*"],
    },
    ext_modules=[Extension(name, sources=[]) for name in libraries],
    cmdclass={"build_ext": NinjaBuild},
)
