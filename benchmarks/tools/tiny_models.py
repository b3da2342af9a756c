"""Tiny models of any kind that transformers has, from its own default configuration, shrunk.

A configuration's numbers are replaced by their names (`RULES`), in its parts too: decoder, towers,
projectors. What the names do not tell stands in `OVERRIDES`, kind by kind. Widths are multiples of
32, so that groups of 32 fit; layers are few; all kinds of layers and experts occur.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

VOCAB = 160
_WIDTH = 64
# name of a number in a configuration -> what it becomes
RULES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "n_vocab", "num_embeddings"), VOCAB),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "n_embed", "embedding_size"),
        _WIDTH,
    ),
    **dict.fromkeys(("word_embed_proj_dim", "out_hidden_size", "projection_dim"), _WIDTH),
    **dict.fromkeys(("text_embed_dim", "output_dim", "lm_hidden_size", "proj_hidden"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "dff", "mlp_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(
        ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim", "d_kv"), 16),
    **dict.fromkeys(("attention_head_dim", "global_head_dim", "swa_head_dim"), 16),
    "qk_rope_head_dim": 16,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions", "context_length"), 64),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("image_size",), 28),
    **dict.fromkeys(("patch_size",), 14),
}
# Numbers that a default configuration may leave open, though a tiny model needs them.
_OPEN = ("head_dim", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
_OPEN = (*_OPEN, "n_group", "topk_group")
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {**_PLAIN_ROPE, "mrope_section": [2, 3, 3]}
_HALF_MROPE = _MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_d_head": 16}
_KDA = {"linear_head_dim": 16, "linear_num_heads": 4}
_LLAMA4 = {
    "num_hidden_layers": 2,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 96,
    "moe_layers": None,
    "no_rope_layers": [1, 0],
    "layer_types": ["chunked_attention", "full_attention"],
    "attention_chunk_size": 16,
}
_GEMMA4 = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB}
_GEMMA4 |= {"global_head_dim": 16}
_INDEXER = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 8}
_DOTS3 = _INDEXER | {"shared_experts_intermediate_size": 32, "sliding_window": 8, "head_dim": 32}
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
_QWEN4 |= {"indexer_budget": 16, "indexer_compress_ratio": 4, "hc_lowrank": 32}
_FOUR = {"num_key_value_heads": 4}
# kind -> what else its configuration says, parts as dicts in a dict
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 2, "topk_group": 1, **_KDA},
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _MROPE}}},
    "cosmos3_edge": {"text_config": {"rope_parameters": _MROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": _FOUR,
    "dots3_note_text": _DOTS3,
    "dots3_note": {"text_config": _DOTS3},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    },
    "emu3": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCAB,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 32,
        "sliding_window": 8,
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "glm4v": {"text_config": {"rope_parameters": _MROPE}},
    "glm46v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": _HALF_MROPE}},
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE}},
    "glmga": {"text_config": {"rope_parameters": _MROPE}},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **_MAMBA},
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {**_PLAIN_ROPE, "xdrope_section": [2] * 4},
        }
    },
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "janus": {"vq_config": {"base_channels": 32}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 32},
    "kimi_linear": _KDA,
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "num_layers": 2,
    },
    "mamba2": {"num_heads": 8},
    "mistral4": _FOUR,
    "mistral_large4": {"text_config": _INDEXER},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "phi4_multimodal": {"audio_config": {"num_blocks": 2}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _MROPE}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32]},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xlm": {"emb_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 32,
        "num_key_value_heads": 4,
    },
}


def _token_ids(config: Any, taken: list[int]) -> dict[str, Any]:
    """Special tokens within the vocabulary: those of text first, the others from the end."""
    ids: dict[str, Any] = {}
    for key, value in vars(config).items():
        if not key.endswith(("_token_id", "_token_index", "_token_ids")) or value is None:
            continue
        if key == "pad_token_id":
            ids[key] = 2
        elif key in ("bos_token_id", "eos_token_id"):
            ids[key] = 0 if key == "bos_token_id" else 1
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            taken.append(VOCAB - 1 - len(taken))
            ids[key] = taken[-1]
    return ids


def shrink(config: Any, taken: list[int] | None = None) -> dict[str, Any]:
    """Arguments that make a small one of `config`'s class, from a default instance of it."""
    from transformers import PreTrainedConfig

    taken = [] if taken is None else taken
    small: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            small[key] = shrink(value, taken)
            if value.model_type:
                small[key]["model_type"] = value.model_type
        elif key in RULES and isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(RULES[key], value)
        elif key in _OPEN and value is None:
            small[key] = RULES[key]
        elif key == "is_decoder":
            small[key] = True
        elif isinstance(value, dict) and value.get("mrope_section"):
            small[key] = value | {"mrope_section": _MROPE["mrope_section"]}
    if "kv_lora_rank" in small:  # latent attention has as many keys as queries
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small | _layers(config) | _token_ids(config, taken)


