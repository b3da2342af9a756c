"""csrc/cuda compiled for the host, with backends/emulation in the place of CUDA's headers."""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parents[1] / "csrc"
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
    for path in sorted((folder / "csrc/cuda").rglob("*.cu")):
        text = LAUNCH.sub(r"emulate::launch(\2,\3, [=] { \1(\5); });", path.read_text())
        text = DYNAMIC.sub(r"\1* \2 = emulate::shared<\1>();", text)
        sources.append(path.with_suffix(".cpp"))
        sources[-1].write_text(text)
    objects = [str(source.with_suffix(".o")) for source in sources]

    def compile_one(source: Path, target: str) -> None:
        subprocess.run([*command, "-c", str(source), "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / f"_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    subprocess.run(["g++", "-shared", *objects, "-o", str(library)], check=True)
    return library
