"""The CPU kernels without Python: under sanitizers, and fuzzed.

asan    csrc/cpu and tests/backends/native under AddressSanitizer and UndefinedBehaviorSanitizer
tsan    the same under ThreadSanitizer. It does not see libgomp's barriers, which would look like
        races; tests/backends/native/tsan_gomp.cpp is a small libgomp that it sees through

MIXBITS_FUZZ_SECONDS fuzzes for longer than a few seconds. Every run has its own seed; on failure
the input is shown, and tests/backends/native/fuzz.cpp says how to run it again.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from mixbits.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests" / "backends" / "native"
pytestmark = pytest.mark.slow
PROGRAMS = ["kernels_test", "matmul_test", "mixed_test", "token_step_test", "fuzz", "races"]
OWN = [*PROGRAMS, "tsan_gomp"]
# What a bad pointer reads or writes is AddressSanitizer's to find: checking pointers, too, would
# take half as long again to compile. So would its own checks, written out at every access; calls
# find the same.
SANITIZE = {
    "asan": [
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,object-size,pointer-overflow",
        "-fno-sanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "tsan": ["-fsanitize=thread"],
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "OMP_WAIT_POLICY": "passive",  # threads that wait must not keep others from their core
}


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def setup_module_of_the_project() -> ModuleType:
    """setup.py, which has the compiler's flags, imported without building anything."""
    setuptools = pytest.importorskip("setuptools", reason="setup.py needs setuptools")
    spec = importlib.util.spec_from_file_location("mixbits_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: None)
        patch.setenv("MIXBITS_CUDA", "0")
        spec.loader.exec_module(module)
    return module


def instruction_sets(sanitizer: str) -> list[str]:
    """Those that this CPU has. Threads share work alike in all: for races, two are enough."""
    here = cpu.available_isas() or ["scalar"]
    return here if sanitizer == "asan" else list(dict.fromkeys([here[0], "scalar"]))


def stand_ins(isas: Iterable[str], folder: Path) -> Path:
    """A source with the tables of instruction sets that are not compiled: the scalar one."""
    tables = "".join(f"const Kernels* {i}_kernels() {{ return scalar_kernels(); }}\n" for i in isas)
    path = folder / "stand_ins.cpp"
    path.write_text(f'#include "cpu/kernels.h"\nnamespace mixbits {{\n{tables}}}\n')
    return path


def objects(sanitizer: str, folder: Path) -> dict[str, list[str]]:
    """Name of every object file of a sanitizer's programs -> the command that makes it."""
    setup = setup_module_of_the_project()
    left_out = set(setup.X86 if setup.IS_X86 else ()) - set(instruction_sets(sanitizer))
    sources = [
        (ROOT / path, name, flags.split())
        for path, name, flags in setup.cpu_objects()
        if path.startswith("csrc/cpu/") and name.partition(".")[2] not in left_out
    ]
    sources += [(NATIVE / f"{name}.cpp", name, []) for name in OWN]
    sources += [(stand_ins(sorted(left_out), folder), "stand_ins", [])]
    # Lines are all that reports need of -g; the rest takes as long to compile as the code.
    common = [flag for flag in setup.CXX_FLAGS.split() if flag != "-O3"]
    common += ["-O1", "-g1", "-Wno-psabi", f"-I{ROOT / 'csrc'}", *SANITIZE[sanitizer]]
    common += ["-DMB_X86"] if setup.IS_X86 else []
    # The largest first, so that no core waits for them at the end.
    sources.sort(key=lambda one: -one[0].stat().st_size)
    return {
        name: [*compiler(), *common, *flags, "-c", str(source), "-o", str(folder / f"{name}.o")]
        for source, name, flags in sources
    }


def link_command(sanitizer: str, folder: Path, program: str, kernels: list[str]) -> list[str]:
    parts = [program, *(kernels if program != "races" else [])]
    parts += ["tsan_gomp"] if sanitizer == "tsan" else []
    openmp = "-pthread" if sanitizer == "tsan" else "-fopenmp"
    files = [str(folder / f"{name}.o") for name in parts]
    return [*compiler(), *SANITIZE[sanitizer], *files, openmp, "-o", str(folder / program)]


def build(sanitizer: str, folder: Path) -> None:
    commands = objects(sanitizer, folder)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_or_fail, commands.values()))
    kernels = [name for name in commands if name not in OWN]
    for program in PROGRAMS:
        compile_or_fail(link_command(sanitizer, folder, program, kernels))


