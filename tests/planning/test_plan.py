"""Counting bits, solving for a plan, and plan.json as something that people edit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scored import MODES, linears_of_llama, solved
from tiny import make_model
from transformers import AutoConfig

from mixbits.errors import UsageError
from mixbits.formats.arrange import Arrangement
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import BF16, Recipe, parse_scheme
from mixbits.measuring.scores import Scores
from mixbits.model.layout import LinearInfo, find_linears, meta_model
from mixbits.model.units import make_units
from mixbits.pipeline.settings import parse_keep
from mixbits.planning.plan import (
    Budget,
    Plan,
    Problem,
    average_bits,
    format_ranges,
    parse_ranges,
    recipe_of_slabs,
    slab_width,
    solve,
    unit_options,
)

MX = [parse_scheme("MXFP4"), parse_scheme("MXFP8")]
PLAIN = [Recipe.plain(scheme) for scheme in MX]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> list[LinearInfo]:
    return linears_of_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> list[LinearInfo]:
    folder = make_model(tmp_path_factory.mktemp("moe"), "qwen3_moe")
    return find_linears(meta_model(AutoConfig.from_pretrained(folder)))


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
    average = average_bits([info], {"a": parse_recipe(name)})
    assert average == pytest.approx(8 * bytes_per_row / columns, rel=1e-15)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("MXFP4", 4), ("MXFP8", 8), ("W2A16G32ASYM", 2), ("W4A16", 4), ("W8A16", 8), ("BF16", 16)],
)
def test_without_scale_bits_elements_are_counted(name: str, bits: int) -> None:
    assert parse_scheme(name).storage_bits(ROWS, 172, True) == bits * ROWS * 172


def test_the_average_is_weighted_by_size_and_linears_without_a_scheme_count_16() -> None:
    linears = [LinearInfo("a", 1, 256, 0), LinearInfo("b", 3, 256, 0)]
    assert average_bits(linears, {"a": PLAIN[0]}) == (4.25 + 3 * 16) / 4
    assert average_bits(linears, {"a": PLAIN[0]}, ignore_scale_bits=True) == (4 + 3 * 16) / 4


# -------------------------------------------------------------------------------------- solving


def test_the_budget_is_kept_and_used(llama: list[LinearInfo]) -> None:
    for ignore in (False, True):
        for bits in (4.4, 5.0, 6.25, 7.9):
            plan = solved(llama, Budget(avg_bits=bits, ignore_scale_bits=ignore))
            reached = average_bits(llama, plan.assignment, ignore)
            assert reached <= bits
            for info in llama:  # no room for any one linear more
                if plan.assignment[info.name] == PLAIN[0]:
                    more = {**plan.assignment, info.name: PLAIN[1]}
                    assert average_bits(llama, more, ignore) > bits


def test_the_two_ways_of_counting_give_the_published_tables_plans(llama: list[LinearInfo]) -> None:
    assert set(solved(llama, Budget(8, ignore_scale_bits=True)).assignment.values()) == {PLAIN[1]}
    assert set(solved(llama, Budget(4, ignore_scale_bits=True)).assignment.values()) == {PLAIN[0]}
    assert set(solved(llama, Budget(8)).assignment.values()) == set(PLAIN)


def test_a_budget_that_is_exactly_a_scheme_buys_that_scheme() -> None:
    linears = [LinearInfo(f"l{i}", 7, 96, i) for i in range(3)]
    for scheme in ("MXFP4", "MXFP8"):
        bits = average_bits(linears, {i.name: parse_recipe(scheme) for i in linears})
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
    assert set(solved(llama, Budget(4.2565), ("MXFP4",)).assignment.values()) == {PLAIN[0]}


def test_uniform_takes_one_scheme(llama: list[LinearInfo]) -> None:
    most = average_bits(llama, {info.name: PLAIN[1] for info in llama})
    for bits, expected in ((most - 1e-3, "MXFP4"), (most, "MXFP8")):
        plan = solved(llama, Budget(bits), strategy="uniform")
        assert {s.name for s in plan.assignment.values()} == {expected}
        assert plan.data["predicted_loss"] >= plan.data["lower_bound"]


# --- slabs -----------------------------------------------------------------------------------


def slab_scores(linears: list[LinearInfo], schemes: tuple[str, ...], order: bool) -> Scores:
    generator = torch.Generator().manual_seed(1)
    slabs, arrangements = {}, {}
    for info in linears:
        count = -(-info.in_features // 32)
        base = torch.rand(count, generator=generator).double().pow(3)
        slabs[info.name] = {s: (base / 8**i).tolist() for i, s in enumerate(schemes)}
        if order:
            arrangements[info.name] = Arrangement(torch.arange(info.in_features).flip(0))
    return Scores.build(slabs, linears, "fisher", MODES, {}, {}, arrangements)


def solved_slabs(
    linears: list[LinearInfo],
    budget: Budget,
    names: tuple[str, ...] = ("MXFP4", "MXFP8"),
    **how: Any,
) -> Plan:
    units = make_units(linears, fuse=True, by_input=True)
    options = unit_options(units, [parse_scheme(n, *MODES) for n in names], [])
    scores = slab_scores(linears, names, how.pop("order", True))
    return solve(units, options, scores, budget, "optimal", slabs=True, **how)


@pytest.mark.parametrize("names", [("MXFP4", "MXFP8"), ("W2A16", "W4A16"), ("W4A16G64", "W8A16")])
@pytest.mark.parametrize("order", [False, True])
def test_slabs_keep_the_budget_with_their_orders_counted(
    llama: list[LinearInfo], names: tuple[str, ...], order: bool
) -> None:
    schemes = [parse_scheme(n, *MODES) for n in names]
    alike = [dict.fromkeys((i.name for i in llama), Recipe.plain(s)) for s in schemes]
    low, high = (average_bits(llama, recipes) for recipes in alike)
    for ignore in (False, True):
        for part in (0.3, 0.6):
            bits = low + part * (high - low) - 0.5 * ignore
            plan = solved_slabs(llama, Budget(bits, ignore_scale_bits=ignore), names, order=order)
            reached = average_bits(llama, plan.assignment, ignore)
            assert bits - 0.4 < reached <= bits
            chosen = plan.assignment.values()
            mixed = [r for r in chosen if len(r.segments) == 2]
            assert mixed or slab_width(schemes) > 32  # a slab may be a whole linear then


def test_readers_of_one_input_share_slabs_and_order(llama: list[LinearInfo]) -> None:
    chosen = solved_slabs(llama, Budget(6.0)).assignment
    for block in (0, 1):
        prefix = f"model.layers.{block}."
        for group in (("q", "k", "v"), ("gate", "up")):
            where = "self_attn" if len(group) == 3 else "mlp"
            assert len({chosen[f"{prefix}{where}.{leaf}_proj"] for leaf in group}) == 1


def test_the_dearer_scheme_goes_where_the_loss_is(llama: list[LinearInfo]) -> None:
    """The most sensitive of a linear's slabs are its 8-bit ones, and their columns come first."""
    plan = solved_slabs(llama, Budget(6.0, ignore_scale_bits=True))
    scores = slab_scores(llama, ("MXFP4", "MXFP8"), order=True)
    for unit in plan.data["units"]:
        if len(unit["slabs"]) < 2:
            continue
        names = list(unit["linears"])
        losses = [
            sum(x) for x in zip(*(scores.slab_scores(n, MX[0], 32) for n in names), strict=True)
        ]
        high = parse_ranges(unit["slabs"]["MXFP8"], 99)
        low = parse_ranges(unit["slabs"]["MXFP4"], 99)
        assert sorted(high + low) == list(range(len(scores.slab_scores(names[0], MX[0], 32))))
        recipe = plan.assignment[names[0]]
        assert recipe.order is not None
        first, columns = recipe.segments[0]
        slabs = high if first.name == "MXFP8" else low
        order = scores.order(names[0]) or []
        expected = [c for n in slabs for c in order[n * 32 : n * 32 + 32]]
        assert list(recipe.order[:columns]) == expected
    # Slabs of units of equal rows compete by loss alone.
    o_proj = [u for u in plan.data["units"] if u["unit"].endswith("o_proj")]
    taken, left = [], []
    for unit in o_proj:
        losses = scores.slab_scores(unit["unit"], MX[0], 32)
        taken += [losses[n] for n in parse_ranges(unit["slabs"].get("MXFP8", ""), 99)]
        left += [losses[n] for n in parse_ranges(unit["slabs"].get("MXFP4", ""), 99)]
    assert not taken or not left or min(taken) > max(left)


