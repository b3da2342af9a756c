"""scores.json: readable, reusable, hashed, and of one model only."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixbits.errors import UsageError
from mixbits.formats.schemes import parse_scheme
from mixbits.measuring.scores import Scores, _digest, dump, write_text
from mixbits.model.layout import LinearInfo

LINEARS = [LinearInfo("a.q_proj", 4, 96, 0), LinearInfo("a.down_proj", 8, 172, 0)]
SCHEMES = [parse_scheme("MXFP4"), parse_scheme("W4A16")]
MODES = ("floor", "floor")
SHA = "1" * 64


def scores() -> Scores:
    slabs = {
        info.name: {
            s.name: [0.1 + i / 3, 2e-12 / 7] + [0.0] * (-(-info.in_features // 32) - 2)
            for i, s in enumerate(SCHEMES)
        }
        for info in LINEARS
    }
    calibration = {"source": "text", "nsamples": 2, "seqlen": 8, "sha256": "2" * 64, "seed": 0}
    return Scores.build(slabs, LINEARS, "fisher", MODES, {"name": "m", "sha256": SHA}, calibration)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    scores().write(tmp_path / "scores.json")
    return tmp_path / "scores.json"


def test_round_trip_and_equal_bytes(path: Path) -> None:
    read = Scores.read(path)
    assert read == scores()
    other = path.with_name("again.json")
    read.write(other)
    assert other.read_bytes() == path.read_bytes()
    read.check(path, LINEARS, [*SCHEMES, parse_scheme("BF16")], MODES, SHA)


def test_numbers_have_nine_digits_and_sum_up(path: Path) -> None:
    row = Scores.read(path).data["linears"]["a.q_proj"]
    assert row["shape"] == [4, 96]
    assert row["slabs"]["W4A16"] == [0.433333333, 2.85714286e-13, 0.0]
    assert row["scores"]["W4A16"] == 0.433333333
    assert Scores.read(path).score("a.q_proj", SCHEMES[1]) == 0.433333333
    assert Scores.read(path).score("a.q_proj", parse_scheme("BF16")) == 0.0
    assert '"shape": [4, 96],\n' in path.read_text()  # lists of numbers are on one line


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["linears"]["a.q_proj"]["scores"].update(MXFP4=0.0),
        lambda d: d["model"].update(sha256="3" * 64),
        lambda d: d["calibration"].update(seed=1),
        lambda d: d["linears"].pop("a.q_proj"),
        lambda d: d.update(note="mine"),
        lambda d: d.pop("sha256"),
    ],
)
def test_an_edited_file_is_refused(change: Any, path: Path) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=r"hash in .*scores.json does not match its content"):
        Scores.read(path)


def test_other_layout_of_the_same_content_is_taken(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()), separators=(",", ":")))
    assert Scores.read(path) == scores()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LINEARS, SCHEMES, MODES, "9" * 64), "measured on another model, m$"),
        ((LINEARS, SCHEMES, ("rceil", "floor"), SHA), "pass --weight-scale-mode floor"),
        ((LINEARS, SCHEMES, ("floor", "even"), SHA), "pass --act-scale-mode floor"),
        (
            (LINEARS, [parse_scheme("MXFP8")], MODES, SHA),
            "no scores for MXFP8, only for MXFP4, W4A16",
        ),
        (
            ([replace(LINEARS[0], in_features=64)], SCHEMES, MODES, SHA),
            r"no scores for a.q_proj \[4, 64\]",
        ),
        (([replace(LINEARS[0], name="b")], SCHEMES, MODES, SHA), r"no scores for b \[4, 96\]"),
    ],
)
def test_scores_of_something_else_are_refused(arguments: Any, message: str, path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        Scores.read(path).check(path, *arguments)


def test_scale_modes_count_for_schemes_that_have_them(path: Path) -> None:
    integers, weights_only = [parse_scheme("W4A16")], [parse_scheme("MXFP4A16", "floor", "even")]
    found = Scores.read(path)
    found.check(path, LINEARS, integers, ("rceil", "even"), SHA)
    with pytest.raises(UsageError, match="no scores for MXFP4A16"):  # and not of activations' mode
        found.check(path, LINEARS, weights_only, ("floor", "even"), SHA)
    with pytest.raises(UsageError, match="scale mode floor of weights: got even"):
        found.check(path, LINEARS, weights_only, ("even", "floor"), SHA)


def test_scores_know_what_their_sequences_began_with(path: Path) -> None:
    old = Scores.read(path)  # of a version that knew no prefix
    old.check(path, LINEARS, SCHEMES, MODES, SHA, ())
    with pytest.raises(UsageError, match=r"begin with nothing, .* tokens \[2\] here.*--no-bos"):
        old.check(path, LINEARS, SCHEMES, MODES, SHA, (2,))
    new = Scores({**old.data, "calibration": {**old.data["calibration"], "prefix": [2]}})
    new.check(path, LINEARS, SCHEMES, MODES, SHA, (2,))
    new.check(path, LINEARS, SCHEMES, MODES, SHA)
    with pytest.raises(UsageError, match=r"begin with tokens \[2\], .* nothing here: measure"):
        new.check(path, LINEARS, SCHEMES, MODES, SHA, ())


@pytest.mark.parametrize("datasets", [0, -1, 1.5, "2"])
def test_a_number_of_datasets_that_is_none_is_refused(datasets: object, path: Path) -> None:
    data = scores().data
    data["calibration"]["datasets"] = datasets
    data["sha256"] = _digest(data)
    Scores(data).write(path)
    with pytest.raises(UsageError, match=r"calibration\.datasets must"):
        Scores.read(path)


def test_json_for_people_is_json() -> None:
    data = {
        "rows": [{"a": [1, 2.5]}, {"b": []}, "@list0@", [["x", [3]]]],
        "name": 'Ünï"code\n',
        "nan": float("nan"),
        "deep": {"inf": [{"x": float("inf")}]},
    }
    text = dump(data)
    expected = {**data, "nan": None, "deep": {"inf": [{"x": None}]}}
    assert json.loads(text, parse_constant=pytest.fail) == expected
    assert re.search(r'"a": \[1, 2\.5\]$', text, re.M)


def test_numbers_that_are_none_are_null_in_lists_too() -> None:
    assert json.loads(dump({"x": [float("nan"), 1.0]}), parse_constant=pytest.fail) == {
        "x": [None, 1.0]
    }


def test_a_big_file_takes_one_pass() -> None:
    data = {str(i): [float(i)] * 3 for i in range(20_000)}
    assert json.loads(dump(data)) == data


def test_writing_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def fail(number: int) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
