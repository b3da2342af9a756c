"""A native step is the step of the model's modules, and everything else is left alone."""

from __future__ import annotations

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mixes import filled, packed_copy, slab_recipe
from tiny import make_model
from transformers import AutoTokenizer, DynamicCache, StaticCache

import mixbits
from mixbits import demo
from mixbits.backends import cpu
from mixbits.formats.recipes import parse_recipe
from mixbits.model.layout import find_linears
from mixbits.runtime.cache import GrowingLayer
from mixbits.runtime.fake import fake_quantize_model
from mixbits.runtime.linear import share_inputs
from mixbits.runtime.swap import swap_linears
from mixbits.runtime.token_step import Angles, use_token_step
from mixbits.source.source import open_source

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason="no native library")

MIXES = {
    "weights": [
        *("W4A16", "MXFP8A16", "BF16", "W8A16ASYM", "MXFP4A16", "W2A16G64ASYM"),
        *("W3A16", "MXFP6A16", "W5A16G32ASYM", "W6A16", "NVFP4A16"),
    ],
    "activations": ["MXFP4", "MXFP8", "W4A16", "BF16", "MXFP8E5M2"],
    "plain": ["BF16"],
}
ROPES = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 2.0},
}


MIXED = {"slabs": ("MXFP4A16", "MXFP8A16"), "slabs, activations": ("MXFP4", "MXFP8")}


def recipes_of(model, mix):
    linears = find_linears(model, include_head=True)
    if mix in MIXED:  # q and k in one order, v in another; down_proj rotated
        return {
            info.name: slab_recipe(
                info.in_features,
                *MIXED[mix],
                "down_proj" in info.name,
                seed=int("v_proj" in info.name),
            )
            for info in linears
        }
    turns = itertools.cycle(MIXES[mix])
    return {info.name: parse_recipe(next(turns)) for info in linears}


def make(folder, kind="llama", mix="weights", dtype=torch.float32, **overrides):
    """A packed model, and its weights in float64: what both of its ways to run stray from."""
    overrides = {"sliding_window": None, **overrides} if kind == "mistral" else overrides
    source = open_source(str(make_model(folder, kind, **overrides)))
    model, exact = source.load().to(dtype), source.load().to(dtype)
    recipes = {n: r for n, r in recipes_of(model, mix).items() if r.packed}
    swap_linears(model, list(recipes), lambda n, w, b: filled(w, recipes[n], b))
    fake_quantize_model(exact, recipes)
    share_inputs(model)
    return [m.eval().requires_grad_(False) for m in (model, exact.double())]


@pytest.fixture
def steps(monkeypatch):
    """Counts the native steps."""
    taken = []
    original = cpu.token_step
    monkeypatch.setattr(cpu, "token_step", lambda *a: taken.append(1) or original(*a))
    return taken


def decode_logits(model, count=24, prompt=9, **options):
    """Logits of single-token steps after a prompt; tokens do not depend on the model."""
    ids = torch.arange(prompt + count)[None] * 7 % model.config.vocab_size
    cache, logits = None, []
    with torch.no_grad():
        for last in range(prompt, prompt + count):
            new = ids[:, :last] if cache is None else ids[:, last - 1 : last]
            out = model(new, past_key_values=cache, use_cache=True, **options)
            cache = out.past_key_values
            logits.append(out.logits[:, -1])
    return torch.cat(logits[1:]).double()


def strays(model, exact, count=24):
    """How far from the truth a model's modules lead, and then its native steps."""
    modules, truth = decode_logits(model, count), decode_logits(exact, count)
    use_token_step(model)
    return modules - truth, decode_logits(model, count) - truth


def assert_steps_see(change, model, steps, count=24, atol=1e-4):
    """Steps after a change are those of modules that have it, and no longer those before."""
    use_token_step(model)
    before = decode_logits(model, count)
    change(model)
    other = copy.deepcopy(model)
    del other.forward
    taken = len(steps)
    changed, expected = decode_logits(model, count), decode_logits(other, count)
    assert (len(steps) > taken) == (model.dtype != torch.float64)
    assert not torch.equal(changed, before)
    # Of bfloat16: as far as roundings of one unit per operation lead.
    atol += 0.1 * (model.dtype == torch.bfloat16)
    torch.testing.assert_close(changed, expected, rtol=0, atol=atol)


