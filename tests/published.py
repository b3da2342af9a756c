"""Tiny checkpoints as they are published: tensors, names, dtypes and files of what people download.

Each maker writes one folder, always the same bytes, and says what its weights stand for: `plain`
has every weight under the name that it would have unquantized, quantized ones as float32 of exactly
code times scale, the others as they are stored. So a reader can be compared tensor by tensor.

Sizes are awkward where the layout allows it: rows and columns end within a block of 128, groups
are several, experts are more than a token uses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import add_tokenizer
from torch import Tensor

if not (Path(__file__).parents[1] / "benchmarks").is_dir():
    pytest.skip("installed without its benchmarks", allow_module_level=True)

from benchmarks.tools.tiny_models import save_model, small_config, small_seeing_config

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK = 128


@dataclass(frozen=True)
class Published:
    """A folder, and what its weights stand for.

    plain    weight -> its value, by the name that it has unquantized
    encoded  weight -> the tensors in the files that hold it, where it is quantized
    extra    tensors that the causal language model of transformers does not take
    """

    folder: Path
    plain: dict[str, Tensor]
    encoded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    extra: tuple[str, ...] = ()

    @property
    def stored(self) -> dict[str, Tensor]:
        """All tensors of all weight files, as they are."""
        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            found |= load_file(path)
        return found


def _base(folder: Path, config: Any, image_text: bool = False) -> dict[str, Tensor]:
    """A plain model's tensors by their published names; its folder keeps all but the weights."""
    save_model(folder, config, image_text)
    add_tokenizer(folder)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    return tensors