def test_ranges_of_slabs() -> None:
    assert format_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert parse_ranges("0-2,5,7-8", 9) == [0, 1, 2, 5, 7, 8]
    assert format_ranges([]) == "" and parse_ranges("", 4) == []


def test_a_short_slab_ends_its_linear() -> None:
    """172 columns: the last slab has 12, and blocks after it would begin amid a group."""
    recipe = recipe_of_slabs([(MX[1], [0, 5]), (MX[0], [1, 2, 3, 4])], 32, 172, None, False)
    assert recipe.segments == ((MX[0], 128), (MX[1], 44))
    assert recipe.order == (*range(32, 160), *range(32), *range(160, 172))


def test_one_scheme_in_the_natural_order_is_no_mixture() -> None:
    assert recipe_of_slabs([(MX[0], range(3))], 32, 96, None, False) == PLAIN[0]
    rotated = recipe_of_slabs([(MX[0], range(3))], 32, 96, None, True)
    assert rotated == Recipe(((MX[0], 96),), None, True)


@pytest.mark.parametrize("slabs", [[0, 1], [0, 1, 1], [0, 1, 2, 3]])
def test_every_slab_is_there_once(slabs: list[int]) -> None:
    with pytest.raises(UsageError, match="each of 0-2 once"):
        recipe_of_slabs([(MX[0], slabs)], 32, 96, None, False)


