"""What an engine can hold is told before anything is made for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import SMALL, make_model, read, write_ids

from mixbits import quantize
from mixbits.errors import UsageError
from mixbits.export.__main__ import main as export
from mixbits.export.targets import TARGETS, check_fused, check_together, fit
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import BF16, Recipe, parse_scheme
from mixbits.model.experts import EXPERT_PROJECTIONS as PROJECTIONS
from mixbits.model.layout import LinearInfo


def linear(name: str = "a.q_proj", rows: int = 64, columns: int = 128) -> LinearInfo:
    return LinearInfo(name, rows, columns, 0)


def scheme(name: str, mode: str = "even") -> Recipe:
    return parse_recipe(name, act_scale_mode=mode)  # type: ignore[arg-type]


HELD = {
    "compressed-tensors": "MXFP4 MXFP8 MXFP4A16 MXFP8A16 W4A16 W8A16G64 W4A16G32ASYM BF16 W2A16 "
    "NVFP4A16 NVFP4xMXFP8 MXFP6A16 MXFP6xMXFP8 MXFP4xMXFP8 FP8 FP8A16 W3A16 W5A16G32ASYM W6A16G64 "
    "W4xINT8 W8xINT8 W4xFP8 W4xMXFP8",
    "vllm": "MXFP4 MXFP8A16 W4A16 BF16 FP8 FP8A16",
    "gguf": "MXFP4 MXFP4A16 W2A16 W4A16G32 W8A16 BF16 MXFP4xMXFP8 W4xINT8",
}
NOT_HELD = {
    "compressed-tensors": "MXFP8E5M2 MXFP8E5M2A16 NVFP4 MXFP6 MXINT8 MXINT8A16 MXFP4xFP8 "
    "NVFP4xINT8 W4xMXINT8 W8xNVFP4 FP8xMXFP8E5M2",
    "vllm": "W2A16G32 MXFP8E5M2 NVFP4A16 NVFP4 MXFP6A16 MXFP4xMXFP8 W3A16 W4xFP8 W8xINT8 FP8xMXFP8",
    # Its activations are in mode `even`.
    "auto-round": "MXFP4A16 MXFP8A16 MXFP8E5M2 MXFP4 NVFP4 NVFP4A16 MXFP6 MXINT8 FP8 W3A16 W4xINT8 "
    "MXFP4xMXFP8",
    "gguf": "MXFP8 MXFP8A16 W4A16ASYM W8A16ASYM NVFP4 NVFP4A16 MXFP6 MXINT8 FP8 W3A16 W4ASYMxINT8",
}


@pytest.mark.parametrize("target", HELD)
def test_what_it_holds_stays_what_it_is(target: str) -> None:
    info = linear()
    for name in HELD[target].split():
        found = fit(TARGETS[target], [info], {info.name: scheme(name)})
        assert found == {} if name == "BF16" else found[info.name].scheme.name == name


@pytest.mark.parametrize("target", NOT_HELD)
def test_what_it_does_not_hold_is_named_or_converted(target: str) -> None:
    linears = [linear(f"layer.{i}") for i in range(5)]
    for name in NOT_HELD[target].split():
        plan = {info.name: scheme(name) for info in linears}
        with pytest.raises(UsageError, match=r"5 of 5 .*layer\.0 .*layer\.2 .*and 2 more"):
            fit(TARGETS[target], linears, plan)
        found = fit(TARGETS[target], linears, plan, lossy=True)["layer.0"]
        assert found.why and found.scheme.weight is not None
        again = {info.name: Recipe.plain(found.scheme) for info in linears}
        assert fit(TARGETS[target], linears, again)["layer.0"].why is None


@pytest.mark.parametrize(
    ("target", "name", "instead", "why"),
    [
        ("compressed-tensors", "NVFP4", "NVFP4A16", "a scale that was measured beforehand"),
        ("compressed-tensors", "MXFP6", "MXFP6A16", "6 bits by another rule"),
        ("compressed-tensors", "MXFP4xFP8", "MXFP4A16", "is MXFP4xFP8"),
        ("compressed-tensors", "W4xMXINT8", "W4A16G128", "is W4xMXINT8"),
        ("compressed-tensors", "MXINT8", "MXFP8", "is MXINT8"),
        ("vllm", "NVFP4A16", "MXFP8A16", "is NVFP4A16"),
        ("vllm", "W8xINT8", "W8A16G128", "is W8xINT8"),
        ("gguf", "NVFP4A16", "W8A16G32", "is NVFP4A16"),
        ("auto-round", "NVFP4", "MXFP8", "is NVFP4;"),
        ("auto-round", "W4G32xINT8", "W4A16G32", "is W4G32xINT8"),
    ],
)
def test_what_takes_the_place_of_what_is_not_held(
    target: str, name: str, instead: str, why: str
) -> None:
    """The same weights where only activations are in the way."""
    info, plan = linear(), {"a.q_proj": scheme(name)}
    with pytest.raises(UsageError, match=why):
        fit(TARGETS[target], [info], plan)
    found = fit(TARGETS[target], [info], plan, lossy=True)[info.name].scheme
    assert found.name.replace("G128", "") == instead.replace("G128", "")


def test_groups_of_activations_are_whole_too() -> None:
    for name, columns, fits in (("FP8", 172, True), ("FP8xMXFP8", 172, False), ("FP8A16", 1, True)):
        plan = {"a": scheme(name)}
        found = fit(TARGETS["compressed-tensors"], [linear("a", 8, columns)], plan, lossy=True)
        assert (found["a"].why is None) == fits
    assert found["a"].scheme.name == "FP8A16"


def test_auto_round_rounds_activations_by_floor() -> None:
    info = linear()
    assert not fit(TARGETS["auto-round"], [info], {info.name: scheme("MXFP4", "floor")})[
        info.name
    ].why
    plan = {info.name: scheme("MXFP4", "even")}
    with pytest.raises(UsageError, match="scale mode even, not floor"):
        fit(TARGETS["auto-round"], [info], plan)
    converted = fit(TARGETS["auto-round"], [info], plan, lossy=True)[info.name].scheme
    assert converted == scheme("MXFP4", "floor").scheme  # the same weights


def test_slabs_and_rotations_become_eight_bits() -> None:
    slabs = Recipe(((parse_scheme("MXFP4A16"), 64), (parse_scheme("MXFP8A16"), 64)))
    rotated = Recipe(((parse_scheme("MXFP4"), 128),), rotated=True)
    info = linear()
    for target, recipe, instead in (
        ("vllm", slabs, "MXFP8A16"),
        ("vllm", rotated, "MXFP8"),
        ("gguf", slabs, "W8A16G32"),
        ("auto-round", slabs, "W8A16G32"),
    ):
        with pytest.raises(UsageError, match=r"slabs|rotated"):
            fit(TARGETS[target], [info], {info.name: recipe})
        assert fit(TARGETS[target], [info], {info.name: recipe}, True)[info.name].scheme.name == (
            instead
        )


def test_short_groups_are_left_in_16_bits() -> None:
    for rows, columns, target, name in (
        (64, 172, "vllm", "MXFP4A16"),
        (64, 172, "gguf", "MXFP4"),
        (65, 128, "auto-round", "W4A16"),
    ):
        info = linear("a", rows, columns)
        with pytest.raises(UsageError, match=f"{columns} columns|{rows} rows"):
            fit(TARGETS[target], [info], {"a": scheme(name)})
        assert fit(TARGETS[target], [info], {"a": scheme(name)}, True)["a"].scheme == BF16
    # The groups of a GGUF are shorter than ours.
    assert fit(TARGETS["gguf"], [linear("a", 3, 96)], {"a": scheme("W4A16")})["a"].why is None


def experts(count: int = 2) -> list[LinearInfo]:
    """Of one layer, whose down projections are too narrow for groups of 64."""
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    return [
        LinearInfo(f"m.experts.{expert}.{name}", *shape, 0, is_expert=True)
        for expert in range(count)
        for name, shape in shapes.items()
    ]


@pytest.mark.parametrize(
    ("target", "names", "obstacle", "instead"),
    [
        ("gguf", {"0.up_proj": "W8A16G32"}, "m.experts.up_proj", {"up_proj": "W8A16G32"}),
        ("gguf", {"0.up_proj": "BF16"}, "m.experts.up_proj", {"up_proj": "BF16"}),
        ("vllm", {"0.up_proj": "MXFP8A16"}, "m.experts", dict.fromkeys(PROJECTIONS, "MXFP8A16")),
        (
            "compressed-tensors",
            {"1.down_proj": "BF16"},
            "m.experts",
            dict.fromkeys(PROJECTIONS, "BF16"),
        ),
    ],
)
def test_experts_agree(
    target: str, names: dict[str, str], obstacle: str, instead: dict[str, str]
) -> None:
    linears = experts()
    plan = {info.name: scheme("MXFP4A16") for info in linears}
    assert all(found.why is None for found in fit(TARGETS[target], linears, plan).values())
    plan |= {f"m.experts.{name}": scheme(other) for name, other in names.items()}
    with pytest.raises(
        UsageError, match=rf"{obstacle} takes one scheme for all experts, not \w+, "
    ):
        fit(TARGETS[target], linears, plan)
    fits = fit(TARGETS[target], linears, plan, lossy=True)
    for info in linears:
        if plan[info.name].packed:
            wanted = instead.get(info.name.rpartition(".")[2], "MXFP4A16")
            assert fits[info.name].scheme.name == wanted
            assert (fits[info.name].why is None) == (wanted == "MXFP4A16")
        else:
            assert info.name not in fits


@pytest.mark.parametrize(
    ("name", "instead"),
    [("NVFP4A16", "MXFP8A16"), ("W4G32xINT8", "W4A16G32"), ("FP8", "FP8"), ("MXFP6A16",) * 2],
)
def test_experts_that_loaders_do_not_read(name: str, instead: str) -> None:
    linears = experts()
    plan = {info.name: scheme(name) for info in linears}
    if name != instead:
        with pytest.raises(UsageError, match=f"is {name}, which .* experts"):
            fit(TARGETS["compressed-tensors"], linears, plan)
    fits = fit(TARGETS["compressed-tensors"], linears, plan, lossy=True)
    assert {found.scheme.name for found in fits.values()} == {instead}


def test_experts_of_unlike_projections() -> None:
    linears, names = experts(), ("MXFP4A16", "W8A16G32", "MXFP4")
    plan = {info.name: scheme(names[i % 3]) for i, info in enumerate(linears)}
    assert all(found.why is None for found in fit(TARGETS["gguf"], linears, plan).values())
    with pytest.raises(UsageError, match="MXFP4, MXFP4A16, W8A16G32"):
        fit(TARGETS["vllm"], linears, plan)
    # A GGUF has no activations' schemes, by which these alone differ.
    plan = {info.name: scheme("MXFP4A16" if i < 3 else "MXFP4") for i, info in enumerate(linears)}
    assert all(found.why is None for found in fit(TARGETS["gguf"], linears, plan).values())
    with pytest.raises(UsageError, match="MXFP4, MXFP4A16"):
        fit(TARGETS["vllm"], linears, plan)


def test_experts_of_auto_round_are_free() -> None:
    linears, names = experts(), ("MXFP4", "MXFP8", "BF16")
    plan = {info.name: scheme(names[i % 3], "floor") for i, info in enumerate(linears)}
    fits = fit(TARGETS["auto-round"], linears, plan)
    assert len(fits) == 4 and all(found.why is None for found in fits.values())


def test_schemes_that_cannot_stand_together() -> None:
    both = [parse_scheme("MXFP4"), parse_scheme("W4A16")]
    with pytest.raises(UsageError, match="MXFP4 and W4A16"):
        check_together(TARGETS["auto-round"], both)
    check_together(TARGETS["vllm"], both)
    groups, plan = [["a", "b"]], {"a": Recipe.plain(both[0]), "b": Recipe.plain(both[1])}
    with pytest.raises(UsageError, match="a, b take MXFP4, W4A16"):
        check_fused(TARGETS["vllm"], groups, plan)
    check_fused(TARGETS["compressed-tensors"], groups, plan)
    with pytest.raises(UsageError, match="a, b take BF16, MXFP4"):
        check_fused(TARGETS["vllm"], groups, {"a": plan["a"]})


# --- python -m mixbits.quantize --target ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--target vllm", "172 columns"),
        ("--target gguf --schemes MXFP4,MXFP8 --keep *.down_proj=BF16", "MXFP8"),
        (
            "--target auto-round --schemes MXFP4,W8A16G32 --keep *.down_proj=BF16",
            "MXFP4 and W8A16G32",
        ),
        ("--target vllm --granularity slab", "--granularity slab"),
        ("--target vllm --rotate ffn", "--rotate ffn"),
        ("--target gguf --per-expert", "--per-expert"),
        ("--target auto-round --act-scale-mode rceil", "scale mode floor"),
        ("--target vllm --plan PLAN", "gate_proj, model.layers.0.mlp.up_proj take BF16, MXFP8"),
    ],
)
def test_a_target_is_checked_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    model = make_model(tmp_path / "model")
    (tmp_path / "plan.json").write_text(
        '{"mixbits_plan": 1, "weight_scale_mode": "floor", "act_scale_mode": "even", "units": [{'
        '"unit": "u", "scheme": "MXFP8", "linears": {"model.layers.0.mlp.up_proj": "all"}}]}'
    )
    (model / "model.safetensors").write_bytes(b"not read")
    argv = ["--seqlen", "32", *options.replace("PLAN", str(tmp_path / "plan.json")).split()]
    assert quantize.main([str(model), "--out", str(tmp_path / "out"), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_target_implies_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model", intermediate_size=160, vocab_size=160)
    ids = str(write_ids(tmp_path / "ids.npy"))
    for target in ("vllm", "auto-round"):
        out = tmp_path / target
        argv = [str(model), "--target", target, "--dataset", ids, "--rounding", "rtn", *SMALL]
        assert quantize.main([*argv, "--avg-bits", "5.5", "--out", str(out)]) == 0
        assert f"--format {target.replace('vllm', 'compressed-tensors')}" in capsys.readouterr().out
        plan = read(out / "plan.json")
        assert plan["act_scale_mode"] == {"vllm": "even", "auto-round": "floor"}[target]
        fused = any("+" in unit["unit"] for unit in plan["units"])
        assert fused == (target == "vllm")
        name = "compressed-tensors" if fused else target
        assert export([str(out), "--format", name, "--out", str(tmp_path / f"{target}-out")]) == 0
