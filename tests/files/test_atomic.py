"""Outputs are whole or absent, replace nothing but mixbits' own, and have one run at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import entries, read

from mixbits.errors import UsageError
from mixbits.files import atomic, system
from mixbits.files.atomic import (
    Destination,
    atomic_folder,
    check_destination,
    check_room,
    recover,
    reserved,
    scratch_folder,
)
from mixbits.files.manifest import MANIFEST, Manifest, foreign, remove_ours
from mixbits.files.system import Lock, exchange, rename_new


def ours(folder: Path, text: str = "old") -> Path:
    with atomic_folder(folder) as partial:
        (partial / "plan.json").write_text(text)
        (partial / "sub").mkdir()
        (partial / "sub" / "code.py").write_text("pass")
    return folder


def replace(out: Path, text: str = "new", **options: Any) -> None:
    with atomic_folder(out, overwrite=True, **options) as folder:
        (folder / "plan.json").write_text(text)


def said(out: Path) -> str:
    return (out / "plan.json").read_text()


@pytest.fixture(params=[True, False], ids=["in one step", "in two"])
def in_one_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the kernel's exchange of names, and without."""
    if not request.param:
        monkeypatch.setattr(system, "_renameat2", lambda: None)
    return bool(request.param)


# ---------------------------------------------------------------------------- whole or absent


def test_a_folder_appears_when_complete(tmp_path: Path, in_one_step: bool) -> None:
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert entries(tmp_path / "deep") == ["out"]
    assert entries(tmp_path / "deep" / "out") == ["a", MANIFEST]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, FileExistsError])
def test_an_exception_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "deep" / "er" / "out") as folder:
        (folder / "a").write_text("a")
        raise error
    assert entries(tmp_path) == []


def test_an_output_is_replaced_only_if_asked(tmp_path: Path, in_one_step: bool) -> None:
    out = ours(tmp_path / "out")
    with pytest.raises(UsageError, match="exists: pass --overwrite"), atomic_folder(out):
        pytest.fail("never reached")
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "plan.json").write_text("new")
        assert said(out) == "old"
    assert said(out) == "new"
    assert entries(tmp_path) == ["out"] and entries(out) == [MANIFEST, "plan.json"]


