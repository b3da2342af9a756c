"""Packed checkpoints: what is written, how it is written, and whether files hold just that.

    model-00001-of-0000N.safetensors  packed linears (mixbits.pack), everything else in 16 bits
    model.safetensors.index.json      where more than one shard is needed
    config.json                       the model's own, with `quantization_config`
    plan.json, scores.json            how it came about
    report.json, report.html          what it is worth (mixbits.report, report_html)
    README.md                         the model's card (mixbits.card)
    tokenizer and generation files    copied

Sizes are known before anything is written. `quantization_config` has a checksum of all values and
recipes, in whatever files they lie, so that what reads a checkpoint notices any damage.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .experts import expert_bias, layout_of
from .formats import Assignment, Mixed, UsageError
from .linear import pack_recipe, recipe_tensors
from .model import (
    LinearInfo,
    find_linears,
    head_is_tied,
    output_head,
    split_expert_name,
    weight_of,
)
from .pack import LAYOUT, Rounded, recipe_spec
from .recipes import describe
from .recognise import MAKERS
from .scores import read_object
from .source import Source

SHARD_BYTES = 2 << 30
# transformers without mixbits only warns, and leaves weights random: config.json says what to do.
TO_LOAD = "pip install mixbits; then `import mixbits` before transformers' from_pretrained"
_MODES = ("weight_scale_mode", "act_scale_mode")
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
    layouts = {name: layout_of(model.get_submodule(name)) for name in split_modules}
    for info in linears:  # biases of experts go with their weights
        layout = layouts.get(split_expert_name(info.name)[0]) if info.is_expert else None
        if layout is not None and layout.biased:
            specs.append(TensorSpec(f"{info.name}.bias", dtype, (info.out_features,), info))
    gone = {f"{name}.weight" for name in packed} | _tied_copies(model)
    gone |= {f"{m}.{p}" for m, layout in layouts.items() if layout for p in layout.stacks}
    for name, tensor in model.state_dict().items():
        if name not in gone:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            specs.append(TensorSpec(name, kind, tuple(tensor.shape)))
    return specs


def _is_packed(name: str, assignment: Assignment) -> bool:
    return name in assignment and assignment[name].packed


def _tied_copies(model: Any) -> set[str]:
    """State-dict names that share another's storage by design, such as a tied head's.

    transformers ties them after loading only: until then, its list is all there is.
    """
    return set(model.all_tied_weights_keys)


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
        if spec.name.endswith((".weight_plain", ".bias")):
            value = weight if spec.name.endswith(".weight_plain") else _bias_of(model, spec.linear)
            value = value if order is None else value[order]
            out[spec.name] = value.to(spec.dtype).contiguous()
            continue
        recipe = assignment[owner]
        packed = rounded[owner] if owner in rounded else pack_recipe(owner, weight, recipe)
        if order is not None:
            packed = [part.rows(order) for part in packed]
        for name, value in recipe_tensors(recipe, packed).items():
            out[f"{owner}.{name}"] = value
    return out


def _bias_of(model: nn.Module, info: LinearInfo) -> Tensor:
    """The [N] bias of an expert's linear."""
    module, expert, projection = split_expert_name(info.name)
    bias = expert_bias(model.get_submodule(module), expert, projection)
    assert bias is not None
    return bias.detach()


def _row_orders(assignment: Assignment) -> dict[str, Tensor]:
    """Linear -> order of its rows, where the order of another's columns is folded into them."""
    orders: dict[str, Tensor] = {}
    for name, recipe in assignment.items():
        if isinstance(recipe, Mixed) and recipe.folded and recipe.order is not None:
            parent = name.rpartition(".")[0]
            order = torch.tensor(recipe.order)
            orders |= {f"{parent}.{leaf}": order for leaf in MAKERS}
    return orders


