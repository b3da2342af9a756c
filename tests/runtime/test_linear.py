"""The packed model is the fake model: same values, another order of summation."""

from __future__ import annotations

import copy
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mixes import packed_copy
from tiny import KINDS, make_model

from mixbits import ops
from mixbits.backends import cpu
from mixbits.errors import UsageError
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Recipe, parse_scheme
from mixbits.model.layout import find_linears, weight_of
from mixbits.rounding.nearest import pack_weight, round_weights
from mixbits.runtime.fake import FakeLinear, fake_quantize_model
from mixbits.runtime.linear import PackedLinear, share_inputs
from mixbits.source.source import open_source

SCHEMES = ["MXFP4", "MXFP8", "MXFP8E5M2", "MXFP4A16", "MXFP8A16", "MXFP8E5M2A16"]
SCHEMES += ["W2A16", "W4A16", "W8A16", "W4A16G32", "W2A16G64ASYM", "W4A16ASYM", "W8A16ASYM"]
ISAS = cpu.available_isas()


@pytest.fixture(autouse=True)
def _restore_isa():
    before = cpu.isa() if ISAS else None
    yield
    if before:
        cpu.set_isa(before)


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
    packed = PackedLinear.from_weight(weight, Recipe.plain(scheme), bias)(x)
    fake = FakeLinear(weight, Recipe.plain(scheme), bias)
    exact = fake(x).double()
    rows, rounded = x.double(), fake.weight_fake.double()
    if scheme.activation is not None:
        from mixbits.formats.reference import fake_quantize

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
    gap, own = logit_gap(tmp_path, parse_recipe(name), dtype, ids)
    assert own > 0
    # Both stray from float64 by about `own`, independently: twice that separates them at most.
    assert gap <= 2 * own


def shared_pair(schemes=("MXFP4", "W4A16")):
    parent = torch.nn.Module()
    for name, scheme in zip(("gate_proj", "up_proj"), schemes, strict=True):
        bias = torch.nn.Parameter(torch.randn(24), requires_grad=False)
        linear = PackedLinear.from_weight(torch.randn(24, 64), parse_recipe(scheme), bias)
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


CHANGED_INPUTS = {
    "in place": lambda x: x.mul_(2),
    "through a view": lambda x: x[0].mul_(2),
    "through a view of its memory": lambda x: x.flatten()[:64].zero_(),
    "data": lambda x: x.data.mul_(2),
    "detached": lambda x: x.detach().mul_(2),
    "numpy": lambda x: np.multiply(x.numpy(), 2, out=x.numpy()),
    "other memory": lambda x: x.set_(2 * x),
    "sign of zero": lambda x: x.mul_(-1),
}


def apart(linear, x):
    """The product of a linear that shares nothing."""
    linear = copy.deepcopy(linear)
    linear.siblings = None
    return linear(x)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGED_INPUTS)
def test_siblings_see_what_their_input_holds_now(change, inference):
    parent, _ = shared_pair()
    for tokens in (1, 3, 100):  # of so many no product is shared
        with torch.inference_mode(inference):
            x = torch.zeros(1, tokens, 64) if "zero" in change else torch.randn(1, tokens, 64)
            parent.gate_proj(x)
            CHANGED_INPUTS[change](x)
            assert torch.equal(parent.up_proj(x), apart(parent.up_proj, x))


def test_siblings_see_another_input_at_the_same_address():
    parent, _ = shared_pair()
    memory = torch.randn(2, 3, 64)
    for _ in range(5):
        parent.gate_proj(memory[:1])
        memory.normal_()
        assert torch.equal(parent.up_proj(memory[:1]), apart(parent.up_proj, memory[:1]))


def test_a_hook_that_changes_the_input_in_place():
    parent, _ = shared_pair()
    x = torch.randn(1, 3, 64)
    expected = apart(parent.up_proj, 2 * x)
    with parent.up_proj.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),)):
        parent.gate_proj(x)
        assert torch.equal(parent.up_proj(x), expected)


def flip_codes(linear):
    linear.weight_packed ^= 0x11


def new_scales(linear):
    linear.weight_scale = 2 * linear.weight_scale


def load_state(linear, assign=False):
    state = {name: value.clone() for name, value in linear.state_dict().items()}
    state["weight_packed"] ^= 0x11
    linear.load_state_dict(state, assign=assign)


def swap_data(linear):
    linear.weight_packed.data = linear.weight_packed ^ 0x11


def swap_buffer(linear):
    linear._buffers["weight_packed"] = linear.weight_packed ^ 0x11