def test_an_error_keeps_the_folder_that_was_to_be_replaced(
    tmp_path: Path, in_one_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ours(tmp_path / "out")

    def fail(source: Path, target: Path) -> None:
        if source.name.startswith(".out.partial"):
            raise OSError("no")
        rename_new(source, target)

    monkeypatch.setattr(atomic, "rename_new", fail)
    monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    with pytest.raises(OSError, match="no"):
        replace(out)
    assert said(out) == "old" and entries(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught, atomic_folder(tmp_path / "out"):
        os.kill(os.getpid(), number)
        pytest.fail("never reached")
    assert caught.value.code == 128 + number
    assert entries(tmp_path) == [] and signal.getsignal(number) is before


def test_what_nohup_ignores_is_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with atomic_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert entries(tmp_path) == ["out"]


DIES = """
import os, signal, sys
from pathlib import Path
from mixbits.files import atomic, manifest, system
left = [int(sys.argv[1])]
if sys.argv[3] == "in two":
    system._renameat2 = lambda: None

def die() -> None:
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1

def audit(event, arguments):
    if event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.chmod"}:
        die()
before = atomic.exchange
def exchanged(one, other):
    die()
    done = before(one, other)
    die()
    return done
atomic.exchange = exchanged
sys.addaudithook(audit)
with atomic.atomic_folder(Path(sys.argv[2]), overwrite=True) as folder:
    (folder / "plan.json").write_text("new")
    (folder / "b").write_text("b")
"""


@pytest.mark.parametrize("how", ["in one step", "in two"])
def test_killed_at_every_step_leaves_the_old_output_or_the_new_one(
    how: str, tmp_path: Path
) -> None:
    """What the next run finds, however it ends, is one of the two, whole, under its name."""
    out, found = tmp_path / "out", set()
    for step in range(60):
        shutil.rmtree(tmp_path)
        ours(out)
        pid = os.fork()
        if pid == 0:
            try:
                sys.argv = ["", str(step), str(out), how]
                exec(DIES, {})  # an audit hook cannot be taken back: not in this process
                os._exit(0)
            except BaseException:
                os._exit(3)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
        if step % 3 == 0:
            with pytest.raises(UsageError, match="exists: pass --overwrite"):
                check_destination(out, overwrite=False)
        elif step % 3 == 1:
            with pytest.raises(RuntimeError), atomic_folder(out, overwrite=True):
                raise RuntimeError
        else:
            recover(out)
        expected = (
            ["b", MANIFEST, "plan.json"] if said(out) == "new" else [MANIFEST, "plan.json", "sub"]
        )
        assert entries(out) == expected and foreign(out) is None
        found.add(said(out))
        replace(out, "newest")
        assert entries(tmp_path) == ["out"] and said(out) == "newest"
        if not os.WIFSIGNALED(status):
            break
    assert 5 < step < 59 and found == {"old", "new"}


def test_an_old_output_is_not_lost_to_what_has_appeared_in_its_place(tmp_path: Path) -> None:
    ours(tmp_path / "out").rename(atomic._beside(tmp_path / "out", "replaced"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    recover(tmp_path / "out")
    assert entries(tmp_path) == ["out", "out-2"] and said(tmp_path / "out-2") == "old"


# -------------------------------------------------------------------------- nothing but our own


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


# ------------------------------------------------------------------------------- meanwhile


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("what", ["folder", "empty", "file", "link"])
def test_what_appears_meanwhile_stays(
    what: str, overwrite: bool, tmp_path: Path, in_one_step: bool
) -> None:
    out = tmp_path / "out"
    (tmp_path / "other").mkdir()
    if what == "empty" and overwrite:
        pytest.skip("nothing is lost with it")
    expected = pytest.raises(UsageError, match=f"complete in {out}-3 ")
    with expected, atomic_folder(out, overwrite) as folder:
        (folder / "plan.json").write_text("new")
        (tmp_path / "out-2").write_text("taken")
        if what == "file":
            out.write_text("precious")
        elif what == "link":
            out.symlink_to(tmp_path / "other")
        else:
            out.mkdir()
            if what == "folder":
                (out / "thesis.tex").write_text("precious")
    assert entries(tmp_path) == ["other", "out", "out-2", "out-3"]
    assert said(tmp_path / "out-3") == "new" and foreign(tmp_path / "out-3") is None
    assert out.is_symlink() or out.is_file() or entries(out) == ["thesis.tex"][: what == "folder"]


def test_an_old_output_that_is_changed_or_goes_meanwhile(tmp_path: Path, in_one_step: bool) -> None:
    out = ours(tmp_path / "out")
    expected = pytest.raises(UsageError, match=r"complete in .*out-2 .*mixbits did not write mine")
    with expected, atomic_folder(out, overwrite=True):
        (out / "mine").write_text("precious")
    (out / "mine").unlink()
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "plan.json").write_text("new")
        shutil.rmtree(out)
    assert said(out) == "new" and entries(tmp_path) == ["out", "out-2"]


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


# ----------------------------------------------------------------------- written again


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Destination]:
    with reserved(tmp_path / "out") as place:
        with place.folder(later=["report.json"]) as folder:
            (folder / "report.json").write_text("first")
            (folder / "plan.json").write_text("{}")
        yield place


def test_reports_are_written_into_the_folder_of_their_run(
    place: Destination, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert read(out / MANIFEST)["files"]["report.json"] is None and foreign(out) is None
    (out / ".mixbits-new").write_text("half")  # of a run that was killed just then
    assert foreign(out) is None
    place.rewrite({"report.json": "scored \ud800"})
    assert (out / "report.json").read_text() == "scored \\ud800" and foreign(out) is None
    (out / "report.json").write_text("edited")
    assert foreign(out) == "report.json was changed since mixbits wrote it"


@pytest.mark.parametrize("by", ["nothing", "an output", "a copy"])
def test_no_report_goes_into_another_folder(by: str, place: Destination, tmp_path: Path) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    out.rename(moved)
    if by == "a copy":
        shutil.copytree(moved, out)
    elif by == "an output":
        ours(tmp_path / "another").rename(out)
    before = sorted(os.walk(tmp_path))
    with pytest.raises(UsageError, match="was removed or replaced by another"):
        place.rewrite({"report.json": "scored"})
    assert sorted(os.walk(tmp_path)) == before


def test_modes_are_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "model.safetensors").touch(0o600)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o640}


# --------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["x" * 255, "é" * 127, "-", "a b", "%s", "{}", "*", "a'\"b", "\u3000"]
)
def test_odd_names(name: str, tmp_path: Path) -> None:
    with reserved(tmp_path / name) as place:
        kept = place.set_aside(".scores.json", "scores")
        assert kept is not None and kept.read_text() == "scores"
        with place.folder() as folder:
            (folder / "plan.json").write_text("old")
        place.drop_aside()
    replace(tmp_path / name)
    assert entries(tmp_path) == [name] and said(tmp_path / name) == "new"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x" * 256, "too long"),
        ("y/" + "x" * 256, "too long"),
        ("x" * 256 + "/y", "too long"),
        ("x/" * 1800, "at most 3500 bytes"),
        ("a\nb", "must be printable"),
        ("a\nb/out", "must be printable"),
        ("a\x1b[2J", "must be printable"),
        ("a\udcff", "must be printable"),
        ("a\0b", "must be printable"),
    ],
)
def test_names_that_cannot_be(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=why), reserved(tmp_path / name):
        pytest.fail("never reached")
    assert entries(tmp_path) == []


