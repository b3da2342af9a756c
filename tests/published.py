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

# name -> its format, a preset of the library, and what differs from it
COMPRESSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "W4A16": ("pack-quantized", "W4A16", {}),
    "W4A16G32": ("pack-quantized", "W4A16", {"group_size": 32}),  # Kimi-K2-Thinking
    "W4A16-asym": ("pack-quantized", "W4A16_ASYM", {}),
    "W8A16": ("pack-quantized", "W8A16", {}),
    "W8A8": ("int-quantized", "W8A8", {}),
    "FP8": ("float-quantized", "FP8", {}),  # one scale per tensor
    "FP8-dynamic": ("float-quantized", "FP8_DYNAMIC", {}),  # one per row
    "FP8-block": ("float-quantized", "FP8_BLOCK", {}),
    "NVFP4A16": ("nvfp4-pack-quantized", "NVFP4A16", {}),
    "MXFP4A16": ("mxfp4-pack-quantized", "MXFP4A16", {}),
    "MXFP8A16": ("mxfp8-quantized", "MXFP8A16", {}),
}


def _scheme(name: str) -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    _, preset, changes = COMPRESSED[name]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if changes:
        weights = scheme.weights.model_copy(update=changes)
        scheme = scheme.model_copy(update={"weights": weights})
    return scheme


