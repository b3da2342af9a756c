"""The packed model is the fake model: same values, another order of summation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import KINDS, make_model

from mixbits import ops
from mixbits.backends import cpu
from mixbits.fake import FakeLinear, fake_quantize_model, round_weights
from mixbits.formats import UsageError, parse_scheme
from mixbits.linear import (
    PackedLinear,
    pack_weight,
    share_inputs,
    swap_linears,
)
from mixbits.model import find_linears, weight_of
from mixbits.source import open_source

SCHEMES = ["MXFP4", "MXFP8", "MXFP8E5M2", "MXFP4A16", "MXFP8A16", "MXFP8E5M2A16"]
SCHEMES += ["W2A16", "W4A16", "W8A16", "W4A16G32", "W2A16G64ASYM", "W4A16ASYM", "W8A16ASYM"]
ISAS = cpu.available_isas()


@pytest.fixture(autouse=True)
def _restore_isa():
    before = cpu.isa() if ISAS else None
    yield
    if before:
        cpu.set_isa(before)


def packed_copy(model, schemes):
    """Replace the linears of `model` by packed ones, in place."""

    def make(name, weight, bias):
        return PackedLinear.from_weight(weight, schemes[name], bias, name)

    swap_linears(model, list(schemes), make)
    return model


def logit_gap(folder, scheme, dtype, ids, head=False):
    """Largest logit difference packed - fake, and torch's own to float64, on the same model."""
    source = open_source(str(folder))
    models = [source.load().to(dtype) for _ in range(3)]
    schemes = {i.name: scheme for i in find_linears(models[0], include_head=head)}
    packed = packed_copy(models[0], schemes)
    fake_quantize_model(models[1], schemes)
    fake_quantize_model(models[2], schemes)
    exact = models[2].double()
    with torch.no_grad():
        outs = [m(input_ids=ids, use_cache=False).logits for m in (packed, models[1], exact)]
    gap = (outs[0].double() - outs[1].double()).abs().max().item()
    own = (outs[1].double() - outs[2].double()).abs().max().item()
    return gap, own


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SCHEMES)
def test_packed_linear_equals_fake_linear(isa, name):
    cpu.set_isa(isa)
    scheme = parse_scheme(name)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(100, 172, generator=generator).bfloat16()
    bias = torch.nn.Parameter(torch.randn(100, generator=generator))
    x = torch.randn(2, 5, 172, generator=generator)
    packed = PackedLinear.from_weight(weight, scheme, bias)(x)
    fake = FakeLinear(weight, scheme, bias)
    exact = fake(x).double()
    rows, rounded = x.double(), fake.weight_fake.double()
    if scheme.activation is not None:
        from mixbits.reference import fake_quantize

        rows = fake_quantize(x, scheme.activation).double()
    exact = rows @ rounded.T + bias.double()
    own = (fake(x) - exact).abs().max()
    assert packed.dtype == x.dtype and packed.shape == (2, 5, 100)
    assert (packed - exact).abs().max() <= 2 * own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["MXFP4A16", "MXFP8A16", "W4A16", "W8A16ASYM"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_packed_model_equals_fake_model(tmp_path, kind, name, dtype):
    make_model(tmp_path, kind)
    ids = torch.arange(24).reshape(2, 12)
    gap, own = logit_gap(tmp_path, parse_scheme(name), dtype, ids)
    assert own > 0
    # Both stray from float64 by about `own`, independently: twice that separates them at most.
    assert gap <= 2 * own


def shared_pair(schemes=("MXFP4", "W4A16")):
    parent = torch.nn.Module()
    for name, scheme in zip(("gate_proj", "up_proj"), schemes, strict=True):
        bias = torch.nn.Parameter(torch.randn(24), requires_grad=False)
        linear = PackedLinear.from_weight(torch.randn(24, 64), parse_scheme(scheme), bias)
        parent.add_module(name, linear)
    alone = [(linear, linear(torch.ones(1, 2, 64))) for linear in parent.children()]
    share_inputs(parent)
    return parent, alone


def test_linears_with_one_input_are_multiplied_in_one_call(monkeypatch):
    parent, alone = shared_pair()
    calls = []
    original = ops.packed_matmuls_unchecked
    monkeypatch.setattr(
        ops, "packed_matmuls_unchecked", lambda *a: calls.append(len(a[1])) or original(*a)
    )
    for _ in range(2):
        x = torch.ones(1, 2, 64)
        for linear, expected in alone:
            assert torch.equal(linear(x), expected)
    assert calls == [2, 2]
    assert not parent.gate_proj.siblings._thread.waiting.products  # nothing is kept


def test_linears_with_inputs_of_their_own_give_sharing_up():
    parent, alone = shared_pair()
    for _ in range(5):
        for linear, expected in alone:
            assert torch.equal(linear(torch.ones(1, 2, 64)), expected)
    assert parent.gate_proj.siblings.misses_left == 0
    assert torch.equal(
        parent.up_proj(2 * torch.ones(1, 2, 64)), parent.up_proj(torch.full((1, 2, 64), 2.0))
    )


def test_shared_inputs_of_several_threads():
    parent, _ = shared_pair()
    inputs = [torch.randn(1, 3, 64) for _ in range(4)]
    expected = [(parent.gate_proj(x), parent.up_proj(x)) for x in inputs]

    def run(number):
        for _ in range(200):
            x = inputs[number].clone()
            got = parent.gate_proj(x), parent.up_proj(x)
            if not all(map(torch.equal, got, expected[number])):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_to_bfloat16_keeps_scales():
    linear = PackedLinear.from_weight(torch.randn(32, 128), parse_scheme("W4A16"))
    scale = linear.weight_scale.clone()
    linear.to(torch.bfloat16).half().float()
    assert linear.weight_scale.dtype == torch.float16
    assert torch.equal(linear.weight_scale, scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["MXFP4", "W4A16"])
def test_non_finite_weights_are_refused_by_name(name, bad):
    weight = torch.randn(4, 64)
    weight[2, 3] = bad
    with pytest.raises(UsageError, match=r"1 NaN or infinite values of 256 \(layer\.7\)"):
        pack_weight("layer.7", weight, parse_scheme(name))


def test_weights_beyond_float16_scales_are_refused_by_name():
    weight = torch.full((4, 128), 1e30)
    with pytest.raises(UsageError, match=r"W4A16 needs group scales.*\(layer\.7\)"):
        pack_weight("layer.7", weight, parse_scheme("W4A16"))


def test_bf16_does_not_pack():
    with pytest.raises(ValueError, match="BF16 does not pack"):
        PackedLinear(32, 32, parse_scheme("BF16"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_is_swapped(tmp_path, kind):
    make_model(tmp_path, kind)
    model = open_source(str(tmp_path)).load()
    linears = find_linears(model)
    packed_copy(model, {i.name: parse_scheme("MXFP4") for i in linears})
    assert all(isinstance(model.get_submodule(i.name), PackedLinear) for i in linears)
    with torch.no_grad():
        out = model.generate(torch.arange(4)[None], max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 4


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_round_weights_rounds_in_place_and_spares_a_tied_embedding(tmp_path, kind):
    make_model(tmp_path, kind)
    source = open_source(str(tmp_path))
    model, before = source.load(), source.load()
    linears = find_linears(model, include_head=True)
    scheme = parse_scheme("MXFP4")
    round_weights(model, linears, {i.name: scheme for i in linears})
    from mixbits.reference import fake_quantize

    for info in linears:
        expected = fake_quantize(weight_of(before, info), scheme.weight)
        assert torch.equal(weight_of(model, info), expected), info.name
    embeddings = [m.get_input_embeddings().weight for m in (model, before)]
    assert torch.equal(*embeddings)