def execute(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        cwd=folder,
        env={**os.environ, **OPTIONS},
    )


def compile_or_fail(command: list[str]) -> None:
    result = execute(command)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout[-4000:]}"


def why_not(sanitizer: str, folder: Path) -> str | None:
    """Why this machine cannot build and run a sanitizer's programs."""
    if not sys.platform.startswith("linux"):
        return "the native tests need Linux"
    if shutil.which(compiler()[0]) is None:
        return f"no C++ compiler: {compiler()[0]} is not on the PATH"
    if "clang" in execute([*compiler(), "--version"]).stdout:
        return "csrc/cpu needs g++: set CXX"
    source, program = folder / "try.cpp", folder / "try"
    source.write_text("int main() {}\n")
    flags = [*SANITIZE[sanitizer], *([] if sanitizer == "tsan" else ["-fopenmp"])]
    result = execute([*compiler(), *flags, str(source), "-o", str(program)])
    if result.returncode == 0:
        result = execute(command_line(program))
    return f"no {sanitizer} here: {result.stdout[-300:]}" if result.returncode else None


def command_line(program: Path, *arguments: object) -> list[str]:
    """A call with addresses that are not random: ThreadSanitizer needs some of them."""
    setarch = shutil.which("setarch")
    works = setarch is not None and execute([setarch, "-R", "true"]).returncode == 0
    return [*([setarch, "-R"] if setarch and works else []), str(program), *map(str, arguments)]


@pytest.fixture(scope="session", params=["asan", "tsan"])
def sanitized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A sanitizer and the folder of the programs built with it."""
    folder = tmp_path_factory.mktemp(request.param)
    reason = why_not(request.param, folder)
    if reason is not None:
        pytest.skip(reason)
    build(request.param, folder)
    return request.param, folder


def run(folder: Path, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return execute(command_line(folder / program, *arguments), folder)


@pytest.mark.parametrize("program", ["kernels_test", "matmul_test", "mixed_test"])
def test_kernels(sanitized: tuple[str, Path], program: str) -> None:
    sanitizer, folder = sanitized
    # Races need work for several threads; comparing all numbers is the other sanitizer's part.
    result = run(folder, program, *(["--few"] if sanitizer == "tsan" else []))
    assert result.returncode == 0, result.stdout[-6000:]


def test_token_step(sanitized: tuple[str, Path]) -> None:
    _, folder = sanitized
    result = run(folder, "token_step_test")
    assert result.returncode == 0, result.stdout[-6000:]


def test_fuzz(sanitized: tuple[str, Path]) -> None:
    _, folder = sanitized
    seconds = float(os.environ.get("MIXBITS_FUZZ_SECONDS", "5"))
    result = run(folder, "fuzz", seconds, int.from_bytes(os.urandom(4), "little"))
    print(result.stdout[-200:])
    if result.returncode != 0:
        pytest.fail(f"{result.stdout[-6000:]}\ninput: {(folder / 'fuzz-input').read_bytes()!r}")


def test_fuzz_keeps_the_input_that_fails(sanitized: tuple[str, Path]) -> None:
    _, folder = sanitized
    (folder / "fuzz-input").unlink(missing_ok=True)
    assert run(folder, "fuzz", 0.1, 1).returncode == 0
    assert not (folder / "fuzz-input").exists()
    assert run(folder, "fuzz", "--fail").returncode != 0
    kept = (folder / "fuzz-input").read_bytes()
    assert kept
    assert run(folder, "fuzz", "fuzz-input").returncode == 0  # nothing is wrong with it
    assert (folder / "fuzz-input").read_bytes() == kept


def test_races_are_seen(sanitized: tuple[str, Path]) -> None:
    sanitizer, folder = sanitized
    for kind in ("static", "dynamic", "scratch"):
        correct = run(folder, "races", "correct", kind)
        assert correct.returncode == 0, correct.stdout
        if sanitizer == "tsan":  # the other does not look for them
            racy = run(folder, "races", "racy", kind)
            assert racy.returncode != 0 and "data race" in racy.stdout, racy.stdout