def _write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    quantization: dict[str, Any] | None = None,
    shards: int = 1,
    **config: Any,
) -> None:
    """Weight files (with an index, if there are several), and what is new in config.json."""
    names, total = sorted(tensors), sum(t.nbytes for t in tensors.values())
    files = {}
    for number in range(shards):
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        file = "model.safetensors" if shards == 1 else file
        chosen = {name: tensors[name].contiguous() for name in mine}
        save_file(chosen, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(mine, file)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        _dump(folder / "model.safetensors.index.json", index)
    told = json.loads((folder / "config.json").read_text("utf-8")) | config
    if quantization is not None:
        told["quantization_config"] = quantization
    _dump(folder / "config.json", told)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


def _is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether it is the weight of a linear in a decoder block, and not of a router."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    block = ".layers." in name and tensor.dim() == 2 and name.endswith(".weight")
    return block and leaf not in ("gate", "router", "eh_proj", "embed_tokens", "head")


Encode = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def _encode(
    tensors: Mapping[str, Tensor], chosen: Callable[[str, Tensor], bool], encode: Encode
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Encode the chosen weights; returns what is stored, what it stands for, and `encoded`.

    `encode` gives the tensors that hold a weight, by what takes the place of "weight" in its name,
    and its value.
    """
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    encoded: dict[str, tuple[str, ...]] = {}
    for name, tensor in tensors.items():
        if not chosen(name, tensor):
            stored[name] = plain[name] = tensor
            continue
        parts, plain[name] = encode(tensor.float())
        prefix = name.removesuffix("weight")
        stored |= {prefix + leaf: part for leaf, part in parts.items()}
        encoded[name] = tuple(prefix + leaf for leaf in parts)
    return stored, plain, encoded


# FP8


def _blocks(scale: Tensor, shape: torch.Size) -> Tensor:
    """The scale [rows / 128, columns / 128] of each weight, blocks at the ends cut off."""
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return wide[: shape[0], : shape[1]]


def fp8_blocks(
    weight: Tensor, dtype: torch.dtype = torch.float32, powers: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """float8_e4m3fn codes, `weight_scale_inv` per 128 x 128; powers of two for scale_fmt ue8m0."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scale = padded.reshape(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)) / 448
    if powers:
        scale = torch.exp2(scale.log2().ceil())
    scale = scale.to(dtype)
    each = _blocks(scale.float(), weight.shape)
    codes = (weight / each).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * each


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
FP8 |= {"activation_scheme": "dynamic"}


def deepseek_v3(folder: Path, scale_fmt: str | None = None) -> Published:
    """DeepSeek-V3: FP8 blocks, experts one by one, an MTP layer after the last; two files.

    With `scale_fmt="ue8m0"` as DeepSeek-V3.1: scales are powers of two, and still float32.
    """
    sizes = {"hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 160}
    config = small_config("deepseek_v3", **sizes, first_k_dense_replace=1, kv_lora_rank=64)
    tensors = _base(folder, config)
    last = config.num_hidden_layers
    extra = _nextn(tensors, last, 192)
    encode = lambda weight: fp8_blocks(weight, powers=scale_fmt == "ue8m0")  # noqa: E731
    stored, plain, encoded = _encode({**tensors, **extra}, _is_matrix, encode)
    quantization = FP8 | ({} if scale_fmt is None else {"scale_fmt": scale_fmt})
    _write(folder, stored, quantization, shards=2, num_nextn_predict_layers=1)
    beyond = tuple(name for name in stored if f".layers.{last}." in name)
    return Published(folder, plain, encoded, beyond)


def _nextn(tensors: Mapping[str, Tensor], last: int, hidden: int) -> dict[str, Tensor]:
    """The layer that predicts the token after the next: one more, with ends of its own."""
    generator = torch.Generator().manual_seed(1)

    def like(tensor: Tensor) -> Tensor:
        return (torch.randn(tensor.shape, generator=generator) * 0.05).to(tensor.dtype)

    of, to = f"model.layers.{last - 1}.", f"model.layers.{last}."
    extra = {n.replace(of, to): like(t) for n, t in tensors.items() if n.startswith(of)}
    norm = tensors["model.norm.weight"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        extra[f"{to}{name}.weight"] = like(norm) + 1
    extra[f"{to}eh_proj.weight"] = like(norm.new_empty(hidden, 2 * hidden))
    extra[f"{to}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    extra[f"{to}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return extra


def qwen3_fp8(folder: Path) -> Published:
    """Qwen3-8B-FP8: dense, scales in bfloat16, what is not converted named module by module."""
    config = small_config("qwen3", hidden_size=128, intermediate_size=320)
    tensors = _base(folder, config)
    encode = lambda weight: fp8_blocks(weight, torch.bfloat16)  # noqa: E731
    stored, plain, encoded = _encode(tensors, _is_matrix, encode)
    plain_modules = [n.removesuffix(".weight") for n in tensors if n not in encoded]
    _write(folder, stored, FP8 | {"modules_to_not_convert": sorted(plain_modules)})
    return Published(folder, plain, encoded)


# MXFP4


def gpt_oss(folder: Path) -> Published:
    """gpt-oss: experts in MXFP4, whose rows are gate and up in turn; two files.

    `plain` has the experts as transformers holds them, transposed: [experts, in, out].
    """
    config = small_config("gpt_oss", hidden_size=64, intermediate_size=96, num_local_experts=4)
    tensors = _base(folder, config)
    generator = torch.Generator().manual_seed(2)
    stored, plain, encoded = {}, {}, {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = plain[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        encoded[name] = (f"{name}_blocks", f"{name}_scales")
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
        values = E2M1[codes] * torch.exp2(scales.float() - 127)[..., None]
        plain[name] = values.flatten(-2).transpose(1, 2).contiguous()
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": [*kept, "lm_head"]}
    _write(folder, stored, quantization, shards=2)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    return Published(folder, plain, encoded)


# models that see


def _companions(folder: Path, processor: str, image: str) -> None:
    """What stands beside the weights of a model that sees."""
    pictures = {"image_processor_type": image, "do_resize": False, "size": {"height": 56}}
    pictures |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    _dump(folder / "preprocessor_config.json", {**pictures, "processor_class": processor})
    _dump(folder / "processor_config.json", {"processor_class": processor})
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    (folder / "LICENSE").write_text("as published\n", "utf-8")


def qwen3_5(folder: Path) -> Published:
    """Qwen3.5: `model.language_model`, `model.visual`, and an MTP block, `mtp`; two files.

    AutoModelForCausalLM takes the first, AutoModelForImageTextToText the first two.
    """
    config = small_seeing_config("qwen3_5")
    tensors = _base(folder, config, image_text=True)
    generator = torch.Generator().manual_seed(3)
    layers = config.text_config.layer_types
    of = f"model.language_model.layers.{layers.index('full_attention')}."
    width = config.text_config.hidden_size
    extra = {
        n.replace(of, "mtp.layers.0."): (torch.randn(t.shape, generator=generator) / 20).to(t.dtype)
        for n, t in tensors.items()
        if n.startswith(of)
    }
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        extra[f"mtp.{name}.weight"] = torch.randn(width, generator=generator).bfloat16()
    extra["mtp.fc.weight"] = torch.randn(width, 2 * width, generator=generator).bfloat16()
    tensors |= extra
    _write(folder, tensors, shards=2)
    told = json.loads((folder / "config.json").read_text("utf-8"))
    told["text_config"]["mtp_num_hidden_layers"] = 1
    _dump(folder / "config.json", told)
    _companions(folder, "Qwen3VLProcessor", "Qwen2VLImageProcessorFast")
    _dump(folder / "video_preprocessor_config.json", {"fps": 2, "patch_size": 14})
    seen = tuple(name for name in tensors if name.startswith(("model.visual.", "mtp.")))
    return Published(folder, dict(tensors), extra=seen)


def gemma3(folder: Path) -> Published:
    """Gemma 3: `language_model.model`, `vision_tower.vision_model`, `multi_modal_projector`."""
    tensors = _base(folder, small_seeing_config("gemma3"), image_text=True)
    tower = "vision_tower."
    tensors = {
        name.replace(tower, f"{tower}vision_model.", 1) if name.startswith(tower) else name: tensor
        for name, tensor in tensors.items()
    }
    _write(folder, tensors, shards=2)
    _companions(folder, "Gemma3Processor", "Gemma3ImageProcessor")
    return Published(folder, dict(tensors))


def seeing(folder: Path, kind: str) -> Published:
    """Another of benchmarks.tools.tiny_models.SEEING, by the names that transformers saves."""
    tensors = _base(folder, small_seeing_config(kind), image_text=True)
    _write(folder, tensors)
    _companions(folder, "LlavaProcessor", "CLIPImageProcessor")
    return Published(folder, dict(tensors))


# compressed-tensors


# AWQ and GPTQ
