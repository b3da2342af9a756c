"""A few large activations do not cost the others of their block any digits, in any CPU kernel.

Language models have massive activations: some channels of 1e4 among values of about 1, which many
weights ignore. What a product may then be off by is what README says: less than the last digit of
its dtype. Where weights do not ignore them, there is also what sums in float32 leave of terms that
large.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import by_dtype
from mixes import exact_product
from tiny import make_model
from torch import Tensor

from mixbits import ops
from mixbits.backends import cpu
from mixbits.formats.pack import Operand, order_dtype
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import parse_scheme
from mixbits.model.layout import find_linears
from mixbits.runtime.fake import fake_quantize_model
from mixbits.runtime.linear import PackedLinear, share_inputs
from mixbits.runtime.swap import swap_linears
from mixbits.runtime.token_step import use_token_step
from mixbits.source.source import open_source

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason="no native library")

# float32: of activations that become integers of 24 bits, half a step of typical blocks.
LAST_DIGIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}
SIZES = (1e4, -6e4)
TOKENS = (1, 3, 40)
COLUMNS, ROWS = 296, 24  # the last block, and the last step of every path, are not whole
BLOCK = slice(32, 64)  # where most of the large values are
WEIGHT_ONLY = [
    *(
        f"W{bits}A16{group}{end}"
        for bits in "248"
        for group in ("G32", "G64", "")
        for end in ("", "ASYM")
    ),
    *("MXFP4A16", "MXFP8A16", "MXFP8E5M2A16"),
]
SCHEMES = [*WEIGHT_ONLY, "MXFP4", "MXFP8", "MXFP8E5M2"]
# Places of large values -> how far the rest of their block is scaled down.
PLACES = {
    "one": ([37], 1.0),
    "first and last": ([0, COLUMNS - 1], 1.0),
    "several": ([32, 37, 38, 49, 50, 63], 1.0),
    "half a block": (list(range(32, 64, 2)), 1.0),
    "several blocks": ([3, 37, 130, 131, 200, 290], 1.0),
    "every block": (list(range(7, COLUMNS, 32)), 1.0),
    "beside small ones": ([37], 2.0**-10),
    "beside zeros": ([37, 38], 0.0),
}


def isas() -> Iterator[str]:
    """Every instruction set that this CPU has, in use."""
    before = cpu.isa()
    for name in cpu.available_isas():
        cpu.set_isa(name)
        yield name
    cpu.set_isa(before)


def with_outliers(x: Tensor, places: list[int], size: float, rest: float = 1.0) -> Tensor:
    """x [M, K] with values of both signs there, in a block that is scaled by `rest`."""
    x = x.clone()
    x[:, BLOCK] *= rest
    x[:, places] = size * torch.tensor([1.0, -1.0]).repeat(len(places))[: len(places)]
    return x


def make_mix(scheme: str, weight: Tensor) -> tuple[Operand, Tensor]:
    """A packed weight [N, K] as a linear of one segment, and what it stands for, in float64."""
    parsed = parse_scheme(scheme)
    assert parsed.weight is not None
    packed = ops.quantize_pack(weight, parsed.weight, "reference")
    values = ops.dequantize(packed, parsed.weight, weight.shape[1], backend="reference")
    operand = Operand.plain(packed, parsed.weight, weight.shape[1], parsed.activation)
    return operand, values.double()


def check_promise(got: Tensor, exact: Tensor, magnitudes: Tensor, what: object) -> None:
    # Sums in float32, of some hundred terms in 4 or more parts: two roundings of the largest terms.
    error = (got.double() - exact).norm()
    allowed = LAST_DIGIT[got.dtype] * exact.norm() + 2.0**-22 * magnitudes.norm()
    assert error <= allowed, (what, (error / allowed).item())


def check_all(x: Tensor, mixes: list[tuple[Operand, Tensor]]) -> None:
    """Products of x [40, K] and several linears in one call, for 1, 3 and 40 tokens."""
    expected = [exact_product(x, mix, values) for mix, values in mixes]
    for isa in isas():
        for tokens in TOKENS:
            outs = ops.packed_matmuls(x[:tokens], [mix for mix, _ in mixes], "cpu")
            for out, (exact, magnitudes, _) in zip(outs, expected, strict=True):
                check_promise(out, exact[:tokens], magnitudes[:tokens], (isa, tokens))


@by_dtype
@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_values_that_a_weight_ignores(scheme, dtype):
    x = torch.randn(max(TOKENS), COLUMNS)
    for places, rest in PLACES.values():
        weight = (torch.randn(ROWS, COLUMNS) / 16).index_fill(1, torch.tensor(places), 0)
        for size in SIZES:
            check_all(with_outliers(x, places, size, rest).to(dtype), [make_mix(scheme, weight)])


@by_dtype
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_nothing_but_large_values_and_a_few_small_ones(scheme, dtype):
    """Blocks of zeros else; and small ones below others that are ignored, too."""
    weight = torch.randn(ROWS, COLUMNS).index_fill(1, torch.tensor([37, 38, 39, 40]), 0)
    for size in SIZES:
        for middle in (0.0, 3.01, 200.3):
            x = torch.zeros(max(TOKENS), COLUMNS)
            x[:, [41, 55]] = torch.tensor([0.0078125, -0.00123])
            x[:, [37, 38, 39, 40]] = torch.tensor([size, middle, -size, -middle])
            check_all(x.to(dtype), [make_mix(scheme, weight)])


@by_dtype
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_large_values_that_cancel(scheme, dtype):
    """Within a block, and across blocks that have the same scale."""
    for other in (50, 130):
        weight = (torch.randn(ROWS, COLUMNS) / 16).clamp(-0.1, 0.1)
        weight[:, ::16], weight[:, 1::16] = 0.125, -0.125  # all groups have the same bounds
        weight[:, other] = weight[:, 37]
        for size in SIZES:
            x = with_outliers(torch.randn(max(TOKENS), COLUMNS), [37, other], size)
            check_all(x.to(dtype), [make_mix(scheme, weight)])


@by_dtype
def test_products_that_share_an_input_with_large_values(dtype):
    """q, k and v in one call: some share prepared tokens, others do not."""
    places = [37, 130]
    mixes = [
        make_mix(scheme, torch.randn(ROWS + i, COLUMNS).index_fill(1, torch.tensor(places), 0))
        for i, scheme in enumerate(["W4A16", "W4A16G32", "MXFP4A16", "W4A16", "MXFP8A16", "W2A16"])
    ]
    for size in SIZES:
        check_all(with_outliers(torch.randn(max(TOKENS), COLUMNS), places, size).to(dtype), mixes)


@by_dtype
@pytest.mark.parametrize("arranged", ["natural", "ordered", "rotated"])
def test_segments_of_an_input_with_large_values(arranged, dtype):
    segments = (("W8A16", 64), ("W4A16", 100), ("MXFP4A16", 40), ("MXFP8A16", 60), ("W2A16", 32))
    places = [7, 37, 200, COLUMNS - 1]
    order = None if arranged == "natural" else torch.randperm(COLUMNS)
    # A rotated weight ignores nothing: results are to stay within float16.
    weight = (torch.randn(ROWS, COLUMNS) / 64).index_fill(1, torch.tensor(places), 0)
    weight = weight if order is None else weight[:, order]
    parts, values = [], []
    for (scheme, _), piece in zip(
        segments, weight.split([columns for _, columns in segments], 1), strict=True
    ):
        mix, part = make_mix(scheme, piece.contiguous())
        parts.append(mix.parts[0])
        values.append(part)
    mix = Operand(
        tuple(parts),
        tuple(columns for _, columns in segments),
        None if order is None else order.to(order_dtype(COLUMNS)),
        arranged == "rotated",
    )
    for size in SIZES:
        x = with_outliers(torch.randn(max(TOKENS), COLUMNS), places, size).to(dtype)
        check_all(x, [(mix, torch.cat(values, 1))])


@pytest.mark.parametrize("scheme", ["W2A16", "W4A16ASYM", "W8A16", "MXFP4A16"])
def test_int8_activations_beside_large_ones(isa, scheme):
    """The error is that of 8 bits of the others, as it is without."""
    weight = torch.randn(ROWS, 512).index_fill(1, torch.tensor([37, 38, 300]), 0)
    mix, values = make_mix(scheme, weight)
    for tokens in TOKENS:
        x = with_outliers(torch.randn(tokens, 512), [37, 38, 300], 1e4)
        exact = x.double() @ values.T
        got = ops.packed_matmul(x, *mix.parts[0][:2], backend="cpu", int8_activations=True)
        # 1/127 of the largest value, of about 2.3 standard deviations: see test_matmul.py.
        assert (got - exact).norm() < 1.2 * 2.3 / 127 / 12**0.5 * exact.norm()


@pytest.mark.parametrize("scheme", ["W4A16", "W2A16G32ASYM", "MXFP4A16"])
def test_values_of_all_sizes_in_every_block(scheme):
    """More terms than there is room for: the float path takes what integers cannot hold."""
    sizes = torch.exp2(-12.0 * (torch.arange(COLUMNS) % 8))  # each 2^-12 of the one before
    for kept in (0, 1, 3, 7):  # the others are ignored
        weight = torch.randn(ROWS, COLUMNS) * (torch.arange(COLUMNS) % 8 == kept)
        x = (torch.randn(max(TOKENS), COLUMNS) * sizes).bfloat16()
        check_all(x, [make_mix(scheme, weight)])


def outlier_model(folder, scheme, dtype):
    """Packed, rounded in place, and that in float64: a Llama whose down_proj sees 1e4 and more."""
    source = open_source(str(make_model(folder)))
    models = [source.load().float() for _ in range(3)]
    for model in models:
        for layer in model.model.layers:
            norm, mlp = layer.post_attention_layernorm.weight, layer.mlp
            norm.data[5] = 2e4 / model.config.hidden_size**0.5
            mlp.gate_proj.weight.data[:, 5] = mlp.up_proj.weight.data[:, 5] = 0
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight.data[7] *= 40 / linear.weight.data[7].norm()
            mlp.down_proj.weight.data[:, 7] = 0
        model.to(dtype)
    packed, rounded, exact = models
    recipes = {info.name: parse_recipe(scheme) for info in find_linears(packed)}
    swap_linears(packed, list(recipes), lambda n, w, b: PackedLinear.from_weight(w, recipes[n], b))
    for plain in (rounded, exact):
        fake_quantize_model(plain, recipes)
    share_inputs(packed)
    use_token_step(packed)
    return [m.eval().requires_grad_(False) for m in (packed, rounded, exact.double())]


@by_dtype
@pytest.mark.parametrize("scheme", ["W4A16", "W2A16ASYM", "MXFP4A16", "MXFP8A16", "MXFP4"])
def test_steps_and_prefill_of_a_model_with_large_activations(tmp_path, scheme, dtype):
    packed, rounded, exact = outlier_model(tmp_path, scheme, dtype)
    seen: list[Tensor] = []
    exact.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].abs())
    )
    ids = torch.arange(12)[None] * 7 % packed.config.vocab_size

    def logits(model, first):
        """Of the last tokens, from number `first` on one by one."""
        out = model(ids[:, :first], use_cache=True)
        found = [out.logits[0]]
        for at in range(first, ids.shape[1]):
            step = {"past_key_values": out.past_key_values, "use_cache": True}
            out = model(ids[:, at : at + 1], **step)
            found.append(out.logits[0])
        return torch.cat(found)[6:].double()

    truth = logits(exact, 12)
    assert seen[0][..., 7].amax() > 1e3 * seen[0].median()
    torchs = (logits(rounded, 12) - truth).norm()
    for _ in isas():
        for first in (6, 12):  # native steps, and all tokens at once
            assert (logits(packed, first) - truth).norm() <= 2 * torchs


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.complex64])
def test_inputs_of_other_dtypes_are_refused(dtype):
    linear = PackedLinear.from_weight(torch.randn(8, 64), parse_recipe("W4A16"))
    with pytest.raises(TypeError, match="must be bfloat16, float16 or float32: got torch"):
        linear(torch.ones(2, 64, dtype=dtype))
