"""Attention of one new token on a CPU, without repeating keys for the query heads that share them.

transformers hands a grouped-query step to torch as 32 heads of one query; torch's CPU kernel then
reads keys and values once per query head. The heads of a group are as well several queries of one
key head: with one new token and no mask nothing else tells them apart, and the result is the same
attention, for which keys and values are read once.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "mixbits_sdpa"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, heads, T, D], key and value [B, key heads, L, D] -> ([B, T, heads, D], None).

    Equals transformers' `sdpa` attention, to which it leaves whatever is not one plain new token.
    """
    batch, heads, tokens, width = query.shape
    plain = tokens == 1 and attention_mask is None and kwargs.get("position_bias") is None
    plain = plain and not kwargs.get("dropout")
    if not plain or kwargs.get("cache") is not None or query.device.type != "cpu":
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    y = torch.nn.functional.scaled_dot_product_attention(rows, key, value, scale=scaling)
    return y.reshape(batch, 1, heads, y.shape[-1]), None


@functools.cache
def _asks_for_sdpa(code: str) -> bool:
    """Whether a Python module does something else where the implementation is called "sdpa".

    Sparse attention masks what its indexer leaves out only then. A module that cannot be read may.
    """
    try:
        source = inspect.getsource(sys.modules[code])
    except (OSError, TypeError, KeyError):
        return True
    return re.search(r"_attn_implementation\b[^\n]*[\"']sdpa[\"']", source) is not None


def use_grouped_attention(model: Any) -> None:
    """Let a model that uses `sdpa` use this instead.

    One that does not is left alone, and one whose code asks for that name.
    """
    codes = {type(module).__module__ for module in model.modules()}
    foreign = [code for code in codes if code.partition(".")[0] not in ("torch", "mixbits")]
    is_sdpa = getattr(model.config, "_attn_implementation", None) == "sdpa"
    if is_sdpa and not any(map(_asks_for_sdpa, foreign)):
        AttentionInterface.register(NAME, grouped_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