# ---------------------------------------------------------------------------------- aside


def test_what_is_set_aside_is_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / "out.scores.json").write_text("theirs")
    with pytest.raises(RuntimeError), reserved(tmp_path / "out") as place:
        assert place.set_aside(".scores.json", "mine") == tmp_path / "out-2.scores.json"
        raise RuntimeError
    with reserved(tmp_path / "out") as place:  # the same again
        assert place.set_aside(".scores.json", "mine") == tmp_path / "out-2.scores.json"
        place.drop_aside()
        place.drop_aside()
    assert entries(tmp_path) == ["out.scores.json"]
    assert (tmp_path / "out.scores.json").read_text() == "theirs"


def test_what_cannot_be_set_aside_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reserved(tmp_path / "out") as place:
        place.partial = place.partial / "x"
        monkeypatch.setattr(atomic, "_beside", lambda *_: tmp_path / "no" / "folder")
        assert place.set_aside(".scores.json", "mine") is None


# ---------------------------------------------------------------------------------- disk


def test_room_is_asked_for_first(tmp_path: Path) -> None:
    needs = shutil.disk_usage(tmp_path).free * 2
    expected = rf"{tmp_path} has [\d,]+ bytes free: {needs:,} are needed"
    with pytest.raises(UsageError, match=expected), atomic_folder(tmp_path / "out", needs=needs):
        pytest.fail("never reached")
    with pytest.raises(UsageError, match=expected):
        check_room(tmp_path / "not" / "yet", needs)
    check_room(tmp_path / "not" / "yet", 1)
    assert entries(tmp_path) == []


def full(error: Exception) -> Exception:
    try:
        raise UsageError("cannot write it") from error
    except UsageError as told:
        return told


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
    OSError("104448 requested and 34464 written"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    full(OSError(errno.ENOSPC, "x")),
]


@pytest.mark.parametrize("error", FULL, ids=lambda e: str(e)[:20])
def test_a_full_disk_is_said_to_be_full(error: Exception, tmp_path: Path) -> None:
    error.add_note("a way on")
    with pytest.raises(UsageError) as caught, atomic_folder(tmp_path / "out"):
        raise error
    assert re.fullmatch("the disk is full.*; nothing was written", str(caught.value))
    assert caught.value.__notes__ == ["a way on"] and entries(tmp_path) == []
    del error.__notes__
    expected = pytest.raises(UsageError, match=r"^the disk is full.* is complete, but its report")
    with expected, reserved(tmp_path / "out") as place:
        with place.folder() as folder:
            (folder / "plan.json").write_text("{}")
        raise error
    assert foreign(tmp_path / "out") is None


def test_other_errors_are_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no")


def test_a_manifest_is_what_was_written(tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    found = Manifest.read(out)
    assert found is not None and set(found.files) == {"plan.json", "sub/code.py"}
    entry = found.files["plan.json"]
    assert entry is not None and entry.bytes == 3
    assert entry.sha256 == hashlib.sha256(b"old").hexdigest()
