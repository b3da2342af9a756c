"""Packed checkpoints: what is written, how it is written, and how it is read back.

    model-00001-of-0000N.safetensors  packed linears (mixbits.pack), everything else in 16 bits
    model.safetensors.index.json      where more than one shard is needed
    config.json                       the model's own, with `quantization_config`
    plan.json, scores.json            how it came about
    report.json, report.html          what it is worth (mixbits.report, report_html)
    tokenizer and generation files    copied

Sizes are known before anything is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .formats import Assignment, Mixed, UsageError, first_line
from .linear import MixedLinear, PackedLinear, pack_recipe, recipe_tensors
from .model import (
    CausalLM,
    LinearInfo,
    find_linears,
    head_is_tied,
    meta_model,
    output_head,
    split_expert_name,
    weight_of,
)
from .pack import LAYOUT, Rounded, recipe_spec
from .recipes import describe
from .source import Source, open_source

SHARD_BYTES = 2 << 30
_DTYPE_NAMES = {  # in the order of safetensors, which stores the last first
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor, and where its value comes from: a linear to pack, or the model."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    linear: LinearInfo | None = None

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


def tensor_specs(
    model: nn.Module, linears: Sequence[LinearInfo], assignment: Assignment, dtype: torch.dtype
) -> list[TensorSpec]:
    """Every tensor of the checkpoint, from shapes alone (a meta model will do)."""
    packed = {i.name: i for i in linears if _is_packed(i.name, assignment)}
    split_modules = {split_expert_name(i.name)[0] for i in packed.values() if i.is_expert}
    specs: list[TensorSpec] = []
    for info in packed.values():
        spec = recipe_spec(assignment[info.name], info.out_features, info.in_features)
        for name, (kind, shape) in spec.items():
            specs.append(TensorSpec(f"{info.name}.{name}", kind, shape, info))
    for info in linears:  # experts that were left alone beside packed ones
        left = info.is_expert and info.name not in packed
        if left and split_expert_name(info.name)[0] in split_modules:
            shape = (info.out_features, info.in_features)
            specs.append(TensorSpec(f"{info.name}.weight_plain", dtype, shape, info))
    gone = {f"{name}.weight" for name in packed} | _tied_copies(model)
    gone |= {f"{m}.{p}" for m in split_modules for p in ("gate_up_proj", "down_proj")}
    for name, tensor in model.state_dict().items():
        if name not in gone:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            specs.append(TensorSpec(name, kind, tuple(tensor.shape)))
    return specs


def _is_packed(name: str, assignment: Assignment) -> bool:
    return name in assignment and assignment[name].packed


def _tied_copies(model: nn.Module) -> set[str]:
    """State-dict names that share another's storage by design: a tied head."""
    return {f"{output_head(model)[0]}.weight"} if head_is_tied(model) else set()


@dataclass(frozen=True)
class Shard:
    file: str
    specs: list[TensorSpec]

    @property
    def nbytes(self) -> int:
        """Exact size of the file: 8 bytes of length, the header, the data."""
        return _header_bytes(self.specs) + sum(s.nbytes for s in self.specs)


