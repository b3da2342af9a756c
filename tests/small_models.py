"""Small models of many kinds, with weights large enough for rounding to show."""

import torch
from tiny import VOCAB
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mixbits.model.layout import (
    find_linears,
    meta_model,
    survey,
)

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
DEEPSEEK = SIZES | LATENT | {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
DEEPSEEK |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
GEMMA3N = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16}
GEMMA3N |= {"num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]}
GEMMA3N |= {"layer_types": ["sliding_attention", "full_attention"]}
JETMOE = {k: v for k, v in SIZES.items() if k not in ("num_attention_heads", "head_dim")}
JETMOE |= {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "aria_text": SIZES | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "bitnet": SIZES,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": DEEPSEEK | {"index_n_heads": 4, "index_head_dim": 32, "index_topk": 4},
    "falcon": {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")},
    "gemma3n_text": SIZES | GEMMA3N,
    "gpt2": {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_oss": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": SIZES | {"num_experts": 4, "moe_topk": 2},
    "jetmoe": JETMOE,
    "llama": SIZES,
    "llama4_text": SIZES
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
    "mamba": {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16},
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {k: v for k, v in SIZES.items() if "num_key" not in k and k != "head_dim"}
    | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen3_moe": SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def shapes(kind: str) -> nn.Module:
    return meta_model(AutoConfig.for_model(kind, **KINDS[kind]))


def small(kind: str, seed: int = 0, **more: object) -> nn.Module:
    """A model of random weights, large enough for rounding to show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **KINDS[kind], **more)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.06)
                elif "bias" in name or "norm" in name:
                    parameter.uniform_(0.3, 1.7)
    return model


def left(model: nn.Module) -> dict[str, str]:
    """What is left alone in the first and second block, and why."""
    return {one.name.split(".", 2)[2]: one.why for one in survey(model).left}


IDS = torch.arange(24).reshape(2, 12) * 5 % VOCAB


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def llama() -> nn.Module:
    return small("llama")


def names(model: nn.Module) -> set[str]:
    return {i.name for i in find_linears(model)}
