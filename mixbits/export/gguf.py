"""GGUF, for llama.cpp: one file, every weight in the type that holds it exactly.

    MXFP4  MXFP4  per 32 columns: the scale's byte, then 16 bytes, element j in the low and j + 16
                  in the high half; the same code points
    int8   Q8_0   per 32 columns: a float16 scale, then 32 signed bytes
    int4   Q4_0   a float16 scale, then 16 bytes as of MXFP4; the value is (code - 8) * scale
    int2   Q4_0   the same, 6 above: (code + 6 - 8) * scale
    else   BF16, F16 or F32, as it is stored; vectors F32

Groups of more than 32 columns become several blocks with one scale. The experts of a layer are
stacked, projection by projection, and routers are F32. llama.cpp rotates pairs of
neighbours in the heads of a Llama, transformers pairs of halves: the rows of q and k are put in
its order. It rounds activations to 8 bits in a way of its own, whatever the scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..formats.pack import Packed
from ..formats.reference import unpack_codes
from ..formats.schemes import MX_GROUP, Format
from ..model.families import FAMILIES, Family, Gguf, family_of
from ..model.layout import LinearInfo
from ..model.recognise import is_router_name
from .gguf_tokenizer import add_vocabulary, read_vocabulary
from .packed import Carrier

FILE = "model.gguf"
_TYPES = {  # element, scale -> the type that holds them
    ("e2m1", "e8m0"): "MXFP4",
    ("int8", "float16"): "Q8_0",
    ("int4", "float16"): "Q4_0",
    ("int2", "float16"): "Q4_0",
}


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, blocks, 32] -> [N, blocks, 16]: element j low, j + 16 high."""
    low, high = codes.split(MX_GROUP // 2, dim=2)
    return low | high << 4


def blocks(packed: Packed, fmt: Format, columns: int) -> Tensor:
    """The same weight as rows of blocks, uint8 [N, bytes], in the type that `_TYPES` says."""
    codes = unpack_codes(packed.weight_packed, fmt.bits, columns).unflatten(1, (-1, MX_GROUP))
    scale = packed.weight_scale.unsqueeze(2)
    if fmt.scale == "float16":
        repeated = scale.repeat_interleave(fmt.group_size // MX_GROUP, 1)[:, : codes.shape[1]]
        scale = repeated.contiguous().view(torch.uint8)
    if fmt.element == "int2":
        codes = codes + 6
    values = codes ^ 0x80 if fmt.bits == 8 else _nibbles(codes)
    return torch.cat([scale, values], 2).flatten(1)


def rotary_order(rows: int, head_dim: int) -> Tensor:
    """Rows of a q or k weight in llama.cpp's order: the two halves of a head take turns."""
    return torch.arange(rows).unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten()


@dataclass(frozen=True)
class _Values:
    """What a tensor of the file holds: its type, numpy shape and dtype, and how it is made."""

    type: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def data(self) -> Any:
        made = self.make().contiguous()
        return (made.view(torch.uint8) if made.dtype == torch.bfloat16 else made).numpy()


def _matrix(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> _Values:
    """A matrix that is not quantized, in its own type."""
    if dtype == torch.bfloat16:
        return _Values("BF16", (shape[0], 2 * shape[1]), make)
    kind = "F16" if dtype == torch.float16 else "F32"
    return _Values(
        kind, shape, lambda: make().to(torch.float16 if kind == "F16" else torch.float32)
    )


def _stacked(parts: Sequence[_Values]) -> _Values:
    """Parts of one type and shape, in one tensor."""
    shape = len(parts), *parts[0].shape
    return _Values(parts[0].type, shape, lambda: torch.stack([part.make() for part in parts]))


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UsageError("--format gguf needs the gguf package: pip install gguf") from error
    return gguf


def _check_model(config: Any) -> Gguf:
    """What the model is there. Raises UsageError for models that llama.cpp runs otherwise."""
    kind, found = config.model_type, family_of(config).gguf
    if found is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.gguf)
        raise UsageError(f"--format gguf knows the architectures {known}: got {kind}")
    if config.hidden_act != "silu":
        raise UsageError(f"llama.cpp runs a {kind} with silu only: got {config.hidden_act}")
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        raise UsageError(f"llama.cpp runs a {kind} without sliding windows only: got {window}")
    if found.architecture == "qwen3moe":
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            raise UsageError("llama.cpp runs a qwen3_moe with experts in every layer only")
        if not config.norm_topk_prob:
            raise UsageError("llama.cpp runs a qwen3_moe with norm_topk_prob only")
    return found


def _add_rope(writer: Any, config: Any, head_dim: int) -> Tensor | None:
    """Settings of rotary embeddings; the divisors of frequencies, where a Llama 3 has them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "linear":
        writer.add_rope_scaling_type(_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        return plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    elif kind != "default":
        raise UsageError(f"rotary embeddings must be default, linear or llama3: got {kind}")
    return None


def _add_settings(writer: Any, config: Any, architecture: str, head_dim: int) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    if experts := getattr(config, "num_local_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(_gguf().GGML_QUANT_VERSION)


class _Entries:
    """Makes the entries of a file from a carrier's tensors."""

    def __init__(self, carrier: Carrier, there: Gguf, head_dim: int) -> None:
        gguf = _gguf()
        self.carrier, self.head_dim = carrier, head_dim
        self.family: Family = carrier.model.family
        self.rotates = there.rotates_neighbours
        self.sizes, self.types = gguf.GGML_QUANT_SIZES, gguf.GGMLQuantizationType
        arch = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == there.architecture)
        layers = carrier.model.shapes.config.num_hidden_layers
        self.names = gguf.get_tensor_name_map(arch, layers)

    def _name(self, tensor: str) -> str:
        known = self.family.gguf_name(tensor)
        found = self.names.get_name(known, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UsageError(f"GGUF has no name for {tensor}")
        return str(found)

    def _order(self, linear: str, rows: int) -> Tensor | slice:
        is_rotated = self.rotates and linear.rpartition(".")[2] in self.family.attention[:2]
        return rotary_order(rows, self.head_dim) if is_rotated else slice(None)

    def all(self) -> dict[str, _Values]:
        """Name there -> values."""
        model = self.carrier.model
        found = {n: self._plain(n, spec.shape) for n, spec in model.plain.items()}
        stacks: dict[str, list[_Values]] = {}
        for name, info in model.linears.items():
            if info.is_expert:
                stacks.setdefault(info.stack, []).append(self._linear(info))
            elif name in self.carrier.fits:
                found[f"{name}.weight"] = self._linear(info)
        found |= {f"{stack}.weight": _stacked(parts) for stack, parts in stacks.items()}
        return {self._name(name): values for name, values in found.items()}

    def _linear(self, info: LinearInfo) -> _Values:
        fit = self.carrier.fits.get(info.name)
        rows, columns = info.out_features, info.in_features
        order = self._order(info.name, rows)
        if fit is None or fit.scheme.weight is None:
            dtype = self.carrier.unpacked_dtype(info.name)
            return _matrix((rows, columns), dtype, lambda: self.carrier.unpacked(info.name)[order])
        fmt = fit.scheme.weight
        kind = _TYPES[fmt.element, fmt.scale]
        elements, size = self.sizes[self.types[kind]]

        def make() -> Tensor:
            return blocks(self.carrier.packed(info.name).rows(order), fmt, columns)

        return _Values(kind, (rows, columns // elements * size), make)

    def _plain(self, name: str, shape: tuple[int, ...]) -> _Values:
        owner = name.rpartition(".")[0]
        order = self._order(owner, shape[0])
        # In 16 bits, llama.cpp rounds a router's input.
        if len(shape) == 1 or is_router_name(owner, self.family):
            return _Values("F32", shape, lambda: self.carrier.plain(name, torch.float32)[order])
        dtype = self.carrier.kept(self.carrier.model.specs[name].dtype)
        return _matrix(shape, dtype, lambda: self.carrier.plain(name)[order])


_NUMPY: dict[str, Any] = {"F32": np.float32, "F16": np.float16}  # others: bytes


def write(folder: Path, carrier: Carrier) -> None:
    """Write `model.gguf` into an existing folder. Raises UsageError for unknown architectures."""
    gguf, config = _gguf(), carrier.model.shapes.config
    there = _check_model(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(folder / FILE, there.architecture)
    writer.add_name(carrier.model.path.resolve().name)
    _add_settings(writer, config, there.architecture, head_dim)
    divisors = _add_rope(writer, config, head_dim)
    rows = carrier.model.shapes.get_input_embeddings().weight.shape[0]
    add_vocabulary(writer, read_vocabulary(carrier.model.path, rows, carrier.lossy))
    entries = _Entries(carrier, there, head_dim).all()
    if divisors is not None:
        entries["rope_freqs.weight"] = _Values("F32", tuple(divisors.shape), lambda: divisors)
    for name, entry in entries.items():
        kind = np.dtype(_NUMPY.get(entry.type, np.uint8))
        size = int(np.prod(entry.shape)) * kind.itemsize
        type_number = gguf.GGMLQuantizationType[entry.type]
        writer.add_tensor_info(name, entry.shape, kind, size, type_number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries.values():
        writer.write_tensor_data(entry.data())
    writer.close()
