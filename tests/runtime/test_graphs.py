"""Replayed steps give what plain ones give. A stand-in replays on the CPU; a GPU captures."""

from __future__ import annotations

import copy
import gc
import inspect

import pytest
import torch
from tiny import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from mixbits.formats.recipes import parse_recipe
from mixbits.model.layout import find_linears
from mixbits.runtime import graphs
from mixbits.runtime.linear import PackedLinear, share_inputs
from mixbits.runtime.swap import swap_linears

NEW = 9
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Rerun:
    """Replays by running the step again: at the same addresses, as a graph would."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, step):
        self.recorded += 1
        result = step()

        def replay():
            self.replayed += 1
            result.copy_(step())

        return replay, result


@pytest.fixture
def record(device):
    return Rerun() if device == "cpu" else graphs.capture


def packed_model(folder, kind="llama", device="cpu", scheme="MXFP4A16"):
    make_model(folder, kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    swap_linears(
        model,
        [info.name for info in find_linears(model)],
        lambda name, weight, bias: PackedLinear.from_weight(
            weight, parse_recipe(scheme), bias, name
        ),
    )
    share_inputs(model)
    return model.to(device).requires_grad_(False)


def prompt(device, rows=2, length=5):
    ids = torch.randint(130, (rows, length), generator=torch.Generator().manual_seed(0))
    return ids.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma"])
def test_generate_is_the_same(tmp_path, kind, device, record):
    model = packed_model(tmp_path, kind, device)
    ids = prompt(device)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    calls = [{}, {"attention_mask": mask}, {"num_beams": 2}]
    plain = [model.generate(ids, **OPTIONS, **more) for more in calls]
    plain.append(model.generate(ids[:1, :3], **OPTIONS))
    assert graphs.use_graphs(model, record) is None
    graphed = [model.generate(ids, **OPTIONS, **more) for more in calls]
    graphed.append(model.generate(ids[:1, :3], **OPTIONS))
    for ours, expected in zip(graphed, plain, strict=True):
        assert torch.equal(ours, expected)
    if device == "cpu":
        assert record.replayed >= 3 * (NEW - 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8A16", "W4A16"])
@torch.no_grad()
def test_a_replay_equals_the_eager_step_to_the_bit(tmp_path, device, scheme, record):
    model = packed_model(tmp_path, device=device, scheme=scheme)
    ids = prompt(device, 1, 9)
    logits = []
    for graphed in (False, True):
        if graphed:
            graphs.use_graphs(model, record)
        cache = _static(model)
        model(input_ids=ids[:, :4], past_key_values=cache)
        steps = [
            model(input_ids=ids[:, at : at + 1], past_key_values=cache).logits for at in range(4, 9)
        ]
        logits.append(torch.cat(steps))
    assert torch.equal(*logits)


def test_a_step_is_captured_once_for_caches_of_one_size(tmp_path):
    model, record = packed_model(tmp_path), Rerun()
    assert graphs.use_graphs(model, record) is None
    for _ in range(3):
        model.generate(prompt("cpu"), **OPTIONS)
    assert (record.recorded, record.replayed) == (1, 3 * (NEW - 1))
    model.generate(prompt("cpu", rows=1), **OPTIONS)  # other shapes: once more
    assert record.recorded == 2
    model.generate(prompt("cpu", rows=1), tokenizer=object(), **OPTIONS)  # as servers do
    assert (record.recorded, record.replayed) == (2, 5 * (NEW - 1))


def _static(model, length=16):
    return StaticCache(config=model.config, max_cache_len=length)


@torch.no_grad()
def test_two_caches_in_turn_keep_their_own_contents(tmp_path):
    """The memory of the captured step goes to and fro, and nobody loses a token."""
    model = packed_model(tmp_path)
    ids = prompt("cpu", rows=1, length=12)
    expected = model(ids).logits
    graphs.use_graphs(model, Rerun())
    caches = [_static(model), _static(model)]
    for cache, first in zip(caches, (3, 5), strict=True):
        model(input_ids=ids[:, :first], past_key_values=cache)
    for step in range(5):
        for cache, first in zip(caches, (3, 5), strict=True):
            at = first + step
            logits = model(input_ids=ids[:, at : at + 1], past_key_values=cache).logits
            torch.testing.assert_close(logits[:, 0], expected[:, at], rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_gone_is_not_kept_alive(tmp_path):
    model = packed_model(tmp_path)
    graphs.use_graphs(model, Rerun())
    cache = _static(model)
    with torch.no_grad():
        model(input_ids=prompt("cpu", 1, 3), past_key_values=cache)
        model(input_ids=prompt("cpu", 1, 1), past_key_values=cache)
    import weakref

    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_what_cannot_be_captured_runs_plainly_and_says_so(tmp_path):
    model = packed_model(tmp_path)
    plain = model.generate(prompt("cpu"), **OPTIONS)

    def refuse(step):
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs.use_graphs(model, refuse)
    with pytest.warns(UserWarning, match="no CUDA graphs: operation not permitted.*capturing$"):
        assert torch.equal(model.generate(prompt("cpu"), **OPTIONS), plain)
    assert torch.equal(model.generate(prompt("cpu"), **OPTIONS), plain)


@pytest.mark.parametrize(("kind", "why"), [("mistral", "static"), ("qwen3_moe", "experts")])
def test_models_that_are_left_alone(tmp_path, kind, why):
    model = packed_model(tmp_path, kind)
    before = copy.copy(model.generation_config)
    assert why in graphs.use_graphs(model, Rerun())
    assert not {"forward", "generate"} & set(vars(model))
    assert model.generation_config.to_dict() == before.to_dict()


def test_calls_that_are_no_plain_step_are_left_alone(tmp_path):
    model, record = packed_model(tmp_path), Rerun()
    graphs.use_graphs(model, record)
    ids = prompt("cpu", 1, 4)
    with torch.no_grad():
        cache = _static(model)
        model(input_ids=ids, past_key_values=cache)  # a prompt
        model(ids[:, :1], past_key_values=cache)  # by position
        model(input_ids=ids[:, :1])  # no cache
        out = model(input_ids=ids[:, :1], past_key_values=cache, output_hidden_states=True)
        assert len(out.hidden_states) == 3
    model(input_ids=ids[:, :1], past_key_values=cache)  # with gradients
    assert record.recorded == 0


def test_it_can_be_undone_and_keeps_its_signature(tmp_path):
    model = packed_model(tmp_path)
    before = inspect.signature(model.forward)
    graphs.use_graphs(model, Rerun())
    assert inspect.signature(model.forward) == before
    assert inspect.signature(model.generate) == inspect.signature(
        type(model).generate.__get__(model)
    )
    graphs.drop_graphs(model)
    assert not {"forward", "generate"} & set(vars(model))


def test_a_cache_of_the_callers_own_is_left_alone(tmp_path):
    model, record = packed_model(tmp_path), Rerun()
    ids = prompt("cpu")
    expected = model.generate(ids, **OPTIONS)
    graphs.use_graphs(model, record)
    config = copy.deepcopy(model.generation_config)
    config.update(cache_implementation="dynamic")
    for more in (
        {"past_key_values": DynamicCache(config=model.config)},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"generation_config": config},
    ):
        rows = ids[:1] if "prompt_lookup_num_tokens" in more else ids
        got = model.generate(rows, **OPTIONS, **more)
        assert torch.equal(got, expected[: len(rows)]), more
    assert record.recorded == 0
    mine = StaticCache(config=model.config, max_cache_len=ids.shape[1] + NEW)
    assert torch.equal(model.generate(ids, **OPTIONS, past_key_values=mine), expected)
    assert record.recorded == 1  # static, if the caller's own: replayed


# The last is torch.tensor(...): on a GPU, a copy from the host.
_WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "is_nonzero", "lift_fresh")


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a device: a capture would fail there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in _WAITING, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", ["MXFP4", "W4A16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_a_captured_step_asks_nothing_of_the_host(tmp_path, kind, scheme):
    model = packed_model(tmp_path, kind, scheme=scheme)

    def watched(step):
        with NoWaiting():
            return Rerun()(step)

    graphs.use_graphs(model, watched)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: pytest.fail(str(args[0])))
        model.generate(prompt("cpu"), **OPTIONS)


def _halve(model):
    norm = model.model.norm
    norm.weight.data = norm.weight / 2


def _flip(linear):
    linear.weight_packed = linear.weight_packed ^ 0x11


class _Scaled(torch.nn.Module):
    def __init__(self, inner, scale):
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x):
        return self.scale * self.inner(x)


CHANGES = {
    "adapter": lambda m: setattr(m.model.layers[0], "mlp", _Scaled(m.model.layers[0].mlp, 2)),
    "setting of an adapter": lambda m: setattr(m.model.layers[1].mlp, "scale", 3),
    "hook": lambda m: m.model.norm.register_forward_hook(lambda module, args, out: 2 * out),
    "data": _halve,
    "buffer": lambda m: _flip(m.model.layers[0].self_attn.o_proj),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_of_a_model_that_has_changed_is_captured_again(tmp_path, change):
    model, record = packed_model(tmp_path), Rerun()
    model.model.layers[1].mlp = _Scaled(model.model.layers[1].mlp, 1)
    graphs.use_graphs(model, record)
    ids = prompt("cpu")
    before = model.generate(ids, **OPTIONS)
    again = model.generate(ids, **OPTIONS)
    assert torch.equal(before, again) and record.recorded == 1
    CHANGES[change](model)
    model.generate(ids, **OPTIONS)
    assert record.recorded == 2
