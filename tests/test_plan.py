"""Counting bits, solving for a plan, and plan.json as something that people edit."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model
from transformers import AutoConfig

from mixbits.formats import UsageError, parse_scheme
from mixbits.model import LinearInfo, Unit, find_linears, make_units, meta_model
from mixbits.plan import (
    Budget,
    Plan,
    average_bits,
    parse_keep,
    solve,
    unit_options,
)
from mixbits.scores import Scores

MODES = ("floor", "floor")
MX = [parse_scheme("MXFP4"), parse_scheme("MXFP8")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> list[LinearInfo]:
    folder = make_model(tmp_path_factory.mktemp("llama"))
    return find_linears(meta_model(AutoConfig.from_pretrained(folder)), include_head=True)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> list[LinearInfo]:
    folder = make_model(tmp_path_factory.mktemp("moe"), "qwen3_moe")
    return find_linears(meta_model(AutoConfig.from_pretrained(folder)))


def made_up_scores(linears: list[LinearInfo], names: list[str], **kwargs: Any) -> Scores:
    """Coarser formats hurt more, and later linears more than earlier ones."""
    slabs = {
        info.name: {
            name: [(1 + index) * 2.0 ** -parse_scheme(name).element_bits] * 3 for name in names
        }
        for index, info in enumerate(linears)
    }
    model = {"name": "made up", "sha256": "0" * 64}
    return Scores.build(slabs, linears, "fisher", kwargs.get("modes", MODES), model, {"seed": 0})


def solved(
    linears: list[LinearInfo],
    budget: Budget,
    names: tuple[str, ...] = ("MXFP4", "MXFP8"),
    keep: tuple[str, ...] = (),
    strategy: str = "optimal",
    **units: bool,
) -> Plan:
    grouped = make_units(linears, **units)
    kept = [parse_keep(text, MODES) for text in keep]
    schemes = [parse_scheme(name) for name in names]
    known = list(dict.fromkeys([*names, *(s.name for _, s in kept if s.weight)]))
    options = unit_options(grouped, schemes, kept)
    return solve(grouped, options, made_up_scores(linears, known), budget, strategy)


# ------------------------------------------------------------------------------------- counting

ROWS = 3


@pytest.mark.parametrize(
    ("name", "columns", "bytes_per_row"),
    [
        ("MXFP4", 256, 4.25 * 32),
        ("MXFP8", 256, 8.25 * 32),
        ("MXFP8E5M2A16", 256, 8.25 * 32),
        ("W4A16", 256, 4.125 * 32),
        ("W4A16G64", 256, 4.25 * 32),
        ("W4A16G32", 256, 4.5 * 32),
        ("W2A16", 256, 2.125 * 32),
        ("W8A16", 256, 8.125 * 32),
        ("W8A16ASYM", 256, 8.1875 * 32),
        ("W4A16ASYM", 256, 4.15625 * 32),
        ("W2A16ASYM", 512, 2.140625 * 64),
        ("BF16", 256, 16 * 32),
        # 172 columns: 6 groups of 32, 3 of 64, 2 of 128; rows end at a byte
        ("MXFP4", 172, 86 + 6),
        ("MXFP8", 172, 172 + 6),
        ("W4A16", 172, 86 + 2 * 2),
        ("W4A16G64", 172, 86 + 3 * 2),
        ("W4A16ASYM", 172, 86 + 2 * 2 + 1),
        ("W2A16", 172, 43 + 2 * 2),
        ("W2A16G32ASYM", 172, 43 + 6 * 2 + 2),
        ("W8A16ASYM", 172, 172 + 2 * 2 + 2),
        ("BF16", 172, 344),
    ],
)
def test_everything_stored_is_counted(name: str, columns: int, bytes_per_row: float) -> None:
    info = LinearInfo("a", ROWS, columns, 0)
    assert parse_scheme(name).storage_bits(ROWS, columns) == 8 * ROWS * bytes_per_row
    average = average_bits([info], {"a": parse_scheme(name)})
    assert average == pytest.approx(8 * bytes_per_row / columns, rel=1e-15)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("MXFP4", 4), ("MXFP8", 8), ("W2A16G32ASYM", 2), ("W4A16", 4), ("W8A16", 8), ("BF16", 16)],
)
def test_without_scale_bits_elements_are_counted(name: str, bits: int) -> None:
    assert parse_scheme(name).storage_bits(ROWS, 172, True) == bits * ROWS * 172


def test_the_average_is_weighted_by_size_and_linears_without_a_scheme_count_16() -> None:
    linears = [LinearInfo("a", 1, 256, 0), LinearInfo("b", 3, 256, 0)]
    assert average_bits(linears, {"a": MX[0]}) == (4.25 + 3 * 16) / 4
    assert average_bits(linears, {"a": MX[0]}, ignore_scale_bits=True) == (4 + 3 * 16) / 4


# -------------------------------------------------------------------------------------- solving


def test_the_budget_is_kept_and_used(llama: list[LinearInfo]) -> None:
    for ignore in (False, True):
        for bits in (4.4, 5.0, 6.25, 7.9):
            plan = solved(llama, Budget(avg_bits=bits, ignore_scale_bits=ignore))
            reached = average_bits(llama, plan.assignment, ignore)
            assert reached <= bits
            for info in llama:  # no room for any one linear more
                if plan.assignment[info.name] == MX[0]:
                    more = {**plan.assignment, info.name: MX[1]}
                    assert average_bits(llama, more, ignore) > bits


def test_the_two_ways_of_counting_give_the_published_tables_plans(llama: list[LinearInfo]) -> None:
    assert set(solved(llama, Budget(8, ignore_scale_bits=True)).assignment.values()) == {MX[1]}
    assert set(solved(llama, Budget(4, ignore_scale_bits=True)).assignment.values()) == {MX[0]}
    assert set(solved(llama, Budget(8)).assignment.values()) == set(MX)


def test_a_budget_that_is_exactly_a_scheme_buys_that_scheme() -> None:
    linears = [LinearInfo(f"l{i}", 7, 96, i) for i in range(3)]
    for scheme in ("MXFP4", "MXFP8"):
        bits = average_bits(linears, {i.name: parse_scheme(scheme) for i in linears})
        chosen = {s.name for s in solved(linears, Budget(bits)).assignment.values()}
        assert chosen == {scheme}


def test_out_of_reach_names_the_lowest_and_highest_and_these_are_reachable(
    llama: list[LinearInfo],
) -> None:
    for bits in (2.0, 9.0):
        with pytest.raises(UsageError) as caught:
            solved(llama, Budget(bits))
        found = re.search(r"--avg-bits must be between (\S+) and (\S+) for", str(caught.value))
        assert found
        low, high = map(float, found.groups())
        assert 4.25 < low < high < 8.27
        for reachable in (low, high):
            solved(llama, Budget(reachable))
    with pytest.raises(UsageError, match=r"--size must be at least [\d,]+ bytes.*got 5"):
        solved(llama, Budget(size_bytes=5))


def test_keep_takes_a_wildcard_or_a_regex_and_the_last_one_wins(llama: list[LinearInfo]) -> None:
    keep = ("*.down_proj=MXFP8", r"re:.*\.1\.mlp\..*=W4A16", "lm_head=BF16")
    chosen = {n: s.name for n, s in solved(llama, Budget(7.0), keep=keep).assignment.items()}
    assert chosen["model.layers.0.mlp.down_proj"] == "MXFP8"
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        assert chosen[f"model.layers.1.mlp.{leaf}"] == "W4A16"
    assert chosen["lm_head"] == "BF16"
    others = {s for n, s in chosen.items() if "mlp" not in n and n != "lm_head"}
    assert others <= {"MXFP4", "MXFP8"}


@pytest.mark.parametrize("text", ["down_proj", "=MXFP8", "*.down_proj=", "*.down_proj=FP3", ""])
def test_a_bad_keep_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--keep must be|unknown scheme"):
        parse_keep(text, MODES)


@pytest.mark.parametrize("pattern", ["*.nothing", "re:[", "re:down_proj"])
def test_a_keep_that_names_nothing_is_refused(pattern: str, llama: list[LinearInfo]) -> None:
    with pytest.raises(UsageError, match=r"matches no unit|is not a regular expression"):
        unit_options(make_units(llama), MX, [(pattern, MX[0])])


def test_fused_linears_agree(llama: list[LinearInfo]) -> None:
    chosen = solved(llama, Budget(6.0), fuse=True).assignment
    for block in ("model.layers.0", "model.layers.1"):
        assert len({chosen[f"{block}.self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert len({chosen[f"{block}.mlp.{x}_proj"] for x in ("gate", "up")}) == 1
    assert list(chosen) == [info.name for info in llama]  # nothing is lost, the order stays


def test_experts_of_a_block_agree_unless_freed(moe: list[LinearInfo]) -> None:
    def by_block(plan: Plan) -> list[set[str]]:
        return [
            {plan.assignment[i.name].name for i in moe if i.is_expert and i.block == block}
            for block in (0, 1)
        ]

    assert all(len(names) == 1 for names in by_block(solved(moe, Budget(6.0))))
    assert any(len(names) == 2 for names in by_block(solved(moe, Budget(5.5), per_expert=True)))
    keep = ("*.experts.2.*=BF16",)
    freed = solved(moe, Budget(9.0), keep=keep, per_expert=True).assignment
    assert {n for n, s in freed.items() if s.name == "BF16"} == {
        i.name for i in moe if ".experts.2." in i.name
    }


def test_a_single_scheme_says_its_bits_and_takes_them(llama: list[LinearInfo]) -> None:
    with pytest.raises(UsageError, match=r"between 4\.2565 and 4\.2565 for these schemes: got 5"):
        solved(llama, Budget(5.0), ("MXFP4",))
    assert set(solved(llama, Budget(4.2565), ("MXFP4",)).assignment.values()) == {MX[0]}


def test_uniform_takes_one_scheme(llama: list[LinearInfo]) -> None:
    most = average_bits(llama, {info.name: MX[1] for info in llama})
    for bits, expected in ((most - 1e-3, "MXFP4"), (most, "MXFP8")):
        plan = solved(llama, Budget(bits), strategy="uniform")
        assert {s.name for s in plan.assignment.values()} == {expected}
        assert plan.data["predicted_loss"] >= plan.data["lower_bound"]


# ------------------------------------------------------------------------------------ plan.json


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
    scheme = Plan.read(tmp_path / "plan.json", llama).assignment["lm_head"]
    assert scheme.weight and scheme.weight.scale_mode == "rceil"
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
        (_set("linears", {"model.layers.0.self_attn.q_proj": [0, 1]}), "must cover 'all' slabs"),
        (_set("linears", ["lm_head"]), "must have scale modes and units"),
        (_set("scheme", "MXFP5"), "unknown scheme 'MXFP5'"),
        (_set("scheme", 4), "must have scale modes and units"),
        (lambda d: d["units"][0].pop("scheme"), "must have scale modes and units"),
        (lambda d: d.pop("units"), "must have scale modes and units"),
        (lambda d: d.update(units=None), "must have scale modes and units"),
        (lambda d: d.update(weight_scale_mode="up"), "scale mode must be one of"),
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
        (b"[]", "got 'list'"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            Plan.read(path, llama)