def assert_left_to_the_modules(model, steps):
    expected = decode_logits(model)
    use_token_step(model)
    assert torch.equal(decode_logits(model), expected) and not steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mix", [*MIXES, *MIXED])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_steps_stray_no_further_than_the_modules_do(tmp_path, steps, kind, mix, dtype):
    modules, native = strays(*make(tmp_path, kind, mix, dtype))
    assert len(steps) == 23
    # Both round in the same places, and stray independently. What is compared is the mean over
    # all logits: where activations are rounded, a single one may take the neighbouring code.
    assert 0 < native.square().mean().sqrt() <= 2 * modules.square().mean().sqrt()


@pytest.mark.parametrize("rope", ROPES)
def test_every_kind_of_rotary_embedding(tmp_path, steps, rope):
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    modules, native = strays(*make(tmp_path, mix="plain", rope_parameters=parameters), 80)
    assert len(steps) == 79
    assert native.abs().max() <= 2 * modules.abs().max()


@pytest.mark.parametrize("mix", ["weights", "slabs"])
def test_steps_with_every_instruction_set(tmp_path, isa, steps, mix):
    modules, native = strays(*make(tmp_path, "qwen3", mix))
    assert native.abs().max() <= 2 * modules.abs().max()
    assert steps


@pytest.mark.parametrize("mix", ["activations", "slabs, activations"])
def test_steps_do_not_depend_on_threads(tmp_path, mix):
    model, _ = make(tmp_path, mix=mix, dtype=torch.bfloat16)
    use_token_step(model)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 5):  # more than there are heads, or cores
            torch.set_num_threads(threads)
            outs.append(decode_logits(model))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_generate_gives_the_tokens_that_the_modules_give(steps, monkeypatch):
    source = open_source(str(demo.MODEL_DIR))
    model = source.load().float().eval().requires_grad_(False)
    packed_copy(model, {n: s for n, s in recipes_of(model, "weights").items() if s.packed})
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    inputs = tokenizer("def main(arguments):", return_tensors="pt")
    modules = model.generate(**inputs, max_new_tokens=200, do_sample=False)
    use_token_step(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=200, do_sample=False), modules)
    assert len(steps) == modules.shape[1] - inputs.input_ids.shape[1] - 1 > 30


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_threads_that_generate_at_once(tmp_path, steps, rope):
    """On both sides of a block of angles, or with angles that are made for every step."""
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **ROPES.get(rope, {})}
    model, _ = make(tmp_path, max_position_embeddings=512, rope_parameters=parameters)
    use_token_step(model)
    lengths = (10, 240, 250, 254, 256, 300)
    prompts = [torch.randint(0, 130, (1, length)) for length in lengths]

    def generate(prompt):
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        out = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **options)
        return torch.cat(out.logits)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(generate, prompts * 4))
    torch.set_num_threads(before)
    assert len(steps) == 11 * 5 * len(prompts)
    assert all(map(torch.equal, together, alone * 4))


def test_angles_stay_while_they_are_read(tmp_path):
    """Other threads ask for other positions meanwhile."""
    model, _ = make(tmp_path)
    angles = Angles(model.model.rotary_emb, model.model.embed_tokens.weight.detach())
    cos, sin, start = angles.at(300)
    kept = cos.clone(), sin.clone()
    angles.at(10)
    torch.empty(cos.shape).fill_(7)
    assert torch.equal(cos, kept[0]) and torch.equal(sin, kept[1])
    assert start == (300 - 256) * 16 * 4


def replace_data(rotary):
    rotary.inv_freq.data = rotary.inv_freq / 2


FREQUENCIES = {
    "in place": lambda rotary: rotary.inv_freq.mul_(0.5),
    "data": replace_data,
    "replaced": lambda rotary: setattr(rotary, "inv_freq", rotary.inv_freq / 2),
    "scaling": lambda rotary: setattr(rotary, "attention_scaling", 1.5),
}


@pytest.mark.parametrize("name", FREQUENCIES)
def test_angles_see_new_frequencies(tmp_path, steps, name):
    model, _ = make(tmp_path)
    assert_steps_see(lambda m: FREQUENCIES[name](m.model.rotary_emb), model, steps, 3)


