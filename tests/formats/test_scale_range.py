"""Weights at both ends of what scales can be: held to their digits, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import add_tokenizer, make_model, write_ids
from torch import Tensor

from mixbits import ops, quantize
from mixbits.errors import UsageError
from mixbits.formats.compensate import search
from mixbits.formats.pack import pack
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.reference import e8m0_to_float
from mixbits.formats.schemes import Recipe, parse_scheme
from mixbits.rounding.gptq import Curvature, gptq
from mixbits.rounding.nearest import check_packed, pack_recipe, packed_values

WEIGHT = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
INTEGERS = (
    "W2A16",
    "W3A16",
    "W5A16",
    "W6A16G32ASYM",
    "W4A16",
    "W4A16G32",
    "W8A16",
    "W4A16ASYM",
    "W8A16G32ASYM",
)
MX = ("MXFP4", "MXFP6", "MXINT8", "MXFP8", "MXFP8E5M2", "MXFP4A16")


def rtn(weight: Tensor, name: str) -> Tensor:
    recipe = parse_recipe(name)
    return packed_values(pack_recipe("w", weight, recipe), recipe, weight.shape[1])


def searched(weight: Tensor, name: str) -> Tensor:
    scheme = parse_scheme(name)
    packed = check_packed("w", weight, scheme, pack(search(weight, scheme.format), scheme.format))
    return packed_values([packed], Recipe.plain(scheme), weight.shape[1])


def compensated(weight: Tensor, name: str) -> Tensor:
    scheme = parse_scheme(name)
    curvature = Curvature(torch.eye(weight.shape[1]))
    (codes,) = gptq(weight, curvature, [(scheme.format, weight.shape[1])], ops.compensate_group)
    packed = check_packed("w", weight, scheme, pack(codes, scheme.format))
    return packed_values([packed], Recipe.plain(scheme), weight.shape[1])


ROUNDINGS = {"rtn": rtn, "search": searched, "gptq": compensated}
Round = Callable[[Tensor, str], Tensor]


def relative(found: Tensor, weight: Tensor) -> float:
    return float((found.double() - weight.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("name", [*INTEGERS, *MX])
@pytest.mark.parametrize("how", ROUNDINGS)
def test_weights_of_every_size_keep_their_digits_or_are_refused(how: str, name: str) -> None:
    round_to: Round = ROUNDINGS[how]
    usual, refused = relative(round_to(WEIGHT, name), WEIGHT), []
    for exponent in (
        -145,
        -138,
        -130,
        -126,
        -124,
        -60,
        -24,
        -20,
        -17,
        -15,
        -12,
        -8,
        8,
        15,
        22,
        125,
    ):
        weight = WEIGHT * 2.0**exponent
        try:
            found = round_to(weight, name)
        except UsageError as error:
            assert str(error).endswith("(w)") and f"{name} needs" in str(error)
            refused.append(exponent)
            continue
        assert relative(found, weight) < 1.5 * usual, exponent
    if name in MX:
        assert all(exponent < -120 for exponent in refused) and -145 in refused
    else:
        assert {-24, 125} <= set(refused) and not {-8, 8} & set(refused)


GOLDEN = {  # the smallest magnitudes that a format holds to their digits, all weights alike
    "W2A16": 2 * 1e-5,
    "W4A16": 8 * 1e-5,
    "W8A16": 128 * 1e-5,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_least_scale_of_integers_is_autorounds(name: str) -> None:
    ramp = torch.linspace(-1, 1, 128).expand(4, -1)
    assert relative(rtn(ramp * GOLDEN[name] * 1.01, name), ramp * GOLDEN[name] * 1.01) < 0.5
    with pytest.raises(UsageError, match=rf"{name} needs group scales of at least 1e-05.* 4 of 4"):
        rtn(ramp * GOLDEN[name] / 2, name)
    with pytest.raises(UsageError, match="needs group scales within float16: got weights up to"):
        rtn(ramp * 65520 * GOLDEN[name] / 1e-5, name)


def test_the_least_scale_of_mx_is_two_to_the_minus_127() -> None:
    assert e8m0_to_float(torch.tensor([0], dtype=torch.uint8)).item() == 2.0**-127
    for largest in (6.0, 4.0):  # codes that e2m1 has
        weight = torch.tensor([[largest, -largest / 4] * 16]) * 2.0**-127
        assert torch.equal(rtn(weight, "MXFP4"), weight)
    with pytest.raises(UsageError, match=r"MXFP4 needs group scales of at least 2\^-127: got 1 of"):
        rtn(torch.full((1, 32), 2.0**-129), "MXFP4")


@pytest.mark.parametrize("mode", ["floor", "even", "rceil"])
@pytest.mark.parametrize("name", ["MXFP4", "MXFP8", "MXFP8E5M2"])
def test_the_largest_weights_are_finite_or_refused(name: str, mode: str) -> None:
    recipe = parse_recipe(name, mode, mode)  # type: ignore[arg-type]
    for value in (2.0**127, 1.7 * 2.0**127, 3.3e38):
        try:
            packed = pack_recipe("w", torch.full((2, 64), value), recipe)
        except UsageError as error:
            assert "needs rounded weights within float32" in str(error) and mode != "floor"
            continue
        assert torch.isfinite(packed_values(packed, recipe, 64)).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_zeros_and_a_few_negligible_groups_pass(name: str) -> None:
    weight = WEIGHT.clone()
    weight[3] = 0.0
    weight[5] *= 2.0**-30  # 1 row of 32
    assert relative(rtn(weight, name), weight) < 1.1 * relative(rtn(WEIGHT, name), WEIGHT)
    assert torch.equal(rtn(torch.zeros(4, 128), name), torch.zeros(4, 128))
    weight[6:16] *= 2.0**-30  # every third
    with pytest.raises(UsageError, match=r"that would lose their digits \(w\)"):
        rtn(weight, name)


def test_a_few_groups_that_are_all_there_is_are_refused() -> None:
    weight = torch.zeros(32, 256)
    weight[7, :128] = WEIGHT[7, :128] * 2.0**-24
    with pytest.raises(UsageError, match="1 of 64 groups"):
        rtn(weight, "W4A16")


def test_each_segment_of_a_linear_is_judged() -> None:
    weight = WEIGHT.clone()
    weight[:, 128:] *= 2.0**-24
    order = tuple(range(255, -1, -1))
    parts = (parse_scheme("MXFP4A16"), 128), (parse_scheme("W4A16"), 128)
    pack_recipe("w", weight, Recipe(parts, order))  # the small half has scales small enough
    with pytest.raises(UsageError, match="W4A16 needs group scales of at least"):
        pack_recipe("w", weight, Recipe(parts))


@pytest.mark.parametrize("rounding", ["rtn", "search", "gptq"])
def test_the_command_refuses_by_name(
    rounding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = add_tokenizer(make_model(tmp_path / "model", scale=2.0**-20))
    words = [model, "--out", tmp_path / "out", "--dataset", write_ids(tmp_path / "ids.npy")]
    words += ["--schemes", "W4A16,W8A16", "--avg-bits", 6, "--rounding", rounding, "--gate", 0]
    words += ["--nsamples", 2, "--seqlen", 16, "--eval-nsamples", 2]
    assert quantize.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: W") and "group scales of at least 1e-05" in error
    assert "model.layers.0.self_attn.q_proj" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [rtn, searched, compensated])
def test_rows_too_small_for_a_scale_of_theirs_are_refused(make: Callable[..., Tensor]) -> None:
    """FP8: a maximum counts as 2^-100 at least, and codes reach 2^-18 below it."""
    for size in (2.0**-95, 2.0**-112):
        error = (make(WEIGHT * size, "FP8A16") / size - WEIGHT).square().mean()
        assert error < 1e-3
    with pytest.raises(UsageError, match=r"FP8A16 needs group scales of at least those of rows"):
        make(WEIGHT * 2.0**-122, "FP8A16")


@pytest.mark.parametrize("make", [rtn, searched, compensated])
def test_groups_too_small_beside_the_largest_weight_are_warned_of(
    make: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """NVFP4: scales lie within 2^18 of each other, and what is below is told, not refused."""
    weight = WEIGHT.clone()
    make(weight, "NVFP4A16")
    assert not caplog.records
    weight[3, 16:48] *= 2.0**-24
    found = make(weight, "NVFP4A16")
    assert found[3, 16:48].abs().max() == 0 or make is compensated
    (told,) = caplog.messages
    assert told.startswith(
        "w: 2 of 512 groups are too small beside the largest weight for NVFP4A16"
    )