def test_slabs_of_bf16_are_refused() -> None:
    with pytest.raises(UsageError, match="packed groups of columns: got BF16"):
        slab_width([MX[0], BF16])
    assert slab_width(MX) == 32
    assert slab_width([parse_scheme("W2A16"), parse_scheme("W4A16G32")]) == 128


def test_a_plan_of_slabs_is_read_back_and_can_be_edited(
    llama: list[LinearInfo], tmp_path: Path
) -> None:
    plan = solved_slabs(llama, Budget(6.0))
    plan.write(tmp_path / "plan.json")
    read = Plan.read(tmp_path / "plan.json", llama)
    assert read == plan and read.assignment == plan.assignment

    data = json.loads((tmp_path / "plan.json").read_text())
    data["units"][0]["slabs"] = {"MXFP4": "0-1"}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    chosen = Plan.read(tmp_path / "plan.json", llama).assignment
    recipe = chosen["model.layers.0.self_attn.q_proj"]
    assert recipe.segments == ((MX[0], 64),)
    for slabs in ({"MXFP4": "0"}, {"MXFP4": "0-1", "MXFP8": "1"}, {"MXFP4": "0-2"}):
        data["units"][0]["slabs"] = slabs
        (tmp_path / "plan.json").write_text(json.dumps(data))
        with pytest.raises(UsageError, match="each of 0-1 once"):
            Plan.read(tmp_path / "plan.json", llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slabs": {"MXFP4": "all of them"}}, "in ranges as '0-2,5': got 'all of them'"),
        ({"slabs": {"MXFP4": "0-99999999999"}}, "in ranges as '0-2,5': got '0-99999999999'"),
        ({"slabs": {"MXFP4": "9" * 20}}, "in ranges as '0-2,5': got '9{20}'"),
        ({"slabs": {"MXFP4": "-1"}}, "in ranges as '0-2,5': got '-1'"),
        ({"slabs": {"MXFP4": "0-"}}, "in ranges as '0-2,5': got '0-'"),
        ({"slabs": {"MXFP4": "1-0"}}, "in ranges as '0-2,5': got '1-0'"),
        ({"slabs": {"MXFP4": "0-1," * 9 + "0"}}, "in ranges as '0-2,5': got '0-1'"),
        ({"slabs": {"MXFP4": "\u0660-\u0661"}}, "in ranges as '0-2,5'"),
        ({"slabs": {}, "order": None}, "each of 0-1 once: got {}"),
        ({"slabs": None}, "slabs must be an object: got None"),
        ({"slabs": {"MXFP4": 1}}, r"units\[0\]\.slabs\.MXFP4 must be a valid string: got 1"),
        ({"slabs": {"BF16": "0-1"}}, "must be packed schemes"),
        ({"order": [0, 1]}, "an order must hold each of 64 columns once: got 2"),
        ({"order": [0] * 64}, "an order must hold each of 64 columns once"),
        ({"order": [*range(1, 65)]}, "an order must hold each of 64 columns once"),
        ({"order": [*range(63), 1 << 40]}, r"order\[63\] must be less than"),
        ({"order": [*range(63), "x"]}, r"order\[63\] must be a valid integer: got 'x'"),
        ({"order": [*range(63), True]}, r"order\[63\] must be a valid integer: got True"),
        ({"slab_columns": 0}, "slab_columns must be greater than or equal to 1: got 0"),
        ({"slab_columns": -32}, "slab_columns must be greater than or equal to 1: got -32"),
        ({"slab_columns": 33}, "slab_columns must be a multiple of 32: got 33"),
        ({"slab_columns": 1 << 62}, "slab_columns must be less than or equal to"),
        ({"slab_columns": "32"}, "slab_columns must be a valid integer: got '32'"),
        ({"slab_columns": None}, "slab_columns must be there"),
    ],
)
def test_numbers_of_slabs_are_bounded_before_they_are_sizes(
    change: dict[str, Any], message: str, llama: list[LinearInfo], tmp_path: Path
) -> None:
    data = json.loads(json.dumps(solved_slabs(llama, Budget(6.0)).data))
    of_plan = "slab_columns" in change
    (data if of_plan else data["units"][0]).update(change)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message) as caught:
        Plan.read(tmp_path / "plan.json", llama)
    assert "\n" not in str(caught.value) and "plan.json" in str(caught.value)


@pytest.mark.parametrize("slabs", [False, True])
def test_a_problem_that_is_made_once_serves_every_budget(
    llama: list[LinearInfo], slabs: bool
) -> None:
    units = make_units(llama, fuse=True, by_input=True)
    options = unit_options(units, MX, [])
    scores = slab_scores(llama, ("MXFP4", "MXFP8"), order=slabs)
    problem = Problem.build(units, options, scores, slabs=slabs)
    assert len(problem.unit_of_items) + slabs == len(problem.items)
    for budget in (Budget(5.0), Budget(6.5), Budget(size_bytes=90_000)):
        allocation = problem.allocate(budget, "optimal", fixed_bytes=30_000)
        plan = problem.plan(allocation, "optimal", budget)
        assert plan == solve(
            units, options, scores, budget, "optimal", fixed_bytes=30_000, slabs=slabs
        )
        # The same bits, said in another way, buy the same.
        exact = Budget(total_bits=problem.bits(budget, 30_000), max_kl=0.1)
        assert problem.allocate(exact, "optimal") == allocation
        said = problem.plan(allocation, "optimal", exact).data["budget"]
        assert said["total_bits"] == problem.bits(exact) and said["max_kl"] == 0.1