def test_a_loaded_model_takes_native_steps(run, tmp_path, steps):
    assert run("--avg-bits", 5) == 0
    model = mixbits.load(tmp_path / "out")
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, min_new_tokens=6)
    assert out.shape == (1, 9) and len(steps) == 5


# --- what is left alone ---------------------------------------------------------------------------


def after_prompt(model, batch=1):
    """A prompt's cache: transformers' own, without what a step adds to it."""
    ids = torch.arange(8).repeat(batch, 1)
    with torch.no_grad():
        return model(ids, past_key_values=DynamicCache(config=model.config)).past_key_values


def static_cache(model):
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.arange(8)[None], past_key_values=cache)
    return cache


ONE = torch.tensor([[3]])
CALLS = {
    "batch": lambda m: m(torch.tensor([[3], [4]]), past_key_values=after_prompt(m, 2)),
    "two tokens": lambda m: m(torch.tensor([[3, 4]]), past_key_values=after_prompt(m)),
    "no cache": lambda m: m(ONE),
    "empty cache": lambda m: m(ONE, past_key_values=DynamicCache()),
    "static cache": lambda m: m(ONE, past_key_values=static_cache(m)),
    "padding": lambda m: m(
        ONE, past_key_values=after_prompt(m), attention_mask=torch.tensor([[0, 0] + [1] * 7])
    ),
    "embeddings": lambda m: m(
        inputs_embeds=m.get_input_embeddings()(ONE), past_key_values=after_prompt(m)
    ),
    "labels": lambda m: m(ONE, past_key_values=after_prompt(m), labels=ONE),
    "hidden states": lambda m: m(ONE, past_key_values=after_prompt(m), output_hidden_states=True),
    "tuple": lambda m: m(ONE, past_key_values=after_prompt(m), return_dict=False),
    "cache not used": lambda m: m(ONE, past_key_values=after_prompt(m), use_cache=False),
    "chosen logits": lambda m: m(
        ONE, past_key_values=after_prompt(m), logits_to_keep=torch.tensor([0])
    ),
    "two positions": lambda m: m(
        torch.tensor([[3], [4]]),
        past_key_values=after_prompt(m, 2),
        position_ids=torch.tensor([[8], [5]]),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_calls_go_to_the_modules(tmp_path, steps, name):
    model, _ = make(tmp_path)
    other = copy.deepcopy(model)
    use_token_step(model)
    with torch.no_grad():
        out, expected = CALLS[name](model), CALLS[name](other)
    assert not steps
    assert torch.equal(out[1 if name == "labels" else 0], expected[1 if name == "labels" else 0])
    assert len(out) == len(expected)


class Doubled(torch.nn.Module):
    """A linear with something of its own, as adapters are."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return 2 * self.linear(x)


def attention_of(model):
    return model.model.layers[1].self_attn


def replace_weight(model):
    norm = model.model.norm
    norm.weight.data = norm.weight.data * 2


UNKNOWN = {
    "adapter": lambda m: setattr(attention_of(m), "o_proj", Doubled(attention_of(m).o_proj)),
    "hook": lambda m: attention_of(m).register_forward_hook(lambda *args: None),
    "hook before": lambda m: m.model.norm.register_forward_pre_hook(lambda *args: None),
    "method": lambda m: setattr(m.model.norm, "forward", lambda x: x * 2),
    "training": lambda m: m.train(),
    "eager": lambda m: m.set_attn_implementation("eager"),
    "backend": lambda m: setattr(attention_of(m).q_proj, "backend", "reference"),
    "gradient": lambda m: m.model.norm.requires_grad_(),
    "activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", torch.nn.GELU()),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("late", [False, True], ids=["before", "between steps"])
def test_models_with_other_parts_run_as_they_are(tmp_path, steps, name, late):
    model, _ = make(tmp_path)
    other = copy.deepcopy(model)
    use_token_step(model)
    caches = [after_prompt(m) for m in (model, other)]
    if late:
        for m, cache in zip((model, other), caches, strict=True):
            m(ONE, past_key_values=cache)
        assert len(steps) == 1
    for m in (model, other):
        UNKNOWN[name](m)
    out, expected = (m(ONE, past_key_values=c) for m, c in zip((model, other), caches, strict=True))
    assert len(steps) == late
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-5)
    assert out.logits.requires_grad == expected.logits.requires_grad


@pytest.mark.parametrize(
    "change", [replace_weight, lambda m: m.to(torch.bfloat16), lambda m: m.to(torch.float64)]
)
def test_steps_see_new_tensors(tmp_path, steps, change):
    model, _ = make(tmp_path, mix="plain")
    assert_steps_see(change, model, steps, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma", "qwen3_moe", "mixtral"])
def test_other_models_keep_their_modules_and_grow_their_cache(tmp_path, steps, kind):
    model, _ = make(tmp_path, kind)
    assert_left_to_the_modules(model, steps)
    cache = after_prompt(model)
    model(ONE, past_key_values=cache)
    assert all(type(layer) is GrowingLayer for layer in cache.layers)


def test_a_sliding_window_is_left_to_the_modules(tmp_path, steps):
    model, _ = make(tmp_path, "mistral", sliding_window=4)
    assert_left_to_the_modules(model, steps)


def reverse_order(model):
    linear = attention_of(model).q_proj
    linear.order = linear.order.flip(0)


def fewer_bits(model):
    part = attention_of(model).q_proj.segments[1]
    part.weight_scale = part.weight_scale - 1


def swap_data(model):
    part = attention_of(model).q_proj.segments[1]
    part.weight_packed.data = part.weight_packed ^ 0x11


def swap_buffer(model):
    part = attention_of(model).q_proj.segments[1]
    part._buffers["weight_packed"] = part.weight_packed ^ 0x11


@pytest.mark.parametrize(
    "change",
    [reverse_order, fewer_bits, swap_data, swap_buffer, lambda m: m.to(torch.bfloat16)],
)
def test_steps_see_changes_of_mixed_linears(tmp_path, steps, change):
    model, _ = make(tmp_path, mix="slabs")
    assert_steps_see(change, model, steps)


# --- within transformers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"output_scores": True, "return_dict_in_generate": True},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generate_in_every_way(tmp_path, options):
    model, _ = make(tmp_path)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        out = model.generate(torch.tensor([[5, 6, 7, 5, 6]]), max_new_tokens=20, **options)
        results.append(out if isinstance(out, torch.Tensor) else out.sequences)
        use_token_step(model)
    assert torch.equal(*results)


def test_copies_of_a_model_have_steps_of_their_own(tmp_path, steps):
    model, _ = make(tmp_path)
    use_token_step(model)
    expected = decode_logits(model, 3)
    other = copy.deepcopy(model)
    replace_weight(model)
    assert torch.equal(decode_logits(other, 3), expected)
    assert not torch.equal(decode_logits(model, 3), expected)
    restored = pickle.loads(pickle.dumps(other))
    assert torch.allclose(decode_logits(restored, 3), expected, rtol=0, atol=1e-5)


def test_a_cropped_cache_is_decoded_again(tmp_path, steps):
    model, _ = make(tmp_path)
    use_token_step(model)
    cache = after_prompt(model)
    first = [model(torch.tensor([[t]]), past_key_values=cache).logits for t in (1, 2, 3)]
    cache.crop(-2)
    again = [model(torch.tensor([[t]]), past_key_values=cache).logits for t in (2, 3)]
    assert len(steps) == 5
    assert all(map(torch.equal, again, first[1:]))


def test_the_signature_of_forward_is_kept(tmp_path):
    import inspect

    model, _ = make(tmp_path)
    before = inspect.signature(model.forward)
    use_token_step(model)
    assert inspect.signature(model.forward) == before


def test_a_tokenizer_for_stop_strings_changes_nothing(steps):
    model = open_source(str(demo.MODEL_DIR)).load()
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    inputs = tokenizer("def main(arguments):", return_tensors="pt")
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    use_token_step(model)
    for more in ({}, {"stop_strings": "never to be seen"}):
        assert torch.equal(
            model.generate(**inputs, tokenizer=tokenizer, **options, **more), expected
        )
    assert len(steps) == 2 * 8