def _write_weights(
    folder: Path,
    model: nn.Module,
    shards: Sequence[Shard],
    assignment: Assignment,
    rounded: Rounded,
) -> list[int]:
    """Returns the `crc` of every tensor."""
    from safetensors.torch import save_file

    crcs = []
    for shard in shards:
        wanted = {s.name for s in shard.specs}
        tensors = _tensors(model, shard.specs, assignment, rounded)
        tensors = {n: t for n, t in tensors.items() if n in wanted}
        save_file(tensors, folder / shard.file, metadata={"format": "pt"})
        crcs += [crc(name, value) for name, value in tensors.items()]
    write_index(folder, shards)
    return crcs


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Where each tensor is, if there is more than one file."""
    if len(shards) > 1:
        places = {name: s.file for s in shards for name in sorted(spec.name for spec in s.specs)}
        total = sum(s.nbytes for shard in shards for s in shard.specs)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def quantization_config(
    assignment: Assignment, provenance: dict[str, Any], crcs: Iterable[int]
) -> dict[str, Any]:
    """The `quantization_config` of config.json; `MixbitsConfig` reads it back.

    `crcs` are those of all tensors.
    """
    from . import __version__

    config = {
        "quant_method": "mixbits",
        "to_load": TO_LOAD,
        "mixbits_version": __version__,
        "layout": LAYOUT,
        **dict.fromkeys(_MODES, "floor"),
        **provenance,
        "modules": {n: describe(r) for n, r in assignment.items() if r.packed},
    }
    return {**config, "checksum": checksum(crcs, config)}


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
    crcs = _write_weights(folder, model, shards, assignment, rounded)
    head = output_head(model)[0]
    untie = head_is_tied(model) and _is_packed(head, assignment)
    quantization = quantization_config(assignment, provenance, crcs)
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


def _stored_tensors(files: Sequence[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor in weight files, from their headers."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                    if name in found:
                        raise UsageError(f"{name} is in two weight files ({path} is the second)")
                    part = file.get_slice(name)
                    found[name] = part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise UsageError(f"cannot read {path}: {error}; is the file complete?") from None
    return found


def plain_dtype(folder: Path) -> torch.dtype:
    """What config.json says that unquantized tensors are stored in."""
    config = read_object(folder / "config.json")
    name = config.get("dtype", config.get("torch_dtype"))
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"dtype of config.json must be a torch dtype: got {name!r} ({folder})")
    return dtype


def check_files(
    model: Any, recipes: Assignment, files: Sequence[Path], quantization: Mapping[str, Any]
) -> list[TensorSpec]:
    """The tensors of `model` with linears packed by `recipes`: files hold these, and no others.

    `model` has shapes only, and its linears still; `quantization` is the `quantization_config`.
    Raises UsageError that names the tensor that is missing, too many, or of another dtype or
    shape; or that says that values are not those that were written.
    """
    folder = files[0].parent
    linears = find_linears(model, include_head=True, by_use=False)
    unknown = sorted(set(recipes) - {info.name for info in linears})
    if unknown:
        raise UsageError(
            f"quantization_config names a linear that the model lacks: {unknown[0]} ({folder})"
        )
    tied = sorted(_tied_copies(model) & {f"{name}.weight" for name in recipes})
    if tied:
        raise UsageError(f"config.json ties {tied[0]}, which has packed weights ({folder})")
    specs = tensor_specs(model, linears, recipes, plain_dtype(folder))
    expected = {s.name: (_DTYPE_NAMES[s.dtype], s.shape) for s in specs}
    found = _stored_tensors(files)
    for name in sorted(expected.keys() | found.keys()):
        wanted, got = (
            f"{t[name][0]} {list(t[name][1])}" if name in t else "none" for t in (expected, found)
        )
        if wanted != got:
            raise UsageError(
                f"the tensors of a checkpoint must be those that config.json says: {name} must be "
                f"{wanted}: got {got} ({folder})"
            )
    actual = checksum((crc for path in files for crc in _file_crcs(path)), quantization)
    if actual != quantization.get("checksum"):
        raise UsageError(
            "values and schemes of a checkpoint must have the checksum in config.json, "
            f"{quantization.get('checksum')}: got {actual}; a file was damaged or edited, or is of "
            f"another checkpoint ({folder})"
        )
    return specs


def crc(name: str, value: Tensor) -> int:
    """crc32 of a tensor's name and values."""
    data: Any = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return zlib.crc32(data, zlib.crc32(name.encode()))


def _file_crcs(path: Path) -> Iterator[int]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file, ThreadPoolExecutor(4) as pool:
        yield from pool.map(lambda name: crc(name, file.get_tensor(name)), file.keys())


def checksum(crcs: Iterable[int], quantization: Mapping[str, Any]) -> str:
    """Of all tensors and what a `quantization_config` says of them.

    A sum, so that neither the order of tensors nor their division among files matters.
    """
    said = [quantization.get(k) for k in ("layout", *_MODES, "modules")]
    text = json.dumps(said, sort_keys=True).encode()
    return f"{(sum(crcs) + zlib.crc32(text)) % (1 << 32):08x}"