def _header_bytes(specs: Sequence[TensorSpec]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    rank = {dtype: -index for index, dtype in enumerate(_DTYPE_NAMES)}
    offset = 0
    for spec in sorted(specs, key=lambda s: (rank[s.dtype], s.name)):
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + text + -text % 8


def make_shards(specs: Sequence[TensorSpec]) -> list[Shard]:
    """Cut the tensors, in order, into files of at most `SHARD_BYTES` of data (or one tensor)."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    count = len(groups)
    if count == 1:
        return [Shard("model.safetensors", groups[0])]
    return [
        Shard(f"model-{i:05}-of-{count:05}.safetensors", group) for i, group in enumerate(groups, 1)
    ]


def predicted_bytes(
    model: nn.Module, linears: Sequence[LinearInfo], assignment: Assignment, dtype: torch.dtype
) -> int:
    """Exact size of the weight files for an assignment."""
    return sum(s.nbytes for s in make_shards(tensor_specs(model, linears, assignment, dtype)))


def _tensors(
    model: nn.Module, specs: Sequence[TensorSpec], assignment: Assignment, rounded: Rounded
) -> dict[str, Tensor]:
    """The values of `specs`, name -> tensor."""
    state = model.state_dict()
    orders = _row_orders(assignment)
    out: dict[str, Tensor] = {}
    for spec in specs:
        if spec.name in out:
            continue
        owner = spec.name.rpartition(".")[0] if spec.linear is None else spec.linear.name
        order = orders.get(owner)
        if spec.linear is None:
            value = state[spec.name].detach()
            value = value if order is None else value[order]
            out[spec.name] = value.to(spec.dtype).contiguous()
            continue
        weight = weight_of(model, spec.linear).detach()
        if spec.name.endswith(".weight_plain"):
            weight = weight if order is None else weight[order]
            out[spec.name] = weight.to(spec.dtype).contiguous()
            continue
        recipe = assignment[owner]
        packed = rounded[owner] if owner in rounded else pack_recipe(owner, weight, recipe)
        if order is not None:
            packed = [part.rows(order) for part in packed]
        for name, value in recipe_tensors(recipe, packed).items():
            out[f"{owner}.{name}"] = value
    return out


def _row_orders(assignment: Assignment) -> dict[str, Tensor]:
    """Linear -> order of its rows, where the order of another's columns is folded into them."""
    orders: dict[str, Tensor] = {}
    for name, recipe in assignment.items():
        if isinstance(recipe, Mixed) and recipe.folded and recipe.order is not None:
            parent = name.rpartition(".")[0]
            order = torch.tensor(recipe.order)
            orders |= {f"{parent}.{leaf}": order for leaf in ("gate_proj", "up_proj")}
    return orders


def _write_weights(
    folder: Path,
    model: nn.Module,
    shards: Sequence[Shard],
    assignment: Assignment,
    rounded: Rounded,
) -> None:
    from safetensors.torch import save_file

    for shard in shards:
        wanted = {s.name for s in shard.specs}
        tensors = _tensors(model, shard.specs, assignment, rounded)
        save_file(
            {n: t for n, t in tensors.items() if n in wanted},
            folder / shard.file,
            metadata={"format": "pt"},
        )
    write_index(folder, shards)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Where each tensor is, if there is more than one file."""
    if len(shards) > 1:
        places = {name: s.file for s in shards for name in sorted(spec.name for spec in s.specs)}
        total = sum(s.nbytes for shard in shards for s in shard.specs)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def quantization_config(assignment: Assignment, provenance: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of config.json; `MixbitsConfig` reads it back."""
    from . import __version__

    return {
        "quant_method": "mixbits",
        "mixbits_version": __version__,
        "layout": LAYOUT,
        **provenance,
        "modules": {n: describe(r) for n, r in assignment.items() if r.packed},
    }


def _write_config(
    folder: Path, source: Source, quantization: dict[str, Any], untie: bool, dtype: torch.dtype
) -> None:
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if untie:  # the head has packed weights of its own now
        config["tie_word_embeddings"] = False
    config["quantization_config"] = quantization
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, generation and chat files; with `--trust-remote-code` models, their code."""
    names = ["generation_config.json", "special_tokens_map.json", "added_tokens.json"]
    names += ["vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"]
    found = [source / name for name in names]
    for pattern in ("tokenizer*", "*.model", "*.py", "LICENSE*"):
        found += sorted(source.glob(pattern))
    for path in found:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def save(
    folder: Path,
    source: Source,
    model: nn.Module,
    linears: Sequence[LinearInfo],
    assignment: Assignment,
    provenance: dict[str, Any],
    rounded: Rounded = MappingProxyType({}),
) -> int:
    """Write a packed checkpoint into an existing folder; returns the bytes of the weight files.

    `rounded` has the linears that are packed already; others are rounded to nearest.

    Raises UsageError that names the tensor for weights that cannot be packed.
    """
    shards = make_shards(tensor_specs(model, linears, assignment, source.dtype))
    _write_weights(folder, model, shards, assignment, rounded)
    head = output_head(model)[0]
    untie = head_is_tied(model) and _is_packed(head, assignment)
    quantization = quantization_config(assignment, provenance)
    _write_config(folder, source, quantization, untie, source.dtype)
    copy_companions(source.path, folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def save_fake(
    folder: Path,
    source: Source,
    model: Any,
    linears: Sequence[LinearInfo],
    assignment: Assignment,
    rounded: Rounded = MappingProxyType({}),
) -> int:
    """Write a plain 16-bit model whose weights are rounded but not packed, for any other tool.

    The model itself is changed. Activations are not rounded by such a model.
    """
    from .fake import round_weights

    head = output_head(model)[0]
    if head_is_tied(model) and _is_packed(head, assignment):
        model.config.tie_word_embeddings = False
    round_weights(model, [i for i in linears if i.name in assignment], assignment, rounded)
    model.save_pretrained(folder)
    copy_companions(source.path, folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _stored_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor in a folder's weight files, from their headers."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                    part = file.get_slice(name)
                    found[name] = part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise UsageError(f"cannot read {path}: {error}; is the file complete?") from None
    return found


def check_tensors(
    folder: Path, schemes: Assignment, trust_remote_code: bool
) -> tuple[CausalLM, list[LinearInfo], list[TensorSpec]]:
    """The model without storage, its linears and the tensors that config.json says.

    Raises UsageError unless the files hold these, in their dtypes and shapes, and no more.
    """
    source = open_source(str(folder), trust_remote_code, quantized=True)
    model = meta_model(source.config, trust_remote_code=trust_remote_code)
    linears = find_linears(model, include_head=True)
    unknown = sorted(set(schemes) - {info.name for info in linears})
    if unknown:
        raise UsageError(
            f"quantization_config names a linear that the model lacks: {unknown[0]} ({folder})"
        )
    specs = tensor_specs(model, linears, schemes, source.dtype)
    expected = {s.name: (_DTYPE_NAMES[s.dtype], s.shape) for s in specs}
    found = _stored_tensors(folder)
    for name in sorted(expected.keys() | found.keys()):
        wanted, got = (
            f"{t[name][0]} {list(t[name][1])}" if name in t else "none" for t in (expected, found)
        )
        if wanted != got:
            raise UsageError(
                f"the tensors of a checkpoint must be those that config.json says: {name} must be "
                f"{wanted}: got {got} ({folder})"
            )
    return model, linears, specs


def check_order(name: str, order: Tensor, folder: Path) -> None:
    """A damaged order would address memory beyond the input."""
    if order.sort().values.tolist() != list(range(len(order))):
        raise UsageError(f"{name}.order must hold each of {len(order)} columns once ({folder})")


def _from_pretrained(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    """transformers' own loading, every tensor in its place."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"cannot load the checkpoint in {folder}: {first_line(error)}") from None
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(sorted(map(str, info[kind]))[:3])
            raise UsageError(
                f"the tensors of a checkpoint must be those that config.json says: "
                f"{kind.replace('_', ' ')} {names} ({folder})"
            )
    return model


def load(
    folder: str | Path,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    int8_activations: bool = False,
    cuda_graphs: bool = True,
) -> Any:
    """A transformers model with packed linears, ready for `generate`.

    backend           forces one of `mixbits.ops.backends()`; otherwise the best for the device.
    dtype             of activations and unquantized weights; the checkpoint's own by default.
    int8_activations  lets ...A16 schemes round activations to 8 bits on a CPU: faster prefill,
                      results that are no longer those of the float computation.
    cuda_graphs       on a GPU, `generate` uses a static cache and replays its one-token steps
                      (mixbits.graphs), where the model allows it.

    Raises UsageError if the folder is no mixbits checkpoint, or any tensor is missing,
    unexpected or of another shape or dtype.
    """
    from . import ops, transformers_quantizer
    from .attention import use_grouped_attention
    from .decode import use_decode_step
    from .graphs import use_graphs
    from .pages import use_large_pages

    folder = Path(folder)
    config = transformers_quantizer.read_config(folder)
    if backend is not None:
        ops.choose_backend(torch.device(device).type, backend)
    check_tensors(folder, config.recipes(), trust_remote_code)
    model = _from_pretrained(folder, dtype, trust_remote_code)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            module.backend, module.int8_activations = backend, int8_activations
        elif isinstance(module, MixedLinear) and module.order is not None:
            check_order(name, module.order, folder)
    use_grouped_attention(model)
    model = model.to(device).eval().requires_grad_(False)
    if model.device.type == "cpu":
        use_decode_step(model)
        use_large_pages(model)
    elif cuda_graphs and model.device.type == "cuda":
        use_graphs(model)
    return model