def _layers(config: Any) -> dict[str, Any]:
    """One layer of each kind, where a configuration lists the kinds of its layers; two at least."""
    count = getattr(config, "num_hidden_layers", None)
    lists = {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, list)
        and isinstance(count, int)
        and len(value) == count > 2
        and len(set(map(str, value))) < 5  # kinds, and not the numbers of layers
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    chosen = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    chosen = chosen if len(chosen) > 1 else [0, 1]
    layers = {key: [value[i] for i in chosen] for key, value in lists.items()}
    return {"num_hidden_layers": len(chosen), **layers}


def _merge(into: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
    return into


def small_config(kind: str, **overrides: Any) -> Any:
    """The shrunk configuration of `kind`, a model type of transformers."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(kind)
    sizes = _merge(shrink(default), deepcopy(OVERRIDES.get(kind, {})))
    return type(default)(**_merge(sizes, overrides))


def auto_class(image_text: bool) -> Any:
    """The class that opens a model that sees, or one of text."""
    import transformers

    name = "AutoModelForImageTextToText" if image_text else "AutoModelForCausalLM"
    return getattr(transformers, name)


def save_model(folder: Path, config: Any, image_text: bool = False, seed: int = 0) -> Path:
    """Save a bfloat16 model of `config` with random weights; the same arguments, the same bytes.

    Matrices are larger than at usual initialisation, so that logits are far from uniform; vectors
    (norms, biases, decay rates) are moved a little, so that one that is lost or exchanged shows.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto_class(image_text).from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        # As it is loaded: what transformers keeps in float32 gets values that bfloat16 has not.
        model = auto_class(image_text).from_pretrained(folder, dtype=torch.bfloat16)
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                if not tensor.is_floating_point():
                    continue
                if tensor.dim() > 1:
                    tensor.copy_(torch.randn(tensor.shape) * 0.06)
                elif "running" not in name:  # statistics of batch norms: a variance is positive
                    tensor.add_(torch.randn(tensor.shape).to(tensor.dtype) * 0.05)
    model.save_pretrained(folder)
    return folder


def text_ids(count: int = 12, batch: int = 2) -> torch.Tensor:
    """int64 [batch, count]: ordinary tokens, none of them special."""
    return torch.arange(batch * count).reshape(batch, count) * 7 % 97 + 3


# kinds whose pictures `picture_inputs` can make
SEEING = ("qwen3_5", "qwen2_5_vl", "gemma3", "llava", "mistral3")


def small_seeing_config(kind: str, **overrides: Any) -> Any:
    """The shrunk configuration of one of SEEING, with a tower that takes a picture of 56 x 56."""
    towers: dict[str, dict[str, Any]] = {
        "qwen3_5": {"vision_config": {"num_position_embeddings": 16, "num_heads": 2}},
        "qwen2_5_vl": {"vision_config": {"fullatt_block_indexes": [1], "window_size": 28}},
        "gemma3": {
            "mm_tokens_per_image": 4,
            "vision_config": {"image_size": 56, "vision_use_head": False},
        },
        "llava": {"vision_config": {"image_size": 56}},
        "mistral3": {"vision_config": {"image_size": 56, "head_dim": 16}},
    }
    return small_config(kind, **_merge(towers[kind], overrides))


def picture_inputs(config: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the processor of a tiny model of SEEING would make of a picture between words.

    `input_ids` [1, tokens] with a place for every feature of the picture, `attention_mask`,
    float32 `pixel_values`, and what else the class asks for.
    """
    kind, side = config.model_type, 56
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 3, side, side, generator=generator)
    vision = config.vision_config
    patches = side // vision.patch_size
    inputs: dict[str, torch.Tensor] = {"pixel_values": pixels}
    if kind in ("qwen3_5", "qwen2_5_vl"):
        each = 3 * vision.temporal_patch_size * vision.patch_size**2
        inputs["pixel_values"] = torch.randn(patches**2, each, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, patches, patches]])
        features = (patches // vision.spatial_merge_size) ** 2
    elif kind == "gemma3":
        features = config.mm_tokens_per_image
    elif kind == "mistral3":
        inputs["image_sizes"] = torch.tensor([[side, side]])
        features = (patches // config.spatial_merge_size) ** 2
    else:
        features = patches**2
    image = getattr(config, "image_token_id", None) or config.image_token_index
    words = text_ids(6, 1)[0]
    before = [config.vision_start_token_id] if kind in ("qwen3_5", "qwen2_5_vl") else []
    after = [config.vision_end_token_id] if before else []
    ids = torch.tensor([*words[:3].tolist(), *before, *[image] * features, *after, *words[3:]])
    inputs["input_ids"] = ids[None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    kinds = (inputs["input_ids"] == image).int()
    if kind == "gemma3":
        inputs["token_type_ids"] = kinds
    if kind in ("qwen3_5", "qwen2_5_vl"):
        inputs["mm_token_type_ids"] = kinds
    return inputs
