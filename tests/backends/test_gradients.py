"""Gradients of the input of everything that is packed: dL/dx = dL/dy W, straight through Q."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from conftest import DTYPES
from mixes import filled, slab_recipe
from tiny import make_model
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import mixbits
from mixbits import ops
from mixbits.backends import gradients
from mixbits.errors import UsageError
from mixbits.formats.pack import Operand
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Recipe, parse_scheme
from mixbits.model.layout import find_linears
from mixbits.runtime.attention import use_grouped_attention
from mixbits.runtime.fake import FakeLinear, fake_quantize_model
from mixbits.runtime.linear import PackedLinear, share_inputs
from mixbits.runtime.swap import swap_linears
from mixbits.runtime.token_step import use_token_step
from mixbits.source.source import open_source

BACKENDS = [name for name, why in ops.backends().items() if why is None]
SCHEMES = ["W4A16", "W2A16G64ASYM", "W8A16", "MXFP4A16", "MXFP8E5M2A16", "MXFP4", "MXFP8"]
RECIPES = {
    **{name: parse_recipe(name) for name in SCHEMES},
    "slabs": slab_recipe(172, "W4A16", "W8A16"),
    "slabs, activations": slab_recipe(172),
    "rotated": slab_recipe(172, rotated=True),
    "rotated weights": slab_recipe(172, "MXFP4A16", "MXFP8A16", rotated=True),
    "across blocks": Recipe(
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


def assert_same_gradient(function, other, rows=(3,), rtol=1e-5, atol=1e-4):
    """Two functions of x [*rows, 172], with values [*rows, 40], have one gradient."""
    x, weights = torch.randn(*rows, 172), torch.randn(*rows, 40)
    got, expected = (gradient_of(f, x, weights) for f in (function, other))
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


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
    assert_same_gradient(packed, fake)


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
    return Operand.plain(packed, scheme.weight, 172, scheme.activation)


def value_of(operand):
    packed, fmt, _ = operand.parts[0]
    return ops.dequantize(packed, fmt, 172)


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
    from mixbits.formats import fp8_weights

    operand = operand_of("MXFP4A16")
    module = type("Module", (), {})()
    module.packed_matmul = lambda x, packed, fmt, scale: fp8_weights.matmul(x, packed, scale)
    original = ops.module_of
    monkeypatch.setattr(ops, "require_fp8", lambda *_: None)
    monkeypatch.setattr(ops, "module_of", lambda n: module if n == "cuda_fp8" else original(n))
    packed, fmt, _ = operand.parts[0]
    row_scale = ops.fold_rows(packed, fmt, 172)

    def multiply(x):
        return ops.packed_matmul_fp8(x, packed, fmt, row_scale)

    assert_same_gradient(multiply, lambda x: x @ value_of(operand).T)
    x = torch.randn(3, 172)
    assert torch.equal(multiply(x.clone().requires_grad_()), multiply(x))


@pytest.mark.parametrize("name", ["MXFP4", "W4A16ASYM"])
def test_registered_ops(name):
    operand = operand_of(name)
    packed, fmt, activation = operand.parts[0]
    code = 0 if activation is None else activation.code

    def multiply(x):
        return torch.ops.mixbits.packed_matmul(x, *packed, fmt.code, code)

    assert_same_gradient(multiply, lambda x: x @ value_of(operand).T)
    x = torch.randn(3, 172)
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
    assert_same_gradient(compiled, linear)


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

    def checkpointed(x):
        return checkpoint(both, x, use_reentrant=reentrant)

    assert_same_gradient(checkpointed, both, (2, 3), rtol=1e-6, atol=1e-5)


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
    wide = linear.weight

    def plain(x):
        return (x @ wide.T + linear.bias) * (2 * x @ wide.T + linear.bias)

    assert_same_gradient(lambda x: linear(x) * linear(2 * x), plain, rtol=1e-3, atol=1e-1)


def test_a_product_without_gradients_knows_nothing_of_them(monkeypatch):
    linear = make_linear("slabs")
    monkeypatch.setattr(gradients, "products", lambda *_: pytest.fail("asked for gradients"))
    linear(torch.randn(3, 172))
    with torch.no_grad():
        linear(torch.randn(3, 172, requires_grad=True))


# --- models -------------------------------------------------------------------------------------


def packed_and_fake(folder, kind="llama", names=("W4A16", "W8A16"), **overrides):
    """A packed model with everything that makes it fast, and its definition."""
    source = open_source(str(make_model(folder, kind, **overrides)))
    models = [source.load().float().eval().requires_grad_(False) for _ in range(2)]
    linears = find_linears(models[0], include_head=True)
    recipes = {
        info.name: slab_recipe(info.in_features, *names, rotated="down_proj" in info.name)
        if "q_proj" not in info.name
        else parse_recipe(names[0])
        for info in linears
    }
    swap_linears(models[0], list(recipes), lambda n, w, b: filled(w, recipes[n], b))
    fake_quantize_model(models[1], recipes)
    share_inputs(models[0])
    use_grouped_attention(models[0])
    use_token_step(models[0])
    return models


IDS = torch.arange(3, 35).reshape(2, 16)


def embedding_gradient(model, **options):
    embeddings = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=embeddings, labels=IDS, use_cache=False, **options).loss.backward()
    return embeddings.grad


@pytest.mark.parametrize("names", [("W4A16", "W8A16"), ("MXFP4A16", "MXFP8A16")], ids="+".join)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe", "gemma"])
def test_of_a_model(tmp_path, kind, names):
    packed, fake = packed_and_fake(tmp_path, kind, names)
    got, expected = embedding_gradient(packed), embedding_gradient(fake)
    assert torch.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.99999
    torch.testing.assert_close(got.norm(), expected.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_of_a_model_with_checkpoints(tmp_path, reentrant):
    packed, _ = packed_and_fake(tmp_path)
    expected = embedding_gradient(packed)
    packed.activation_checkpointing_enable({"use_reentrant": reentrant})
    packed.train()
    torch.testing.assert_close(embedding_gradient(packed), expected)


def test_a_prefix_in_the_cache_is_learned_through_steps(tmp_path):
    """A native step would write beside it, and give logits that depend on nothing."""
    found = []
    for model in packed_and_fake(tmp_path):
        generator = torch.Generator().manual_seed(0)
        prefix = torch.randn(2, 2, 1, 2, 5, 16, generator=generator).requires_grad_()
        cache = DynamicCache()
        for layer in range(2):
            cache.update(*prefix[layer], layer)
        for token in (3, 4, 5):
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits
        logits.square().sum().backward()
        found.append(prefix.grad.flatten())
    assert torch.cosine_similarity(*found, 0) > 0.99999


# --- peft ---------------------------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def adapter_gradients(peft, model):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Unsupported layer")  # of a class that peft does not know
        model = peft.get_peft_model(model, config)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def as_plain(model):
    """The dequantized model: linears of torch."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data, linear.bias = module.weight, module.bias
            model.set_submodule(name, linear)
    return model


