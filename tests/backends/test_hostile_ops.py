"""No argument of an operation reads beyond memory, kills the process, or gives other numbers.

`hostile.py` makes the arguments; it runs in a process of its own, as a fault may end that.
MIXBITS_FUZZ_SECONDS tries random ones for longer than a few seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

PROGRAM = Path(hostile.__file__)
CASES = hostile.cases()


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    done = run()
    tail = (done.stdout + done.stderr)[-2000:]
    assert done.returncode == 0, f"died of {done.returncode}: {tail}"
    return dict(line.split("\t", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", hostile.NAMES)
@pytest.mark.parametrize("expected", ["right", "refused", "any"])
def test_a_tensor_that_was_tampered_with(
    outcomes: dict[str, str], name: str, expected: str
) -> None:
    own = {c: e for c, (e, _) in CASES.items() if c.startswith(f"{name}, ") and e == expected}
    # What torch cannot make of a tensor (a quantized one of bytes) is no case.
    made = {case for case in own if not outcomes[case].startswith("not made")}
    right = ("right", "refused", "accepted") if expected == "any" else (expected,)
    assert {c: outcomes[c] for c in made if not outcomes[c].startswith(right)} == {}
    assert len(made) > len(own) // 2 or expected == "any"


def test_other_arguments(outcomes: dict[str, str]) -> None:
    own = hostile.tampered_arguments()
    assert {name: outcomes[name] for name in own if not outcomes[name].startswith("refused")} == {}


def test_random_arguments() -> None:
    seconds = float(os.environ.get("MIXBITS_FUZZ_SECONDS", "3"))
    done = run("fuzz", seconds, int.from_bytes(os.urandom(4), "little"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
