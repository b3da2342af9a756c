"""Runs that are killed, at any moment: what they leave."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SMALL, command, entries, read

import mixbits
from mixbits.checkpoint import saving as checkpoint
from mixbits.files.atomic import atomic_folder

KILLS = int(os.environ.get("MIXBITS_TEST_KILLS", "4"))


def start(shared: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    words = [shared / "llama", "--out", tmp_path / "out", "--dataset", shared / "ids.npy"]
    return subprocess.Popen(
        command(*words, *SMALL, "--overwrite", "--avg-bits", "5"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def whole_or_absent(tmp_path: Path) -> bool:
    """Whether there is an output, after checking that it is whole."""
    out = tmp_path / "out"
    if not out.exists():
        return False
    assert torch.isfinite(mixbits.load(out)(torch.arange(8)[None]).logits).all()
    assert read(out / "report.json")["mixbits_report"] == 1
    return True


def test_sigkill_leaves_all_or_nothing(shared: Path, tmp_path: Path) -> None:
    """Killed at random moments; MIXBITS_TEST_KILLS sets how many."""
    begin = time.monotonic()
    process = start(shared, tmp_path)
    process.communicate()
    whole = time.monotonic() - begin
    assert process.returncode == 0 and whole_or_absent(tmp_path)
    shutil.rmtree(tmp_path / "out")
    rng = random.Random(0)
    for _ in range(KILLS):
        # Most of the time goes into imports: half of the moments lie where files are written.
        moment = rng.random() if rng.random() < 0.5 else rng.uniform(0.75, 1)
        process = start(shared, tmp_path)
        try:
            process.wait(moment * whole)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        whole_or_absent(tmp_path)
    assert start(shared, tmp_path).wait() == 0
    assert whole_or_absent(tmp_path)
    assert entries(tmp_path) == ["out"]  # the killed ones' folders are gone too


class Killed(BaseException):
    """In place of SIGKILL: what has been done so far stays, nothing more is done."""


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_step_of_the_exchange(
    overwrite: bool, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork dies at each file-system call in turn; the folder is whole or absent afterwards."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    pattern = tmp_path / "pattern"
    assert run("--avg-bits", 5, "--eval-nsamples", 0, out="pattern") == 0
    for step in range(100):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(pattern, out)
        pid = os.fork()
        if pid == 0:
            left = [step]

            def audit(event: str, arguments: Any, left: list[int] = left) -> None:
                if event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}:
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1

            sys.addaudithook(audit)
            with atomic_folder(out, overwrite) as folder:
                for path in pattern.iterdir():
                    shutil.copyfile(path, folder / path.name)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        whole_or_absent(tmp_path)
        if not os.WIFSIGNALED(status):
            break
    assert 0 < step < 99
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "plan.json").write_text("{}")
    assert entries(tmp_path) == ["out", "pattern"]


def test_sigterm_leaves_the_scores_alone(shared: Path, tmp_path: Path) -> None:
    process = start(shared, tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"[5/"):  # what is left is short: round, write
            break
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode in (143, -15)
    assert entries(tmp_path) == ["out.scores.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_files_are_written_leaves_nothing(
    number: signal.Signals,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*args: Any) -> None:
        assert any(".partial-" in name for name in entries(tmp_path))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(checkpoint, "copy_companions", stop)
    if number == signal.SIGINT:
        # A process that a shell started in the background is born deaf to it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        assert run("--avg-bits", 5) == 1
        signal.signal(signal.SIGINT, before)
    else:
        with pytest.raises(SystemExit):
            run("--avg-bits", 5)
    assert entries(tmp_path) == ["out.scores.json"]
