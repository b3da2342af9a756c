"""plan.json: written, edited by hand, and read back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scored import linears_of_llama, made_up_scores, solved

from mixbits.errors import UsageError
from mixbits.formats.schemes import parse_scheme
from mixbits.model.layout import LinearInfo
from mixbits.model.units import Unit
from mixbits.planning.plan import (
    Budget,
    Plan,
    average_bits,
    solve,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> list[LinearInfo]:
    return linears_of_llama(tmp_path_factory.mktemp("llama"))


def test_round_trip_and_equal_bytes(tmp_path: Path, llama: list[LinearInfo]) -> None:
    a, b = (solved(llama, Budget(5.0)) for _ in range(2))
    a.write(tmp_path / "a.json")
    b.write(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    read = Plan.read(tmp_path / "a.json", llama)
    assert read == a and read.assignment == a.assignment
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_scale_modes_travel_with_the_plan(tmp_path: Path, llama: list[LinearInfo]) -> None:
    modes = ("rceil", "even")
    units = [Unit("u", tuple(llama))]
    scores = made_up_scores(llama, ["MXFP4"], modes=modes)
    schemes = [[parse_scheme("MXFP4", *modes)]]
    solve(units, schemes, scores, Budget(4.2565), "optimal").write(tmp_path / "plan.json")
    scheme = Plan.read(tmp_path / "plan.json", llama).assignment["lm_head"].scheme
    assert scheme and scheme.weight and scheme.weight.scale_mode == "rceil"
    assert scheme.activation and scheme.activation.scale_mode == "even"


def edited(path: Path, llama: list[LinearInfo], change: Any) -> Plan:
    data = solved(llama, Budget(5.0)).data
    change(data)
    path.write_text(json.dumps(data))
    return Plan.read(path, llama)


def test_an_edited_plan_is_taken(tmp_path: Path, llama: list[LinearInfo]) -> None:
    def change(data: dict[str, Any]) -> None:
        data["units"][0]["scheme"] = "w2a16g32asym"
        del data["units"][1]

    chosen = edited(tmp_path / "plan.json", llama, change).assignment
    assert chosen[llama[0].name].name == "W2A16G32ASYM"
    assert llama[1].name not in chosen
    assert len(chosen) == len(llama) - 1
    assert math.isclose(average_bits(llama[1:2], chosen), 16)


def _set(key: str, value: Any) -> Any:
    return lambda data: data["units"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("linears", {"model.layers.9.mlp.up_proj": "all"}), "no linear model.layers.9"),
        (_set("linears", {"lm_head": "all"}), "share linear lm_head"),
        (_set("linears", {"x": [0, 1]}), r"units\[0\]\.linears\.x must be 'all': got \[0, 1\]"),
        (_set("linears", ["lm_head"]), r"linears must be an object: got \['lm_head'\]"),
        (_set("linears", {}), "linears must have at least 1 item"),
        (_set("scheme", "MXFP5"), "unknown scheme 'MXFP5'.*plan.json, unit model.layers.0"),
        (_set("scheme", 4), r"units\[0\]\.scheme must be a valid string: got 4"),
        (_set("unit", None), r"units\[0\]\.unit must be a valid string: got None"),
        (_set("rotate", ["lm_head"]), "rotate must be a key that is known"),
        (_set("rotated", ["lm_head"]), "must rotate linears of its own"),
        (_set("slabs", {"MXFP4": "0-1"}), "must have either a scheme or slabs"),
        (_set("order", [1, 0]), "must have slabs where it has an order"),
        (lambda d: d["units"][0].pop("scheme"), "must have either a scheme or slabs"),
        (lambda d: d.pop("units"), "units must be there: got nothing"),
        (lambda d: d.update(units=None), "units must be a valid list: got None"),
        (lambda d: d.update(weight_scale_mode="up"), "weight_scale_mode must be 'floor', .*'up'"),
        (lambda d: d.update(predicted_loss=-1.0), "predicted_loss must be greater than or equal"),
        (lambda d: d.update(predicted_loss=math.nan), "predicted_loss must be .*: got nan"),
        (lambda d: d.update(mixbits_plan=True), "must hold 'mixbits_plan': 1: got True"),
        (lambda d: d.update(mixbits_plan=2), "must hold 'mixbits_plan': 1: got 2"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    change: Any, message: str, tmp_path: Path, llama: list[LinearInfo]
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        edited(tmp_path / "plan.json", llama, change)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_plan(tmp_path: Path, llama: list[LinearInfo]) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(UsageError, match="cannot read"):
        Plan.read(path, llama)
    for content, message in (
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "got list"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            Plan.read(path, llama)
