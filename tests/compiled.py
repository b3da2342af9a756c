"""Programs that include the headers of csrc, compiled for this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")


def output_of(program: str, folder: Path) -> bytes:
    """What a C++ program that includes our headers prints."""
    source, binary = folder / "program.cpp", folder / "program"
    source.write_text(program)
    command = ["g++", "-std=c++17", "-O2", "-ffp-contract=off", f"-I{CSRC}"]
    subprocess.run([*command, str(source), "-o", str(binary)], check=True)
    return subprocess.run([str(binary)], capture_output=True, check=True).stdout
