"""Gradients of the input of everything that is packed: dL/dx = dL/dy W, straight through Q."""

from __future__ import annotations

import pytest
import torch
from conftest import DTYPES
from test_mixed import filled, slab_recipe
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from mixbits import gradients, ops
from mixbits.fake import FakeLinear
from mixbits.formats import Mixed, parse_scheme
from mixbits.linear import PackedLinear, share_inputs
from mixbits.pack import Mix, Operand

BACKENDS = [name for name, why in ops.backends().items() if why is None]
SCHEMES = ["W4A16", "W2A16G64ASYM", "W8A16", "MXFP4A16", "MXFP8E5M2A16", "MXFP4", "MXFP8"]
RECIPES = {
    **{name: parse_scheme(name) for name in SCHEMES},
    "slabs": slab_recipe(172, "W4A16", "W8A16"),
    "slabs, activations": slab_recipe(172),
    "rotated": slab_recipe(172, rotated=True),
    "rotated weights": slab_recipe(172, "MXFP4A16", "MXFP8A16", rotated=True),
    "across blocks": Mixed(
        ((parse_scheme("MXFP4"), 33), (parse_scheme("W8A16"), 139)), tuple(range(171, -1, -1)), True
    ),
}
by_recipe = pytest.mark.parametrize("name", RECIPES)
by_backend = pytest.mark.parametrize("backend", BACKENDS)


def make_linear(name, rows=40, backend=None):
    bias = torch.nn.Parameter(torch.randn(rows), requires_grad=False)
    linear = filled(torch.randn(rows, 172), RECIPES[name], bias)
    for part in linear.modules():
        if isinstance(part, PackedLinear):
            part.backend = backend
    return linear


def gradient_of(function, x, weights):
    x = x.detach().requires_grad_()
    (function(x) * weights).sum().backward()
    return x.grad


