"""Linears of several segments: one native call against the slow twin, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from conftest import DTYPES
from mixes import ARRANGED, SEGMENTS, exact_product, filled, make_mix, meets_integers, slab_recipe
from tiny import make_model

import mixbits
from mixbits import ops
from mixbits.checkpoint import saving as checkpoint
from mixbits.formats.arrange import arrangement_of
from mixbits.formats.pack import Operand, Part, order_dtype
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import MAX_SEGMENTS, parse_scheme
from mixbits.model.layout import find_linears
from mixbits.runtime.fake import FakeLinear, fake_quantize_model
from mixbits.runtime.linear import packed_linear, share_inputs
from mixbits.runtime.swap import swap_linears
from mixbits.source.source import open_source

by_segments = pytest.mark.parametrize("segments", SEGMENTS)
by_arrangement = pytest.mark.parametrize("arranged", ARRANGED)


def check_mix(x, mix, values, got):
    """`test_matmul.product`'s rule: at most twice the error of torch's own product."""
    exact, magnitudes, rounded = exact_product(x, mix, values)
    torchs = (rounded.float() @ values.float().T).to(x.dtype).double()
    floor = torch.finfo(x.dtype).eps * exact.abs() + 2.0**-23 * magnitudes
    # Half a step of the integers that stand for a block of 32 of what has no format.
    half = 2.0**-23 if x.dtype == torch.float32 or mix.rotated else 2.0**-15
    start = 0
    for one, columns in zip(mix.parts, mix.columns, strict=True):
        if one.activation is None and meets_integers(one.format):
            piece = rounded[:, start : start + columns].abs()
            blocks = torch.nn.functional.pad(piece, (0, -columns % 32)).unflatten(1, (-1, 32))
            steps = 1.01 * half * blocks.amax(-1).repeat_interleave(32, -1)[:, :columns]
            floor += steps @ values[:, start : start + columns].abs().T
        start += columns
    assert got.dtype == x.dtype and got.shape == exact.shape
    error, allowed = (got.double() - exact).abs(), 2 * (torchs - exact).abs() + floor
    assert (error <= allowed).all(), (error / allowed).max().item()


@by_segments
@by_arrangement
@pytest.mark.parametrize("tokens", [1, 3, 5, 118])
def test_a_mix_is_the_product_of_its_values(isa, segments, arranged, tokens):
    for number, rows in enumerate((1, 17, 100)):
        mix, values = make_mix(segments, arranged, rows)
        x = torch.randn(tokens, sum(mix.columns)).to(DTYPES[(number + tokens) % 3])
        check_mix(x, mix, values, ops.packed_matmuls(x, [mix], "cpu")[0])


@by_segments
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_mix_is_its_slow_twin(isa, segments, dtype):
    mix, _ = make_mix(segments, "rotated", 33)
    x = torch.randn(7, sum(mix.columns)).to(dtype)
    got, twin = (ops.packed_matmuls(x, [mix], backend)[0] for backend in ("cpu", "reference"))
    # Both round once to the dtype (2^-9 in bfloat16), and sums to float32 in between.
    torch.testing.assert_close(got, twin, rtol=0.01, atol=2e-3 * twin.abs().max().item())


def test_the_slow_twin_rounds_inputs_as_the_cpu_does(isa):
    """Small blocks of float16 lose digits that float32 would keep."""
    mix, _ = make_mix("slabs", "ordered", 33)
    x = torch.randn(7, 160).half() * 2.0**-12
    got, twin = (ops.packed_matmuls(x, [mix], backend)[0] for backend in ("cpu", "reference"))
    torch.testing.assert_close(got, twin, rtol=2e-3, atol=2.0**-23)


@pytest.mark.parametrize("tokens", [0, 1, 4, 40, 600])
def test_company_and_threads_do_not_matter(isa, tokens):
    """Mixes of one order, of its copy, of another, and plain weights: more than one pass takes."""
    first, _ = make_mix("short end", "rotated", 40)
    copy = first._replace(order=first.order.clone())
    other, _ = make_mix("short end", "ordered", 17)
    fmt = parse_scheme("MXFP4").weight
    plain = Operand.plain(ops.quantize_pack(torch.randn(20, 172), fmt), fmt, 172)
    operands = [first, copy, plain, other, first._replace(rotated=False), *[other, plain] * 4]
    x = torch.randn(tokens, 172).bfloat16()
    together = ops.packed_matmuls(x, operands, "cpu")
    assert torch.equal(together[0], together[1])
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for operand, got in zip(operands, together, strict=True):
            assert torch.equal(got, ops.packed_matmuls(x, [operand], "cpu")[0])
    torch.set_num_threads(before)


def test_orders_of_every_width(isa):
    for columns in (256, 257, 1 << 15, (1 << 15) + 1):
        order = torch.randperm(columns)
        fmt = parse_scheme("W8A16").weight
        packed = ops.quantize_pack(torch.randn(3, columns), fmt)
        mix = Operand((Part(packed, fmt),), (columns,), order)
        x = torch.randn(2, columns)
        stored = mix._replace(order=order.to(order_dtype(columns)))
        expected = ops.packed_matmul(x[:, order].contiguous(), packed, fmt, backend="cpu")
        for one in (mix, stored):
            assert torch.equal(ops.packed_matmuls(x, [one], "cpu")[0], expected)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_mix_passes_nan_on(isa, tokens):
    mix, _ = make_mix("slabs", "ordered", 10)
    x = torch.randn(tokens, 160)
    x[0, 150] = torch.inf
    mix.parts[1].packed.weight_scale[3, 1] = 255
    got = ops.packed_matmuls(x, [mix], "cpu")[0]
    expected = torch.zeros(tokens, 10, dtype=torch.bool)
    expected[:, 3] = True
    expected[0] = True
    assert torch.equal(got.isnan(), expected)


def test_refused_mixes():
    mix, _ = make_mix("slabs", "ordered", 4)
    x = torch.randn(2, 160)
    with pytest.raises(ValueError, match=r"share 160 columns: got \(64, 95\)"):
        ops.packed_matmuls(x, [mix._replace(columns=(64, 95))])
    with pytest.raises(ValueError, match="each of 160 columns once"):
        ops.packed_matmuls(x, [mix._replace(order=torch.zeros(160, dtype=torch.uint8))])
    with pytest.raises(ValueError, match="weight_packed of in_features=96"):
        ops.packed_matmuls(x, [mix._replace(parts=mix.parts[:1] * 2)])
    one = mix.parts[:1]
    with pytest.raises(ValueError, match=f"1 to {MAX_SEGMENTS} parts"):
        ops.packed_matmuls(x, [mix._replace(parts=one * 9, columns=(1,) * 9)])


# --- linears and models ---------------------------------------------------------------------------


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("names", [("MXFP4", "MXFP8"), ("W4A16", "W8A16"), ("W2A16", "W4A16")])
def test_a_mixed_linear_equals_its_fake_twin(isa, names, rotated):
    weight, bias = torch.randn(100, 172).bfloat16(), torch.nn.Parameter(torch.randn(100))
    recipe = slab_recipe(172, *names, rotated)
    linear, fake = filled(weight, recipe, bias), FakeLinear(weight, recipe, bias)
    for tokens in (1, 10):
        x = torch.randn(2, tokens, 172)
        packed, own, exact = linear(x), fake(x), fake(x.double())
        assert packed.shape == (2, tokens, 100)
        assert (packed - exact).abs().max() <= 2 * (own - exact).abs().max()


def mixed_model(folder, dtype, names, rotate=("down_proj",)):
    """Packed model, its fake twin, and that in float64; all linears but the head are mixed."""
    source = open_source(str(folder))
    models = [source.load().to(dtype).eval() for _ in range(3)]
    recipes = {
        info.name: slab_recipe(info.in_features, *names, info.name.endswith(tuple(rotate)))
        for info in find_linears(models[0])
    }
    swap_linears(models[0], list(recipes), lambda n, w, b: filled(w, recipes[n], b))
    share_inputs(models[0])
    for fake in models[1:]:
        fake_quantize_model(fake, recipes)
    return models[0], models[1], models[2].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", [("MXFP4A16", "MXFP8A16"), ("W4A16", "W8A16")], ids="+".join)
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_mixed_model_equals_its_fake_twin(isa, tmp_path, kind, names, dtype):
    make_model(tmp_path, kind)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        packed, fake, exact = (
            m(input_ids=ids, use_cache=False).logits.double()
            for m in mixed_model(tmp_path, dtype, names)
        )
    own = (fake - exact).abs().max()
    assert own > 0
    # As in test_linear: both stray from float64 by about `own`, independently.
    assert (packed - fake).abs().max() <= 2 * own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_slab_model_with_activations_equals_its_fake_twin(isa, tmp_path, dtype):
    """The mean over all logits, as a single rounded activation may take the neighbouring code."""
    make_model(tmp_path)
    ids = torch.arange(96).reshape(8, 12)
    with torch.no_grad():
        packed, fake, exact = (
            m(input_ids=ids, use_cache=False).logits.double()
            for m in mixed_model(tmp_path, dtype, ("MXFP4", "MXFP8"))
        )
    own = (fake - exact).square().mean().sqrt()
    assert 0 < (packed - exact).square().mean().sqrt() <= 2 * own


def test_folding_changes_no_bfloat16_logit_beyond_rounding(isa, tmp_path):
    """A folded order is the same product, its columns in the same order."""
    source = open_source(str(make_model(tmp_path / "model")))
    model = source.load()
    linears = find_linears(model)
    ids = torch.arange(24).reshape(2, 12)
    logits = []
    for folded in (False, True):
        recipes = {
            info.name: slab_recipe(info.in_features, rotated=True, order_in_producer=folded)
            if info.name.endswith("down_proj")
            else parse_recipe("MXFP8")
            for info in linears
        }
        folder = tmp_path / f"folded {folded}"
        folder.mkdir()
        checkpoint.save(folder, source, model, linears, recipes, {})
        loaded = mixbits.load(folder, dtype=torch.bfloat16, backend="cpu")
        with torch.no_grad():
            logits.append(loaded(input_ids=ids, use_cache=False).logits)
    assert torch.equal(*logits)


class Arranged(torch.nn.Module):
    """A linear that was left unquantized, in the order and basis of a recipe."""

    def __init__(self, weight, recipe, bias):
        super().__init__()
        self.arrangement, self.bias = arrangement_of(recipe), bias
        self.arranged = self.arrangement.weight(weight)

    def forward(self, x):
        arranged = self.arrangement.input(x)
        y = torch.nn.functional.linear(arranged, self.arranged.to(arranged.dtype)).to(x.dtype)
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("rotated", [False, True])
def test_arrangements_change_no_bfloat16_logit_beyond_rounding(tmp_path, rotated):
    source = open_source(str(make_model(tmp_path)))
    plain, arranged, exact = (source.load().bfloat16().eval() for _ in range(3))
    recipes = {i.name: slab_recipe(i.in_features, rotated=rotated) for i in find_linears(plain)}
    swap_linears(arranged, list(recipes), lambda n, w, b: Arranged(w, recipes[n], b))
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = [m(ids, use_cache=False).logits for m in (plain, arranged, exact.double())]
    own, other = ((one - logits[2]).abs().max() for one in logits[:2])
    assert own > 0 and other <= 2 * own


def test_linears_of_one_order_are_multiplied_in_one_call(monkeypatch):
    parent = torch.nn.Module()
    for name, seed in (("q_proj", 0), ("k_proj", 0), ("v_proj", 1)):
        parent.add_module(name, filled(torch.randn(24, 96), slab_recipe(96, seed=seed)))
    x = torch.randn(1, 2, 96)
    alone = [(linear, linear(x)) for linear in parent.children()]
    share_inputs(parent)
    calls = []
    original = ops.packed_matmuls_unchecked
    monkeypatch.setattr(
        ops, "packed_matmuls_unchecked", lambda *a: calls.append(len(a[1])) or original(*a)
    )
    for linear, expected in alone:
        assert torch.equal(linear(x), expected)
    assert calls == [3]


def test_a_mixed_linear_survives_moves_and_a_state_dict():
    weight, x = torch.randn(24, 300), torch.randn(3, 300)
    recipe = slab_recipe(300, "W4A16", "W8A16")
    linear = filled(weight, recipe)
    expected = linear(x)
    linear.to(torch.bfloat16).float()
    assert linear.order.dtype == torch.int16 and torch.equal(linear(x), expected)
    other = packed_linear(weight, slab_recipe(300, "W4A16", "W8A16", seed=1))
    assert not torch.equal(other.order, linear.order)
    other(x)  # whatever it remembers must not outlive what follows
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_mixed_linear_compiles_without_graph_breaks(backend):
    torch._dynamo.reset()
    linear, x = filled(torch.randn(24, 96), slab_recipe(96, rotated=True)), torch.randn(3, 96)
    expected = linear(x)
    compiled = torch.compile(linear, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