def _ranges(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Least and largest weight of everything that shares a scale."""
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "block":
        rows, columns = args.block_structure
        tall, wide = (-(-s // b) for s, b in zip(weight.shape, (rows, columns), strict=True))
        padded = torch.zeros(tall * rows, wide * columns)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        each = padded.reshape(tall, rows, wide, columns)
        return each.amin((1, 3)), each.amax((1, 3))
    groups = weight.reshape(weight.shape[0], -1, args.group_size)
    return groups.amin(-1), groups.amax(-1)


def compress(weight: Tensor, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """A weight [rows, columns] by the library's own compressor, and its exact value."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = _scheme(name)
    compressor = BaseCompressor.get_value_from_registry(COMPRESSED[name][0])
    low, high = _ranges(weight, scheme.weights)
    state = {"weight": weight}
    overall = None
    if COMPRESSED[name][0].startswith("nvfp4"):
        overall = generate_gparam(low.amin(), high.amax())
        state["weight_global_scale"] = overall
    scale, zero = calculate_qparams(low, high, scheme.weights, overall)
    mx = COMPRESSED[name][0].startswith("mx")
    narrow = scale if overall is not None or mx else scale.bfloat16()
    state |= {"weight_scale": narrow.float(), "weight_zero_point": zero}
    found = compressor.compress(state, scheme)
    if narrow.dtype == torch.bfloat16:
        found["weight_scale"] = narrow
    if not scheme.weights.symmetric and "weight_zero_point" not in found:
        raise AssertionError(f"{name} has lost its zero points")
    plain = decompress({k: v.clone() for k, v in found.items()}, name)
    return {leaf: tensor.contiguous() for leaf, tensor in found.items()}, plain


def decompress(state: dict[str, Tensor], name: str) -> Tensor:
    """What the library reads, in float32: scales of 16 bits are widened before they multiply."""
    from compressed_tensors.compressors import BaseCompressor

    if state["weight_scale"].dtype == torch.bfloat16:
        state["weight_scale"] = state["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(COMPRESSED[name][0])
    value: Tensor = compressor.decompress(state, _scheme(name))["weight"].float()
    return value


def _ct_config(name: str, ignore: list[str]) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig(
        config_groups={"group_0": _scheme(name)},
        ignore=ignore,
        format=COMPRESSED[name][0],
        quantization_status="compressed",
    )
    found: dict[str, Any] = json.loads(config.model_dump_json())
    return found


def kimi_k2(folder: Path) -> Published:
    """Kimi-K2-Thinking: DeepSeek-V3's class, routed experts in int4 with groups of 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64}
    tensors = _base(folder, small_config("deepseek_v3", **sizes, first_k_dense_replace=1))
    encode = lambda weight: compress(weight, "W4A16G32")  # noqa: E731
    chosen = lambda name, tensor: ".experts." in name and tensor.dim() == 2  # noqa: E731
    stored, plain, encoded = _encode(tensors, chosen, encode)
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"]
    ignore += [r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    _write(folder, stored, _ct_config("W4A16G32", ignore), shards=2)
    return Published(folder, plain, encoded)


def compressed(folder: Path, name: str, kind: str = "llama") -> Published:
    """A dense model as llm-compressor writes it, in one of COMPRESSED; lm_head is left alone."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    tensors = _base(folder, small_config(kind, **sizes, tie_word_embeddings=False))
    stored, plain, encoded = _encode(tensors, _is_matrix, lambda weight: compress(weight, name))
    if name == "FP8":  # static activations
        for weight in encoded:
            stored[weight.removesuffix("weight") + "input_scale"] = torch.tensor([0.02]).bfloat16()
    _write(folder, stored, _ct_config(name, ["lm_head"]))
    return Published(folder, plain, encoded)


# AWQ and GPTQ

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _words(codes: Tensor, bits: int, dim: int) -> Tensor:
    """int64 codes -> int32 words along `dim`, the first code in the lowest bits."""
    each = 32 // bits
    parts = codes.movedim(dim, -1).unflatten(-1, (-1, each))
    words = (parts << (torch.arange(each) * bits)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.to(torch.int32).movedim(-1, dim).contiguous()


def _integers(
    weight: Tensor, groups: Tensor, bits: int, sym: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [columns, rows], zero points and float16 scales [groups, rows] of [rows, columns].

    `groups` [columns] says to which group a column belongs.
    """
    count, top = int(groups.max()) + 1, 2**bits - 1
    turned = weight.T
    members = [turned[groups == g] for g in range(count)]
    low = torch.stack([m.amin(0) for m in members]).clamp(max=0)
    high = torch.stack([m.amax(0) for m in members]).clamp(min=0)
    if sym:
        scale = 2 * torch.maximum(high, -low) / top
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (high - low) / top
        zero = (-low / scale).round().clamp(1, top)  # GPTQ's first format has no 0
    scale = scale.half()
    codes = (turned / scale.float()[groups] + zero[groups]).round().clamp(0, top)
    return codes.long(), zero.long(), scale


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half() for name, tensor in tensors.items()}


def _dense(folder: Path, kind: str) -> dict[str, Tensor]:
    """A float16 model whose rows and columns are whole groups of 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    tensors = _half(_base(folder, small_config(kind, **sizes, tie_word_embeddings=False)))
    told = json.loads((folder / "config.json").read_text("utf-8"))
    told.pop("dtype", None)
    _dump(folder / "config.json", told | {"torch_dtype": "float16"})
    return tensors


def awq(folder: Path, kind: str = "llama", group_size: int = 128) -> Published:
    """AutoAWQ, version gemm: [columns, rows / 8], eight codes of a word in AWQ_ORDER."""
    tensors = _dense(folder, kind)

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = torch.arange(weight.shape[1]) // group_size
        codes, zero, scale = _integers(weight, groups, 4, sym=False)
        value = (codes - zero[groups]).float() * scale.float()[groups]
        order = (torch.arange(0, weight.shape[0], 8)[:, None] + torch.tensor(AWQ_ORDER)).flatten()
        words = {"qweight": _words(codes[:, order], 4, 1), "qzeros": _words(zero[:, order], 4, 1)}
        return {**words, "scales": scale}, value.T.contiguous()

    stored, plain, encoded = _encode(tensors, _is_matrix, encode)
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
    quantization |= {"zero_point": True, "modules_to_not_convert": None}
    _write(folder, stored, quantization)
    return Published(folder, plain, encoded)


def gptq(
    folder: Path,
    kind: str = "llama",
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    desc_act: bool = False,
    checkpoint_format: str = "gptq",
) -> Published:
    """AutoGPTQ and GPTQModel: [columns * bits / 32, rows]; `gptq` stores zero points minus one.

    group_size -1 is one group for all columns; with desc_act, columns belong to groups in the order
    of their activations, as g_idx says.
    """
    tensors = _dense(folder, kind)
    generator = torch.Generator().manual_seed(4)

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        columns = weight.shape[1]
        width = columns if group_size == -1 else group_size
        groups = torch.arange(columns) // width
        if desc_act:
            order = torch.randperm(columns, generator=generator)
            groups = torch.empty_like(groups).scatter(0, order, groups)
        codes, zero, scale = _integers(weight, groups, bits, sym)
        value = (codes - zero[groups]).float() * scale.float()[groups]
        kept = zero - 1 if checkpoint_format == "gptq" else zero
        words = {"qweight": _words(codes, bits, 0), "qzeros": _words(kept, bits, 1)}
        return {**words, "scales": scale, "g_idx": groups.int()}, value.T.contiguous()

    stored, plain, encoded = _encode(tensors, _is_matrix, encode)
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        "checkpoint_format": checkpoint_format,
        "damp_percent": 0.01,
        "static_groups": False,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }
    _write(folder, stored, quantization)
    return Published(folder, plain, encoded)
