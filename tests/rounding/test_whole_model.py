"""A whole model rounded: what runs is what is stored, and compensation is worth its time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipes import MODES, opened
from tiny import KINDS, MOE_KINDS, make_model

import mixbits
from mixbits.checkpoint.folder import predicted_bytes
from mixbits.checkpoint.saving import save
from mixbits.errors import UsageError
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import LEFT_ALONE, Recipe, parse_scheme
from mixbits.measuring.evaluate import sequence_kl
from mixbits.model.layout import LinearInfo, find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.pipeline import settings
from mixbits.rounding.methods import METHODS
from mixbits.rounding.whole_model import RoundedModel, _Compensation, round_model
from mixbits.runtime.fake import fake_quantize_model
from mixbits.source.source import open_source


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_rounding_is_the_fake_model(kind: str, tmp_path: Path) -> None:
    source, model, linears, chosen, ids = opened(tmp_path / "model", kind)
    rounded = round_model(StreamedModel(model), linears, chosen, "rtn")
    logits = RoundedModel(StreamedModel(model), linears, chosen, rounded).logits(ids)
    fake = source.load()
    fake_quantize_model(fake, chosen)
    expected = StreamedModel(fake).logits(ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_stored_is_what_ran(kind: str, method: str, tmp_path: Path) -> None:
    source, model, linears, chosen, ids = opened(tmp_path / "model", kind)
    streamed = StreamedModel(model)
    rounded = round_model(streamed, linears, chosen, method, ids)
    assert set(rounded) == {info.name for info in linears}
    (tmp_path / "out").mkdir()
    modes = dict(zip(("weight_scale_mode", "act_scale_mode"), MODES, strict=True))
    written = save(tmp_path / "out", source, model, linears, chosen, modes, rounded)
    assert written == predicted_bytes(model, linears, chosen, source.dtype)
    packed = mixbits.load(tmp_path / "out", dtype=torch.float32)
    logits = packed(input_ids=ids, use_cache=False).logits
    expected = RoundedModel(streamed, linears, chosen, rounded).logits(ids)
    # Where activations are rounded, another order of summation may move one by a whole step.
    close = (logits - expected).abs() <= 1e-3 * (1 + expected.abs())
    assert close.float().mean() > 0.9
    assert (logits - expected).square().mean() < 1e-3 * expected.square().mean()


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("left_alone", ["", "gate_proj"])
def test_a_folded_order_changes_no_logit(kind: str, left_alone: str, tmp_path: Path) -> None:
    """Neither where gate is packed nor where it stays plain."""
    source, model, linears, _, ids = opened(tmp_path / "model", kind)
    mxfp8 = parse_scheme("MXFP8A16", *MODES)
    orders = {i.name: tuple(torch.randperm(i.in_features).tolist()) for i in linears}
    logits = []
    for folded in (False, True):
        chosen: dict[str, Recipe] = {}
        for info in linears:
            order = orders[info.name]
            if info.name.endswith("down_proj"):
                chosen[info.name] = Recipe(
                    ((mxfp8, info.in_features),), order, order_in_producer=folded
                )
            elif not (left_alone and info.name.endswith(left_alone)):
                chosen[info.name] = Recipe.plain(mxfp8)
        folder = tmp_path / f"folded {folded}"
        folder.mkdir()
        save(folder, source, model, linears, chosen, {})
        packed = mixbits.load(folder, dtype=torch.float32)
        assert any(n.endswith("down_proj.order") for n in packed.state_dict()) != folded
        logits.append(packed(input_ids=ids, use_cache=False).logits)
    # Where gate is plain, its product may be summed in another order, row by row.
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["MXFP4", "W4A16", "W2A16G32"])
def test_compensation_brings_the_model_nearer_to_the_original(scheme: str, tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path, num_hidden_layers=3)))
    model = StreamedModel(source.load())
    linears = find_linears(model.model)
    chosen = {i.name: parse_recipe(scheme, *MODES) for i in linears}
    ids = torch.randint(0, 130, (96, 32))
    fresh = torch.randint(0, 130, (32, 32))
    kl = {}
    for method, share in (("rtn", 0.0), ("search", 0.0), ("gptq", 0.0), ("gptq", 0.5)):
        rounded = round_model(model, linears, chosen, method, ids, share)
        quantized = RoundedModel(model, linears, chosen, rounded)
        kl[method, share] = float(sequence_kl(model, quantized, fresh).mean())
    assert kl["search", 0.0] < kl["rtn", 0.0]
    assert kl["gptq", 0.0] < 0.9 * kl["search", 0.0]
    assert kl["gptq", 0.5] < 0.95 * kl["gptq", 0.0]


@pytest.mark.parametrize("kind", MOE_KINDS)
def test_experts_that_no_token_reached_are_rounded_all_the_same(kind: str, tmp_path: Path) -> None:
    _, model, linears, chosen, _ = opened(tmp_path / "model", kind)
    one_token = torch.zeros(1, 2, dtype=torch.int64)
    rounded = round_model(StreamedModel(model), linears, chosen, "gptq", one_token)
    assert set(rounded) == {info.name for info in linears}


def test_linears_without_a_recipe_are_left_alone(tmp_path: Path) -> None:
    _, model, linears, chosen, ids = opened(tmp_path / "model", "qwen3_moe")
    expert = next(i.name for i in linears if i.is_expert)
    del chosen[expert]
    chosen[linears[0].name] = LEFT_ALONE
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = round_model(StreamedModel(model), linears, chosen, "gptq", ids)
    assert set(rounded) == {i.name for i in linears} - {expert, linears[0].name}
    logits = RoundedModel(StreamedModel(model), linears, chosen, rounded).logits(ids)
    assert torch.isfinite(logits).all()
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_inputs_that_change_in_place_are_looked_at_again() -> None:
    """A module may write to what it has given to a linear, and give it to the next."""
    infos = [LinearInfo(name, 8, 32, 0) for name in ("q", "k")]
    recipes = {info.name: parse_recipe("W4A16", *MODES) for info in infos}
    weight = torch.randn(8, 32)
    found = []
    for write in (lambda x: x.mul_(-2).add_(1), lambda x: 1 - 2 * x):
        torch.manual_seed(0)
        work = _Compensation(infos, recipes, 0.5, {})
        for work.recording in (True, False):
            x = torch.randn(5, 32)
            work.probe("q", x, weight, None)
            out = work.probe("k", write(x), weight, None)
        found.append((out, work.rounded["k"][0].weight_packed))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_bad_arguments(tmp_path: Path) -> None:
    _, model, linears, chosen, ids = opened(tmp_path / "model", "llama")
    streamed = StreamedModel(model)
    assert settings.ROUNDINGS == METHODS
    with pytest.raises(UsageError, match="rtn, search, gptq: got 'best'"):
        round_model(streamed, linears, chosen, "best", ids)
    with pytest.raises(UsageError, match="needs calibration text"):
        round_model(streamed, linears, chosen, "gptq", ids[:0])
    model.get_submodule(linears[2].name).weight.data[3, 5] = torch.nan
    for method in METHODS:
        with pytest.raises(UsageError, match=rf"finite.*{linears[2].name}"):
            round_model(streamed, linears, chosen, method, ids)
