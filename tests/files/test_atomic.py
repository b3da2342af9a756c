"""Outputs are whole or absent, whatever happens meanwhile."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from outputs import ours, replace, said
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
)
from mixbits.files.manifest import MANIFEST, Manifest, foreign
from mixbits.files.system import ended_by_signals, rename_new


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
    with (
        pytest.raises(SystemExit) as caught,
        ended_by_signals(),
        atomic_folder(tmp_path / "out"),
    ):
        os.kill(os.getpid(), number)
        pytest.fail("never reached")
    assert caught.value.code == 128 + number
    assert entries(tmp_path) == [] and signal.getsignal(number) is before


def test_what_nohup_ignores_is_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals(), atomic_folder(tmp_path / "out"):
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
