"""Outputs replace nothing but mixbits' own, and have one run at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from outputs import ours, replace, said
from tiny import entries

from mixbits.errors import UsageError
from mixbits.files import atomic, system
from mixbits.files.atomic import (
    atomic_folder,
    check_destination,
    reserved,
    scratch_folder,
)
from mixbits.files.manifest import MANIFEST, remove_ours
from mixbits.files.system import Lock, exchange


def foreign_file(name: str) -> Callable[[Path], None]:
    def add(out: Path) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("precious")

    return add


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def without_manifest(out: Path, **files: str) -> None:
    shutil.rmtree(out)
    out.mkdir()
    for name, text in files.items():
        (out / name.replace("_", ".")).write_text(text)


CHANGED = {
    "notes": (foreign_file("notes.md"), "mixbits did not write notes.md"),
    "hidden": (foreign_file(".env"), "mixbits did not write .env"),
    "repository": (foreign_file(".git/HEAD"), "mixbits did not write .git/HEAD"),
    "beside ours": (foreign_file("sub/notes.md"), "mixbits did not write sub/notes.md"),
    "deep": (foreign_file("a/b/c"), "mixbits did not write a/b/c"),
    "an empty folder": (lambda out: (out / "mine").mkdir(), "mixbits did not write mine"),
    "a link": (lambda out: (out / "l").symlink_to("plan.json"), "mixbits did not write l"),
    "a pipe": (lambda out: make_pipe(out / "pipe"), "mixbits did not write pipe"),
    "a link for our folder": (
        lambda out: (out / "sub").symlink_to((out / "sub").rename(out.parent / "s")),
        "mixbits did not write sub",
    ),
    "edited": (lambda out: (out / "plan.json").write_text("my"), "plan.json was changed"),
    "edited, of the same size": (
        lambda out: (out / "plan.json").write_text("mine"[:3]),
        "plan.json was changed",
    ),
    "ours is a link now": (
        lambda out: ((out / "plan.json").unlink(), (out / "plan.json").symlink_to("/etc/passwd")),
        "mixbits did not write plan.json",
    ),
    "ours is a folder now": (
        lambda out: ((out / "plan.json").unlink(), foreign_file("plan.json/x")(out)),
        "mixbits did not write plan.json/x",
    ),
    "another's manifest": (lambda out: (out / MANIFEST).write_text("{}"), "did not write"),
    "a manifest of lists": (lambda out: (out / MANIFEST).write_text("[" * 10**5), "did not write"),
    "a pipe for a manifest": (
        lambda out: make_pipe(out / MANIFEST),
        "mixbits did not write mixbits-manifest.json",
    ),
    "an empty plan.json": (lambda out: without_manifest(out, plan_json=""), "plan.json"),
    "terraform's plan.json": (
        lambda out: without_manifest(out, plan_json='{"terraform": "plan"}'),
        "plan.json",
    ),
    "notes in an older output": (
        lambda out: without_manifest(out, plan_json='{"mixbits_plan": 1}', notes_md="mine"),
        "mixbits did not write notes.md",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_folder_with_anything_of_the_users_is_refused(case: str, tmp_path: Path) -> None:
    change, expected = CHANGED[case]
    out = ours(tmp_path / "out")
    change(out)
    before = sorted(os.walk(out))
    with pytest.raises(UsageError, match="is no mixbits output") as caught:
        check_destination(out, overwrite=True)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"is no mixbits output.*: pass another --out"):
        check_destination(out, overwrite=False)
    assert sorted(os.walk(out)) == before


def test_what_may_be_replaced(tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    (out / "sub" / "code.py").unlink()  # less than we wrote is ours still
    replace(out)
    (tmp_path / "empty").mkdir()
    replace(tmp_path / "empty")
    names = ["scores.json", "model-00001-of-00002.safetensors", "tokenizer.json", "README.md"]
    for mark in ("plan.json", "mixbits-export.json"):  # from before there were manifests
        without_manifest(out)
        for name in names:
            (out / name).write_text("")
        key = "mixbits_plan" if mark == "plan.json" else "mixbits_version"
        (out / mark).write_text(json.dumps({key: 1}))
        replace(out)
    assert entries(tmp_path) == ["empty", "out"] and said(out) == "new"


def test_what_the_run_stands_on_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ours(tmp_path / "out")
    for inputs in ([out / "plan.json"], [tmp_path / "x", out / "sub"], [out]):
        with pytest.raises(UsageError, match=rf"it is, or holds, {inputs[-1]}"):
            check_destination(out, True, inputs)
    check_destination(out, True, [tmp_path / "out" / "gone", tmp_path, Path("x" * 5000)])
    (tmp_path / "link").symlink_to(out / "plan.json")
    with pytest.raises(UsageError, match="holds"):
        check_destination(out, True, [tmp_path / "link"])
    monkeypatch.setenv("HOME", str(out / "sub"))
    with pytest.raises(UsageError, match="the home folder"):
        check_destination(out, True)
    monkeypatch.chdir(out / "sub")
    for given in (Path("."), Path(""), Path(".."), Path("../.."), Path("x/..")):
        with pytest.raises(UsageError, match="the working folder"):
            check_destination(given, True)
    with pytest.raises(UsageError, match="must be the name of a folder: got /"):
        check_destination(Path("/"), True)


def test_links_files_and_mounts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ours(tmp_path / "disk" / "real")
    (tmp_path / "out").symlink_to(out)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    names = {"out": "link", "dangling": "link", "loop": "link", "file": "folder", "pipe": "folder"}
    for overwrite in (True, False):
        for name, kind in names.items():
            with pytest.raises(UsageError, match=kind):
                check_destination(tmp_path / name, overwrite)
        for path in (tmp_path / "file" / "out", tmp_path / "loop" / "out", Path("/dev/null")):
            with pytest.raises(UsageError, match=r"--out|exists"):
                check_destination(path, overwrite)
    (tmp_path / "way").symlink_to(tmp_path / "disk")  # above a destination they are followed
    replace(tmp_path / "way" / "real")
    assert said(out) == "new" and entries(tmp_path / "disk") == ["real"]
    monkeypatch.setattr(atomic, "mounted_within", lambda _: out / "sub")
    with pytest.raises(UsageError, match=f"something is mounted on {out / 'sub'}"):
        check_destination(out, True)


def test_mounts_are_known() -> None:
    assert system.mounted_within(Path("/")) == Path("/")
    assert system.mounted_within(Path(__file__).parent) is None
    if Path("/proc/self/mountinfo").exists():
        assert system.mounted_within(Path("/proc")) == Path("/proc")


def test_removing_leaves_what_is_not_ours(tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    assert remove_ours(ours(tmp_path / "whole")) and not (tmp_path / "whole").exists()
    (out / "sub" / "mine").write_text("precious")
    assert not remove_ours(out)
    assert [p.name for p in out.rglob("*")] == ["sub", "mine"]


@pytest.mark.usefixtures("printed")
def test_what_comes_into_the_old_output_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ours(tmp_path / "out")

    def late(one: Path, other: Path) -> bool:
        (other / "mine").write_text("precious")
        return exchange(one, other)

    monkeypatch.setattr(atomic, "exchange", late)
    replace(out)
    assert said(out) == "new" and entries(tmp_path) == ["out", "out-2"]
    assert entries(tmp_path / "out-2") == ["mine"]
    assert f"is in {tmp_path / 'out-2'}" in capsys.readouterr().err


def test_two_runs_never_share_a_destination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in two containers, where both are process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    out = tmp_path / "out"
    with reserved(out) as place:
        for overwrite in (True, False):
            with pytest.raises(UsageError, match=f"another run is writing {out}"):
                check_destination(out, overwrite)
        with pytest.raises(UsageError, match="another run"), reserved(out):
            pytest.fail("never reached")
        with place.folder() as folder:
            (folder / "plan.json").write_text("first")
            with pytest.raises(UsageError, match="another run"):
                replace(out)
        with pytest.raises(UsageError, match="another run"):  # its reports are still to come
            replace(out)
        with atomic_folder(tmp_path / "out2"):
            pass
    assert said(out) == "first" and entries(tmp_path) == ["out", "out2"]
    replace(out)
    assert said(out) == "new"


HOLDS = """
import sys
from pathlib import Path
from mixbits.files.atomic import reserved, scratch_folder
scratch = scratch_folder(Path(sys.argv[1]).parent, 0)
with reserved(Path(sys.argv[1]), overwrite=True) as place, place.folder() as folder:
    (folder / "half").write_text("half")
    print("here", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_has_left_goes_and_what_a_living_one_has_stays(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-c", HOLDS, str(out)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"here\n"
        held = entries(tmp_path)
        assert [name.rpartition("-")[0] for name in held] == [
            ".mixbits-scratch",
            ".mixbits-scratch",
            ".out.lock",
            ".out.partial",
        ]
        with pytest.raises(UsageError, match="another run"):
            replace(out)
        del_me = scratch_folder(tmp_path, 0)
        del_me.cleanup()
        assert entries(tmp_path) == held
        other.kill()
    stay = [".other.partial-1", ".out.partial-mine", "out2"]
    for name in stay:
        (tmp_path / name).mkdir()
    assert set(held) < set(entries(tmp_path))
    scratch_folder(tmp_path, 0).cleanup()
    replace(out)
    assert entries(tmp_path) == sorted([*stay, "out"])


def test_a_lock_goes_from_hand_to_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    first = Lock.take(path)
    assert first is not None and first.is_exclusive and Lock.take(path) is None
    flock, late = system.fcntl.flock, [first]

    def removed_meanwhile(descriptor: int, operation: int) -> None:
        if late:
            late.pop().release()  # between our opening the file and locking it
        flock(descriptor, operation)

    monkeypatch.setattr(system.fcntl, "flock", removed_meanwhile)
    second = Lock.take(path)
    assert second is not None and path.exists() and Lock.take(path) is None
    second.release()
    second.release()
    assert entries(tmp_path) == []


def test_without_locks_nobody_else_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(system.fcntl, "flock", unknown)
    out = ours(tmp_path / "out")
    with atomic_folder(out, overwrite=True), pytest.raises(UsageError, match=r"remove .*partial"):
        replace(out)
    replace(out)
    scratch = scratch_folder(tmp_path, 0)
    scratch_folder(tmp_path, 0).cleanup()
    assert Path(scratch.name).is_dir()
    scratch.cleanup()
    assert entries(tmp_path) == ["out"]
