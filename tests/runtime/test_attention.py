"""Grouped attention of one new token equals transformers' own."""

import pytest
import torch
from tiny import KINDS, make_model
from transformers import AutoModelForCausalLM

from mixbits.runtime import attention
from mixbits.runtime.attention import NAME, use_grouped_attention


def logits_of_steps(model, ids, mask):
    """Logits of the last of two single-token steps after a prompt."""
    with torch.no_grad():
        out = model(ids[:, :-2], attention_mask=mask[:, :-2], use_cache=True)
        for step in (-2, -1):
            out = model(
                ids[:, step:][:, :1],
                attention_mask=mask[:, : ids.shape[1] + step + 1],
                past_key_values=out.past_key_values,
            )
    return out.logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_equal_those_of_sdpa(tmp_path, kind, padded):
    folder = make_model(tmp_path / kind, kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :5] = not padded
    expected = logits_of_steps(model, ids, mask)
    use_grouped_attention(model)
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(logits_of_steps(model, ids, mask), expected, rtol=0, atol=1e-4)


def test_plain_steps_are_not_left_to_transformers(tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "llama")).eval()
    use_grouped_attention(model)
    tokens = []
    original = attention.sdpa_attention_forward

    def record(module, query, *args, **kwargs):
        tokens.append(query.shape[2])
        return original(module, query, *args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", record)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert tokens == [3] * model.config.num_hidden_layers  # the prompt only


def test_other_attention_is_left_alone(tmp_path):
    folder = make_model(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    use_grouped_attention(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["dots3_note_text", "deepseek_v32", "falcon"])
def test_code_that_asks_for_sdpa_keeps_it(kind):
    """Sparse attention of these is in the mask, which they make for "sdpa" and "eager" only."""
    tiny_models = pytest.importorskip("benchmarks.tools.tiny_models")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_models.small_config(kind)).float().eval()
    ids = torch.randint(0, 90, (2, 24))
    with torch.no_grad():
        before = model(ids).logits
        use_grouped_attention(model)
        after = model(ids).logits
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(after, before)
