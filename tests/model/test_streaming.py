"""Streaming is an order of work, not another model: same logits, same gradients, less memory."""

from __future__ import annotations

import pytest
import torch
from tiny import KINDS, VOCAB, make_model

from mixbits.formats.schemes import parse_scheme
from mixbits.measuring.sensitivity import measure
from mixbits.model import streaming
from mixbits.model.layout import find_linears, weight_of
from mixbits.model.probing import probed
from mixbits.model.streaming import StreamedModel, gradient_dtype, patched, resident
from mixbits.source.source import open_source


def _model(folder, kind="llama"):
    make_model(folder, kind)
    return open_source(str(folder)).load()


def _ids(vocab: int, rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0))


def _loss(logits, ids):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_logits_are_those_of_the_whole_model(tmp_path, kind):
    model = _model(tmp_path, kind)
    ids = _ids(model.config.get_text_config().vocab_size)
    streamed = StreamedModel(model).logits(ids)
    assert next(model.parameters()).dtype == torch.bfloat16  # left as it was
    with torch.no_grad():
        whole = model.float()(input_ids=ids, use_cache=False).logits
    assert streamed.dtype == torch.float32
    # Same operations in the same order; only experts may be summed by another implementation.
    torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_gradients_are_those_of_the_whole_model(tmp_path, kind):
    model = _model(tmp_path, kind)
    ids = _ids(model.config.get_text_config().vocab_size)
    linears = find_linears(model, include_head=True)
    seen: dict[str, torch.Tensor] = {}

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, name):
            ctx.save_for_backward(x, weight)
            ctx.name = name
            return torch.nn.functional.linear(x, weight, bias)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            seen[ctx.name] = grad.flatten(0, -2).T @ x.flatten(0, -2)
            return grad @ weight, None, None, None

    def probe(name, x, weight, bias):
        if not torch.is_grad_enabled():
            return torch.nn.functional.linear(x, weight, bias)
        return Keep.apply(x, weight, bias, name)

    steps = []
    with probed(model, linears, probe):
        loss = StreamedModel(model).forward_backward(ids, _loss, lambda: steps.append(1))
    assert len(steps) == 2 * model.config.get_text_config().num_hidden_layers

    model = model.float().requires_grad_(True)
    whole = _loss(model(input_ids=ids, use_cache=False).logits, ids)
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    head_is_tied = model.config.tie_word_embeddings
    for info in linears:
        if info.name not in seen:
            assert info.is_expert  # no token reached it
            continue
        if info.block is None and head_is_tied:
            continue  # its gradient holds the embedding's too
        parameter = weight_of(model, info)
        expected = parameter.grad if parameter.is_leaf else _slice_grad(model, info)
        torch.testing.assert_close(seen[info.name], expected, rtol=1e-3, atol=1e-6)


def _slice_grad(model, info):
    """Gradient of one expert's slice: the same view of the 3-D parameters' gradients."""
    from types import SimpleNamespace

    from mixbits.model.experts import expert_slice
    from mixbits.model.layout import split_expert_name

    module, expert, projection = split_expert_name(info.name)
    experts = model.get_submodule(module)
    grads = SimpleNamespace(
        gate_up_proj=experts.gate_up_proj.grad, down_proj=experts.down_proj.grad
    )
    return expert_slice(grads, expert, projection)


def test_attention_that_repeats_gives_the_same_scores(tmp_path, monkeypatch):
    """What a GPU is asked to use, tried on the CPU: the same sums in another order."""
    model, before = _model(tmp_path), streaming._repeatable_attention
    ids, losses = _ids(130), []
    for device in ("cpu", "cuda"):
        as_on = torch.device(device)
        monkeypatch.setattr(
            streaming, "_repeatable_attention", lambda _, as_on=as_on: before(as_on)
        )
        seen = []
        hook = model.model.layers[0].self_attn.q_proj.register_full_backward_hook(
            lambda module, inputs, outputs, seen=seen: seen.append(outputs[0])
        )
        StreamedModel(model).forward_backward(ids, _loss, lambda: None)
        hook.remove()
        losses.append(seen[0])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


def test_resident_and_patched_undo_themselves_on_errors():
    linear = torch.nn.Linear(4, 4).bfloat16()
    before = linear.weight.data_ptr()
    with (
        pytest.raises(RuntimeError, match="boom"),
        patched(linear, lambda x: x),
        resident(linear, torch.float32, torch.device("cpu")),
    ):
        assert linear.weight.dtype == torch.float32
        assert linear(3) == 3
        raise RuntimeError("boom")
    assert linear.weight.dtype == torch.bfloat16 and linear.weight.data_ptr() == before
    assert linear(torch.ones(1, 4, dtype=torch.bfloat16)).shape == (1, 4)


def test_patches_nest():
    linear = torch.nn.Linear(4, 4)
    with patched(linear, lambda x: 1):
        with patched(linear, lambda x: 2):
            assert linear(0) == 2
        assert linear(0) == 1
    assert "forward" not in vars(linear)


def test_one_backward_pass_over_all_blocks_where_no_weight_is_copied(tmp_path, monkeypatch):
    """The same moments as block by block, up to what bfloat16 gradients round."""
    model = _model(tmp_path)
    linears = find_linears(model)
    schemes = [parse_scheme("MXFP4"), parse_scheme("MXFP8")]
    ids = _ids(VOCAB, rows=6)
    assert StreamedModel(model).tokens_at_once() == 0  # in float32 they are copied
    streamed = StreamedModel(model, torch.bfloat16)
    calls = []
    monkeypatch.setattr(
        StreamedModel, "_whole_backward", _counted(calls, StreamedModel._whole_backward)
    )
    whole = measure(streamed, linears, schemes, ids)
    assert len(calls) == 1
    monkeypatch.setattr(streaming, "GRAPH_BYTES", 0)
    blockwise = measure(streamed, linears, schemes, ids)
    assert len(calls) == 1
    assert whole == blockwise


def _counted(calls, function):
    def run(*args):
        calls.append(args)
        return function(*args)

    return run


def test_gradients_are_taken_in_what_the_cpu_is_fast_at(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        expected = torch.bfloat16 if native else torch.float32
        assert gradient_dtype(torch.bfloat16, "cpu") == expected
        assert gradient_dtype(torch.float16, "cpu") == torch.float32
        assert gradient_dtype(torch.bfloat16, "cuda") == torch.float32
