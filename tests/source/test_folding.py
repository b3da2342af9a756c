"""A folded model gives the logits of the original, or is refused with the reason."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from mixes import hadamard_matrix
from small_models import DEEPSEEK, IDS, SIZES, small
from small_models import KINDS as SMALL_KINDS
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.tools.tiny_models import small_seeing_config
from mixbits.errors import UsageError
from mixbits.model.layout import head_is_tied, meta_model
from mixbits.model.twin import same
from mixbits.source.folding import (
    TOLERANCE,
    Folding,
    block_width,
    fold,
    folding_of,
    gathered,
    holds,
    rotate,
)

# Kinds of model -> whether values within heads are turned as well.
FOLDED = {
    **dict.fromkeys(tiny.KINDS, True),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "mamba", "bitnet"), False),
    **dict.fromkeys(("aria_text", "gpt_oss", "hunyuan_v1_moe", "llama4_text"), True),
}
REFUSED = {
    "falcon": "transformer.h.0.input_layernorm (LayerNorm) subtracts a mean",
    "gemma2": "model.layers.0.post_attention_layernorm stands between a block and the stream",
    "gemma3_text": "model.layers.0.post_attention_layernorm stands between a block and the stream",
    "gemma3n_text": "",
    "gpt2": "transformer.h.0.ln_1 (LayerNorm) subtracts a mean",
    "jetmoe": "what model.layers.0.mlp does with the stream is not known",
    "olmo": "no norm with a weight reads what its blocks add up",
    "olmo2": "post_feedforward_layernorm stands between a block and the stream",
    "opt": "model.decoder.layers.0.self_attn_layer_norm (LayerNorm) subtracts a mean",
}


def model_of(kind: str, **more: Any) -> Any:
    """float32, its norms and biases random; `more` goes to the configuration."""
    if kind in SMALL_KINDS:
        return small(kind, **more).float()
    sizes = SIZES if kind not in tiny.KINDS else {**tiny._COMMON, **tiny._KINDS[kind][1]}
    return random_model(AutoConfig.for_model(kind, **{**sizes, **more}))


def random_model(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() > 1 else 0.5
            parameter.data = torch.randn(parameter.shape) * scale + 0.8 * (parameter.dim() < 2)
    return model.requires_grad_(False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS).logits
    return out


def folded(model: Any, folding: Folding) -> Any:
    twin = copy.deepcopy(model)
    fold(twin, folding)
    return twin


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def check(model: Any) -> Folding:
    """Fold a model, and look at all that there is to see of it."""
    folding = folding_of(model)
    before, twin = logits(model), folded(model, folding)
    assert same(logits(twin), before, TOLERANCE)
    ordered = gathered(folding, parameters(model).__getitem__)
    assert ordered.order is not None
    assert ordered.order.tolist() != list(range(len(ordered.order)))
    assert same(logits(folded(model, ordered)), before, TOLERANCE)
    assert not head_is_tied(twin) and not twin.config.tie_word_embeddings
    old, new = dict(model.named_parameters()), dict(twin.named_parameters())
    assert folding.neutral
    for name, value in folding.neutral.items():
        assert (new[name] == value).all() and not (old[name] == value).all()
    width = model.get_input_embeddings().weight.shape[1]
    block = block_width(width)
    embedding = model.get_input_embeddings().weight @ torch.block_diag(
        *[hadamard_matrix(block) / block**0.5] * (width // block)
    )
    assert torch.allclose(twin.get_input_embeddings().weight, embedding, atol=1e-5)
    return folding


def test_all_kinds_are_tried() -> None:
    assert {*SMALL_KINDS, *tiny.KINDS} <= FOLDED.keys() | REFUSED.keys()


@pytest.mark.parametrize("kind", FOLDED)
def test_logits_stay(kind: str) -> None:
    assert check(model_of(kind)).values == FOLDED[kind]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_folded_is_refused(kind: str) -> None:
    model = model_of(kind)
    with pytest.raises(UsageError) as error:
        folding_of(model)
    sentence = str(error.value)
    assert f"got {type(model).__name__}: " in sentence and "\n" not in sentence
    assert REFUSED[kind] in sentence


def test_blocks_of_several_kinds() -> None:
    """Dense ones, then experts; the last like the one before."""
    config = AutoConfig.for_model("deepseek_v3", **DEEPSEEK | {"num_hidden_layers": 3})
    model = random_model(config)
    folding = check(model)
    assert "model.layers.0.mlp.gate_proj.weight" in folding.turns
    for index in (1, 2):
        assert f"model.layers.{index}.mlp.experts.gate_up_proj" in folding.turns
        assert f"model.layers.{index}.mlp.gate.weight" in folding.read


@pytest.mark.parametrize("width", [72, 96, 36])
def test_widths_that_32_does_not_divide(width: int) -> None:
    config = AutoConfig.for_model("llama", **SIZES | {"hidden_size": width})
    folding = check(random_model(config))
    turn = folding.turns["model.embed_tokens.weight"][0]
    assert turn.width == {72: 8, 96: 32, 36: 4}[width]


def test_a_model_without_storage_is_enough() -> None:
    config = AutoConfig.for_model("qwen2", **SIZES | {"tie_word_embeddings": True})
    shapes = meta_model(config)
    folding = folding_of(shapes)
    model = random_model(config)
    assert folding == folding_of(model)
    assert head_is_tied(model) and head_is_tied(shapes)  # they stay as they are


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.0.mlp.gate_proj.weight", lambda t: (replace(t[0], norm=None),)),
        ("model.layers.1.self_attn.q_proj.weight", lambda t: (replace(t[0], width=16),)),
        ("model.layers.1.mlp.down_proj.weight", lambda t: ()),
        ("model.layers.1.self_attn.o_proj.weight", lambda t: t[:1]),
        ("model.layers.0.self_attn.v_proj.bias", lambda t: ()),
        (
            "lm_head.weight",
            lambda t: (replace(t[0], norm="model.layers.0.input_layernorm.weight"),),
        ),
    ],
    ids=["norm", "width", "writer", "values", "bias", "head"],
)
def test_a_wrong_folding_fails_its_trial(name: str, change: Any) -> None:
    model = model_of("qwen2")
    right = folding_of(model)
    assert holds(model, right)
    turns = change(right.turns[name])
    assert turns != right.turns[name]
    assert not holds(model, replace(right, turns={**right.turns, name: turns}))


def test_outliers_that_are_damped_stay_among_their_like() -> None:
    """Channels of large values and small norm's weights: folded, they would spoil their blocks."""
    model = model_of("llama")
    outliers = torch.arange(3, 64, 5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.ones_like(parameter)
            parameter.data[outliers] = 0.01
    order = gathered(folding_of(model), parameters(model).__getitem__).order
    assert order is not None
    assert set(order[: len(outliers)].tolist()) == set(outliers.tolist())


def test_a_model_that_sees_is_refused() -> None:
    """A trial on text would not show what becomes of pictures."""
    config = small_seeing_config("mistral3")
    config.architectures = ["Mistral3ForConditionalGeneration"]
    model = meta_model(config)
    with pytest.raises(UsageError, match="has to do with more than text"):
        folding_of(model)


def test_weights_in_16_bits_are_rounded_once() -> None:
    model = model_of("llama").bfloat16()
    folding = folding_of(model)
    state = dict(model.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    found = folding.folded(name, state[name], state.__getitem__)
    weight = state[name].double() * state["model.layers.0.post_attention_layernorm.weight"].double()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), rotate(weight, 32), atol=1e-6)
    twin = folded(model, folding)
    assert torch.equal(dict(twin.named_parameters())[name], found.bfloat16())


@pytest.mark.parametrize("width", [1, 2, 32])
def test_the_rotation_is_its_own_inverse(width: int) -> None:
    x = torch.randn(3, 2 * width, 5)
    assert torch.allclose(rotate(rotate(x, width, 1), width, 1), x, atol=1e-5)