@by_recipe
@by_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_the_weights_transpose(name, backend, dtype):
    linear = make_linear(name, backend=backend)
    for shape in ((172,), (1, 172), (2, 3, 172), (0, 172)):
        x = torch.randn(shape).to(dtype)
        weights = torch.randn(*shape[:-1], 40).to(dtype)
        got = gradient_of(linear, x, weights)
        expected = weights.float() @ linear.weight
        assert got.dtype == dtype and got.shape == x.shape
        # One rounding to the dtype, and sums of 40 products in another order.
        torch.testing.assert_close(got.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@by_recipe
def test_outputs_are_those_without_gradients(name):
    linear = make_linear(name)
    x = torch.randn(3, 172)
    y = linear(x.clone().requires_grad_())
    assert y.requires_grad and torch.equal(y, linear(x)) and not linear(x).requires_grad


@by_recipe
def test_the_definition_has_the_same_gradient(name):
    weight, bias = torch.randn(40, 172), torch.nn.Parameter(torch.randn(40), requires_grad=False)
    packed, fake = filled(weight, RECIPES[name], bias), FakeLinear(weight, RECIPES[name], bias)
    x, weights = torch.randn(5, 172), torch.randn(5, 40)
    got, expected = (gradient_of(linear, x, weights) for linear in (packed, fake))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_a_weight_in_many_blocks_of_rows(monkeypatch):
    linear = make_linear("slabs")
    x, weights = torch.randn(5, 172), torch.randn(5, 40)
    whole = gradient_of(linear, x, weights)
    monkeypatch.setattr(gradients, "SCRATCH_BYTES", 3 * 60 * 4)
    torch.testing.assert_close(gradient_of(linear, x, weights), whole)


# --- every op ---------------------------------------------------------------------------------


def operand_of(name):
    scheme = parse_scheme(name)
    packed = ops.quantize_pack(torch.randn(40, 172), scheme.weight)
    return Operand(packed, scheme.weight, scheme.activation)


def value_of(operand):
    return ops.dequantize(operand.packed, operand.format, 172)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("int8_activations", [True, False])
def test_products_of_one_input(checked, int8_activations):
    operands = [operand_of("W4A16"), operand_of("MXFP4"), operand_of("MXFP8A16")]
    multiply = ops.packed_matmuls if checked else ops.packed_matmuls_unchecked
    x = torch.randn(3, 172, requires_grad=True)
    outs = multiply(x, operands, None, int8_activations)
    (outs[0].sum() + 2 * outs[2].sum()).backward()  # the second is not used
    expected = value_of(operands[0]).sum(0) + 2 * value_of(operands[2]).sum(0)
    torch.testing.assert_close(x.grad, expected.expand(3, -1), rtol=1e-5, atol=1e-4)


@by_backend
@pytest.mark.parametrize("name", ["MXFP4", "MXFP8", "W4A16", "W8A16ASYM"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_passed_straight_through(backend, name, dtype):
    fmt = parse_scheme(name).weight
    x, weights = torch.randn(3, 70).to(dtype), torch.randn(3, 70).to(dtype)
    got = gradient_of(lambda x: ops.fake_quantize(x, fmt, backend), x, weights)
    assert torch.equal(got, weights)


def test_products_with_activations_in_8_bit_floats(monkeypatch):
    from mixbits import folding

    operand = operand_of("MXFP4A16")
    module = type("Module", (), {})()
    module.packed_matmul = lambda x, packed, fmt, scale: folding.matmul(x, packed, scale)
    original = ops._module
    monkeypatch.setattr(ops, "require_fp8", lambda *_: None)
    monkeypatch.setattr(ops, "_module", lambda n: module if n == "cuda_fp8" else original(n))
    packed, fmt, _ = operand
    row_scale = ops.fold_rows(packed, fmt, 172)
    x, weights = torch.randn(3, 172), torch.randn(3, 40)

    def multiply(x):
        return ops.packed_matmul_fp8(x, packed, fmt, row_scale)

    got = gradient_of(multiply, x, weights)
    torch.testing.assert_close(got, weights @ value_of(operand), rtol=1e-5, atol=1e-4)
    assert torch.equal(multiply(x.clone().requires_grad_()), multiply(x))


@pytest.mark.parametrize("name", ["MXFP4", "W4A16ASYM"])
def test_registered_ops(name):
    packed, fmt, activation = operand_of(name)
    code = 0 if activation is None else activation.code
    x, weights = torch.randn(3, 172), torch.randn(3, 40)

    def multiply(x):
        return torch.ops.mixbits.packed_matmul(x, *packed, fmt.code, code)

    got = gradient_of(multiply, x, weights)
    torch.testing.assert_close(got, weights @ value_of(Operand(packed, fmt)), atol=1e-4, rtol=1e-5)
    assert torch.equal(gradient_of(lambda x: torch.ops.mixbits.fake_quantize(x, fmt.code), x, x), x)
    x.requires_grad_()
    torch.library.opcheck(torch.ops.mixbits.packed_matmul, (x, *packed, fmt.code, code))
    torch.library.opcheck(torch.ops.mixbits.fake_quantize, (x, fmt.code))
    torch.library.opcheck(
        torch.ops.mixbits.packed_matmul_backward,
        (torch.randn(3, 40, requires_grad=True), *packed, fmt.code, 172),
    )


@by_recipe
def test_compiled(name):
    linear = make_linear(name)
    torch.compiler.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    x, weights = torch.randn(5, 172), torch.randn(5, 40)
    got, expected = (gradient_of(f, x, weights) for f in (compiled, linear))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


# --- ways to ask for a gradient -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["W4A16", "MXFP4", "rotated"])
def test_gradients_of_gradients(name):
    """Products are linear in x: what a gradient depends on is dL/dy only."""
    linear = make_linear(name)
    x = torch.randn(3, 172, requires_grad=True)
    weights = torch.randn(3, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad((linear(x) * weights).sum(), x, create_graph=True)
    direction = torch.randn(3, 172)
    (gradient * direction).sum().backward()
    expected = direction @ linear.weight.T
    torch.testing.assert_close(weights.grad, expected, rtol=1e-4, atol=1e-3)
    assert x.grad is None


@pytest.mark.parametrize("name", ["W4A16", "MXFP4", "rotated"])
def test_forward_mode(name):
    linear = make_linear(name)
    x, tangent = torch.randn(3, 172), torch.randn(3, 172)
    expected = tangent @ linear.weight.T
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-2)
    value, out = torch.func.jvp(linear, (x,), (tangent,))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-2)
    assert torch.equal(value, linear(x))


@pytest.mark.parametrize("name", ["W4A16", "MXFP4", "rotated"])
def test_functional_gradients(name):
    linear = make_linear(name)
    x, weights = torch.randn(3, 172), torch.randn(3, 40)
    got = torch.func.grad(lambda x: (linear(x) * weights).sum())(x)
    torch.testing.assert_close(got, weights @ linear.weight, rtol=1e-5, atol=1e-4)
    _, pull = torch.func.vjp(linear, x)
    torch.testing.assert_close(pull(weights)[0], got)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["W4A16", "MXFP4"])
def test_checkpointed(name, reentrant):
    parent = siblings(name)

    def both(x):
        return parent.gate_proj(x) * parent.up_proj(x).sigmoid()

    x, weights = torch.randn(2, 3, 172), torch.randn(2, 3, 40)
    got = gradient_of(lambda x: checkpoint(both, x, use_reentrant=reentrant), x, weights)
    torch.testing.assert_close(got, gradient_of(both, x, weights))


def test_autocast():
    linear = make_linear("W4A16")
    x, weights = torch.randn(3, 172), torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradient_of(linear, x, weights)
    torch.testing.assert_close(got, weights @ linear.weight, rtol=1e-5, atol=1e-4)


def test_a_weight_that_changes_before_its_gradient_is_taken_is_refused():
    linear = make_linear("W4A16")
    y = linear(torch.randn(3, 172, requires_grad=True))
    linear.load_state_dict(make_linear("W4A16").state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def siblings(name):
    parent = torch.nn.Module()
    for projection in ("gate_proj", "up_proj"):
        parent.add_module(projection, make_linear(name))
    share_inputs(parent)
    return parent


@pytest.mark.parametrize("name", ["W4A16", "MXFP4", "slabs"])
def test_linears_with_one_input(name):
    parent = siblings(name)
    x = torch.randn(2, 172, requires_grad=True)
    gate, up = parent.gate_proj(x), parent.up_proj(x)
    gate.sum().backward()
    up.sum().backward()  # apart from the first
    expected = parent.gate_proj.weight.sum(0) + parent.up_proj.weight.sum(0)
    torch.testing.assert_close(x.grad, expected.expand(2, -1), rtol=1e-5, atol=1e-4)


def test_an_input_that_begins_to_need_a_gradient_between_siblings():
    parent = siblings("W4A16")
    x = torch.randn(2, 172)
    parent.gate_proj(x)
    x.requires_grad_()
    up = parent.up_proj(x)
    up.sum().backward()
    expected = parent.up_proj.weight.sum(0).expand(2, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-4)


def test_an_input_that_is_used_twice():
    linear = make_linear("W8A16")
    x, weights = torch.randn(3, 172), torch.randn(3, 40)
    got = gradient_of(lambda x: linear(x) * linear(2 * x), x, weights)
    wide = linear.weight
    plain = gradient_of(
        lambda x: (x @ wide.T + linear.bias) * (2 * x @ wide.T + linear.bias), x, weights
    )
    torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-1)


def test_a_product_without_gradients_knows_nothing_of_them(monkeypatch):
    linear = make_linear("slabs")
    monkeypatch.setattr(gradients, "products", lambda *_: pytest.fail("asked for gradients"))
    linear(torch.randn(3, 172))
    with torch.no_grad():
        linear(torch.randn(3, 172, requires_grad=True))
    mix = linear.operand
    assert isinstance(mix, Mix)
