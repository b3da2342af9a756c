"""Tiny checkpoints as they are published (published.py), whose weights are integers: by
compressed-tensors (and the floats that it stores), AWQ and GPTQ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from published import Published, _base, _dump, _encode, _is_matrix, _write
from torch import Tensor

from benchmarks.tools.tiny_models import small_config

# name -> its format, a preset of the library, and what differs from it
COMPRESSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "W4A16": ("pack-quantized", "W4A16", {}),
    "W4A16G32": ("pack-quantized", "W4A16", {"group_size": 32}),  # Kimi-K2-Thinking
    "W4A16-asym": ("pack-quantized", "W4A16_ASYM", {}),
    "W3A16": ("pack-quantized", "W3A16", {"group_size": 32}),  # codes across two words
    "W6A16-asym": ("pack-quantized", "W6A16", {"group_size": 64, "symmetric": False}),
    "W8A16": ("pack-quantized", "W8A16", {}),
    "W8A8": ("int-quantized", "W8A8", {}),
    "FP8": ("float-quantized", "FP8", {}),  # one scale per tensor
    "FP8-dynamic": ("float-quantized", "FP8_DYNAMIC", {}),  # one per row
    "FP8-block": ("float-quantized", "FP8_BLOCK", {}),
    "NVFP4A16": ("nvfp4-pack-quantized", "NVFP4A16", {}),
    "MXFP4A16": ("mxfp4-pack-quantized", "MXFP4A16", {}),
    "MXFP6A16": ("mxfp6-pack-quantized", "MXFP6A16", {}),
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
