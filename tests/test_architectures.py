"""Models beyond the usual ones go through the default command, are loaded and run."""

from pathlib import Path

import pytest
import torch
from tiny import SMALL, VOCAB, write_ids
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import mixbits
from mixbits.arrange import Arrangement
from mixbits.export.__main__ import main as export_main
from mixbits.fake import fake_input
from mixbits.linear import MixedLinear, PackedLinear
from mixbits.model import find_linears
from mixbits.probing import probed
from mixbits.quantize import main

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
}
KINDS = {
    "bloom": {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4},  # ALiBi
    "cohere2": SIZES,
    "deepseek_v3": SIZES | MOE | LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "falcon": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "gemma2": SIZES | {"head_dim": 16},
    "gemma3": {  # sees: its tower has as many layers as the decoder
        "text_config": SIZES | {"head_dim": 16},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    },
    "glm4": SIZES | {"head_dim": 16},  # gate and up in one linear
    "gpt2": GPT2_SIZES,  # weights are stored as [K, N]
    "gpt_bigcode": GPT2_SIZES,  # its initialisation looks at its linears' weights
    "gpt_neox": SIZES,
    "gpt_oss": SIZES | {"head_dim": 16, "num_local_experts": 4},  # experts with biases
    "nanochat": SIZES,
    "olmo2": SIZES,
    "opt": SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": SIZES,
    "phi3": SIZES,  # q, k and v in one linear
    "qwen3_next": SIZES
    | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
    | {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
STATE_SPACE = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}


def make(folder: Path, kind: str, sizes: dict[str, object]) -> torch.nn.Module:
    config = AutoConfig.for_model(kind, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(folder)
    return model


def packed_names(model: torch.nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, PackedLinear | MixedLinear)]


def twin_logits(model: torch.nn.Module, packed: torch.nn.Module, ids: Tensor) -> Tensor:
    """The original model's, with what packed linears stand for, by torch's own product."""

    def probe(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        one = packed.get_submodule(name)
        if not isinstance(one, PackedLinear):
            return torch.nn.functional.linear(x, weight, bias)
        rounded = fake_input(x, one.scheme, Arrangement()).to(x.dtype)
        return torch.nn.functional.linear(rounded, one.weight.to(x.dtype), bias)

    with probed(model, find_linears(model), probe):
        return model(ids).logits.float()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_is_quantized_loaded_and_runs(kind: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", kind, KINDS[kind])
    dataset = str(write_ids(tmp_path / "ids.npy"))
    out = tmp_path / "out"
    budget = ["--avg-bits", "6", "--rounding", "gptq", "--out", str(out)]
    assert main([str(tmp_path / "model"), "--dataset", dataset, *SMALL, *budget]) == 0

    packed = mixbits.load(out)
    assert len(packed_names(packed)) >= 8
    ids = torch.arange(24).reshape(2, 12) * 5 % VOCAB
    logits = packed(ids).logits.float()
    hub = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(hub(ids).logits.float(), logits)
    # A weight that is wrong in one linear moves the logits by 0.0067 of their norm, or more.
    expected = twin_logits(model, packed, ids)
    assert (logits - expected).norm() <= 2.0**-8 * expected.norm()
    generated = packed.generate(ids[:1], max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert generated.shape == (1, 15)


def test_weights_stored_the_other_way_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`Conv1D` weights are rounded along their inputs, in packed and in fake models alike."""
    make(tmp_path / "model", "gpt2", GPT2_SIZES)
    command = [str(tmp_path / "model"), "--dataset", str(write_ids(tmp_path / "ids.npy")), *SMALL]
    rounding = ["--rounding", "rtn", "--schemes", "W4A16,W8A16", "--avg-bits", "6"]
    for name, more in (("packed", []), ("fake", ["--fake"])):
        assert main([*command, *rounding, "--out", str(tmp_path / name), *more]) == 0
    fake = AutoModelForCausalLM.from_pretrained(tmp_path / "fake")
    packed = mixbits.load(tmp_path / "packed")
    for name in packed_names(packed):
        weight = packed.get_submodule(name).weight
        assert torch.equal(fake.get_submodule(name).weight, weight.T.bfloat16())

    capsys.readouterr()
    export = [str(tmp_path / "packed"), "--format", "compressed-tensors", "--out"]
    assert export_main([*export, str(tmp_path / "exported")]) == 2
    assert main([*command, *rounding, "--target", "vllm"]) == 2
    assert capsys.readouterr().err.count("got Conv1D (transformer.h.0.attn.c_attn)") == 2


def test_ignored_linears_stay_as_they_are(tmp_path: Path) -> None:
    """Mamba multiplies with the weight of dt_proj itself, in most versions of transformers."""
    make(tmp_path / "model", "mamba", STATE_SPACE)
    command = [str(tmp_path / "model"), "--dataset", str(write_ids(tmp_path / "ids.npy")), *SMALL]
    assert main([*command, "--ignore", "*.dt_proj", "--out", str(tmp_path / "out")]) == 0
    packed = packed_names(mixbits.load(tmp_path / "out"))
    assert packed and not any(name.endswith("dt_proj") for name in packed)


@pytest.mark.parametrize(
    ("pattern", "complaint"), [("*", "must leave a linear"), ("nothing", "matches no unit")]
)
def test_what_cannot_be_ignored(
    pattern: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "model", "phi3", KINDS["phi3"])
    assert main([str(tmp_path / "model"), "--dry-run", *SMALL, "--ignore", pattern]) == 2
    assert complaint in capsys.readouterr().err
