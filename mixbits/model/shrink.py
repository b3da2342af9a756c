"""A small model of the same class and configuration, with random weights: to try something on.

What depends on a configuration alone (which norms there are, where routers stand, what multiplies
what) is as in the large one; widths, experts, vocabulary and the number of blocks are small.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from ..errors import plain_errors
from .layout import CausalLM, model_class
from .twin import plain_numbers

WIDTH = 96  # of the residual stream: three blocks of 32
_HEADS = 4
# What a number of a configuration becomes, at most; heads keep their width.
_AT_MOST: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("vocab_size", "n_vocab"), 80),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "intermediate_size_mlp"), 160),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size"), 160),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), _HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "moe_num_primary_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
}
_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def small_config(config: Any, blocks: int) -> Any:
    """A copy of a configuration with small numbers in its text part, and its first `blocks`."""
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    text = small.get_text_config()
    count, heads = text.num_hidden_layers, getattr(text, "num_attention_heads", None)
    values = dict(vars(text))
    for name, value in values.items():
        if type(value) is int and name in _AT_MOST:
            setattr(text, name, min(value, _AT_MOST[name]))
        elif type(value) is int and name in _BLOCKS:
            setattr(text, name, min(value, blocks))
        elif name.endswith("_token_id"):
            setattr(text, name, None)
        elif isinstance(value, list) and len(value) == count:
            setattr(text, name, value[:blocks])
    shared = values.get("num_key_value_heads")
    if type(shared) is int:
        same = shared == heads
        text.num_key_value_heads = _HEADS if same else min(shared, _HEADS // 2)
    return small


def small_model(config: Any, blocks: int, trust_remote_code: bool = False) -> CausalLM:
    """float32, on the CPU, every parameter random: norms and biases too. Always the same one.

    Raises UsageError where the class makes none of such sizes.
    """
    small = small_config(config, blocks)
    kind = model_class(small)
    with (
        plain_errors(lambda why: f"no small {kind.__name__} could be made to try it on ({why})"),
        torch.random.fork_rng(devices=[]),
        plain_numbers(),
    ):
        torch.manual_seed(0)
        if hasattr(kind, "from_config"):
            model = kind.from_config(small, trust_remote_code=trust_remote_code)
        else:
            model = kind._from_config(small)
        model = model.float()
        for parameter in model.parameters():
            parameter.data = _random(parameter)
    return model.eval().requires_grad_(False)


def _random(parameter: nn.Parameter) -> torch.Tensor:
    values = torch.randn(parameter.shape)
    if parameter.dim() < 2:
        return 0.5 * values + 0.8
    return values / math.sqrt(parameter.shape[-1])
