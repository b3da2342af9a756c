"""Models of real shapes with random weights, written as safetensors without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from mixbits.model.layout import meta_model

SHARD_BYTES = 1 << 30
# As in the models' config.json; layers are given by the caller, all else is theirs.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-100m": {
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "Qwen3-8B": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "Qwen3-32B": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}


def _values(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """bfloat16: matrices as at usual initialisation, vectors (norms, biases) around 1."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def write_model(folder: Path, shape: str, layers: int | None = None) -> Path:
    """Write `SHAPES[shape]`, with fewer layers if so asked, into `folder`; returns it."""
    settings = dict(SHAPES[shape])
    if layers is not None:
        settings["num_hidden_layers"] = layers
    config = AutoConfig.for_model(**settings, dtype="bfloat16")
    model = meta_model(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    skipped = {"lm_head.weight"} if settings["tie_word_embeddings"] else set()
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    written = 0
    for name, tensor in model.state_dict().items():
        if name in skipped:
            continue
        shard[name] = _values(tensor.shape, generator)
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            written = _write_shard(folder, shard, written)
    if shard:
        _write_shard(folder, shard, written)
    _write_index(folder)
    return folder


def _write_shard(folder: Path, shard: dict[str, torch.Tensor], written: int) -> int:
    save_file(shard, folder / f"model-{written + 1:05}.safetensors", metadata={"format": "pt"})
    shard.clear()
    return written + 1


def _write_index(folder: Path) -> None:
    """Name the shards, or rename the only one to what transformers looks for."""
    import json

    from safetensors import safe_open

    files = sorted(folder.glob("model-*.safetensors"))
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    places = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), path.name))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