def test_lora_on_all_linears(tmp_path, peft):
    packed, _ = packed_and_fake(tmp_path)
    plain = as_plain(packed)
    found, expected = adapter_gradients(peft, packed), adapter_gradients(peft, plain)
    assert found.keys() == expected.keys() and len(found) == 2 * 2 * 7  # not the head, as in peft
    for name, gradient in found.items():
        cosine = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0)
        assert cosine > 0.9999, name


def test_lora_learns_is_saved_and_comes_back(tmp_path, peft):
    packed, _ = packed_and_fake(tmp_path / "model")
    base = copy.deepcopy(packed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"])
    model = peft.get_peft_model(packed, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        assert torch.equal(again(input_ids=IDS).logits, expected)
        tokens = again.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, model.generate(input_ids=IDS[:1], max_new_tokens=4))
        with again.disable_adapter():
            plain = again(input_ids=IDS).logits
    assert not torch.equal(plain, expected)
    assert torch.equal(again.unload()(input_ids=IDS).logits, plain)


def test_what_would_change_a_packed_weight_is_refused(tmp_path, peft):
    packed, _ = packed_and_fake(tmp_path)
    for init in ("pissa", "olora"):
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=init)
        with pytest.raises(UsageError, match=f"packed weights cannot change: got '{init}'"):
            peft.get_peft_model(copy.deepcopy(packed), config)
    model = peft.get_peft_model(packed, peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(UsageError, match="cannot be merged into a packed linear"):
        model.merge_and_unload()


def test_a_prompt_is_learned(tmp_path, peft):
    packed, fake = packed_and_fake(tmp_path)
    found = []
    for model in (packed, fake):
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(model, config)
        model(input_ids=IDS, labels=IDS).loss.backward()
        (gradient,) = (p.grad for p in model.parameters() if p.requires_grad)
        found.append(gradient.flatten())
    assert found[0].norm() > 0 and torch.cosine_similarity(*found, 0) > 0.9999


def test_trainer_takes_a_model_with_adapters_only(run, tmp_path, peft):
    from transformers.trainer_utils import validate_quantization_for_training

    assert run("--avg-bits", 5) == 0
    model = mixbits.load(tmp_path / "out")
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(model)
    config = peft.LoraConfig(target_modules="all-linear")
    validate_quantization_for_training(peft.get_peft_model(model, config))