CHANGED_LINEARS = {
    "codes in place": flip_codes,
    "scales set": new_scales,
    "state copied": load_state,
    "state assigned": lambda linear: load_state(linear, assign=True),
    "data": swap_data,
    "buffer": swap_buffer,
    "8-bit activations": lambda linear: setattr(linear, "int8_activations", True),
    "backend": lambda linear: setattr(linear, "backend", "reference"),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("change", CHANGED_LINEARS)
def test_siblings_are_multiplied_as_they_are_now(change, early, inference):
    """Between the two calls, or before: then they differ from each other."""
    with torch.inference_mode(inference):
        parent, _ = shared_pair(("MXFP8A16", "W4A16"))
    x = torch.randn(1, 3, 64).bfloat16()
    gate = apart(parent.gate_proj, x)
    for number, is_now in enumerate((early, not early)):
        if is_now:
            with torch.inference_mode(inference):
                CHANGED_LINEARS[change](parent.up_proj)
        assert number or torch.equal(parent.gate_proj(x), gate)
    assert torch.equal(parent.up_proj(x), apart(parent.up_proj, x))


def test_products_that_nobody_asks_for_go_with_their_input():
    parent, _ = shared_pair()
    x = torch.randn(1, 3, 64)
    parent.gate_proj(x)
    products = parent.gate_proj.siblings._thread.waiting.products
    product = weakref.ref(products[parent.up_proj])
    assert product() is not None
    del x
    assert not products and product() is None


def test_products_of_a_thread_go_with_it():
    parent, _ = shared_pair()
    x = torch.randn(1, 3, 64)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(parent.gate_proj, x).result()
        (thread,) = pool._threads
        waiting = pool.submit(lambda: weakref.ref(parent.gate_proj.siblings._thread.waiting))
        waiting = waiting.result()
    assert not thread.is_alive() and waiting() is None


def test_a_call_that_fails_between_siblings_leaves_nothing_wrong():
    parent, _ = shared_pair()
    for _ in range(10):
        x = torch.randn(1, 3, 64)
        parent.gate_proj(x)
        with pytest.raises(RuntimeError):
            torch.randn(2) @ torch.randn(3)
        other = torch.randn(1, 3, 64)
        got = [linear(other) for linear in parent.children()]
        assert all(map(torch.equal, got, [apart(linear, other) for linear in parent.children()]))
    assert parent.gate_proj.siblings.misses_left > 0


def test_a_product_made_for_inference_is_not_given_to_autograd():
    parent, _ = shared_pair()
    x = torch.randn(1, 3, 64)
    with torch.inference_mode():
        parent.gate_proj(x)
    scale = torch.ones(24, requires_grad=True)
    (parent.up_proj(x) * scale).sum().backward()
    assert scale.grad is not None


def test_copies_share_nothing_with_the_original():
    parent, _ = shared_pair()
    x = torch.randn(1, 3, 64)
    parent.gate_proj(x)
    for other in (copy.deepcopy(parent), pickle.loads(pickle.dumps(parent))):
        assert other.gate_proj.siblings.linears == [other.gate_proj, other.up_proj]
        flip_codes(other.up_proj)
        assert torch.equal(other.up_proj(x), apart(other.up_proj, x))
    assert torch.equal(parent.up_proj(x), apart(parent.up_proj, x))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("recipe", ["W4A16", "W4A16ASYM", "slabs"])
def test_offloaded_weights(recipe, buffers):
    """accelerate puts them on the meta device but while their module runs."""
    from accelerate import cpu_offload
    from mixes import filled, slab_recipe

    recipe = slab_recipe(64) if recipe == "slabs" else parse_recipe(recipe)
    parent = torch.nn.Module()
    for name in ("gate_proj", "up_proj"):
        parent.add_module(name, filled(torch.randn(24, 64), recipe))
    share_inputs(parent)
    x = torch.randn(1, 3, 64)
    expected = [linear(x) for linear in parent.children()]
    cpu_offload(parent, torch.device("cpu"), offload_buffers=buffers)
    assert all(tensor.is_meta for tensor in parent.buffers()) == buffers
    for _ in range(2):
        assert all(map(torch.equal, [linear(x) for linear in parent.children()], expected))


def test_to_bfloat16_keeps_scales():
    linear = PackedLinear.from_weight(torch.randn(32, 128), parse_recipe("W4A16"))
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
        PackedLinear(32, 32, parse_recipe("BF16"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_is_swapped(tmp_path, kind):
    make_model(tmp_path, kind)
    model = open_source(str(tmp_path)).load()
    linears = find_linears(model)
    packed_copy(model, {i.name: parse_recipe("MXFP4") for i in linears})
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
    round_weights(model, linears, {i.name: Recipe.plain(scheme) for i in linears})
    from mixbits.formats.reference import fake_quantize

    for info in linears:
        expected = fake_quantize(weight_of(before, info), scheme.weight)
        assert torch.equal(weight_of(model, info), expected), info.name
    embeddings = [m.get_input_embeddings().weight for m in (model, before)]
    assert torch.equal(*embeddings)
