"""Packed checkpoints: what a folder holds, in which files, how large, and under which checksum.

    model-00001-of-0000N.safetensors  packed linears (mixbits.formats.pack), everything else as the
                                      source stores it
    model.safetensors.index.json      where more than one shard is needed
    config.json                       the model's own, with `quantization_config`
    plan.json, scores.json            how it came about
    report.json, report.html          what it is worth (mixbits.report.report, html)
    README.md                         the model's card (mixbits.report.card)
    mixbits-manifest.json             which files are ours (mixbits.files.manifest)
    tokenizer, processor and others   copied

`quantization_config` names what is neither packed nor of the model's own 16-bit type:

    dtypes    {tensor: dtype} of plain tensors in another type, such as a router's float32 bias
    carried   tensors that the model's class does not take, such as the layers of MTP
    stored    tensors that the source has quantized and the plan leaves alone, with the source's own
              `quantization_config`: they are made plain when the folder is loaded. None may be
              named, where what is carried is quantized

All of it is known from shapes, before anything is written (`mixbits.checkpoint.saving`).
`quantization_config` has a checksum of all values and recipes, in whatever files they lie, so that
what reads a checkpoint (`mixbits.checkpoint.stock`) notices any damage.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..files.io import read_object
from ..formats.pack import layout_number, recipe_spec
from ..formats.recipes import describe
from ..formats.schemes import Assignment
from ..model.experts import layout_of
from ..model.layout import (
    LinearInfo,
    expert_linears,
    head_is_tied,
    output_head,
    split_expert_name,
)
from ..source.source import NOT_A_FILE, Source
from ..source.weights import DTYPE_NAMES, Weights

SHARD_BYTES = 2 << 30
TO_LOAD = (
    "install mixbits (`pip install .` in a clone of its repository), then `import mixbits` before "
    "transformers' from_pretrained"
)
_MODES = ("weight_scale_mode", "act_scale_mode")


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor, and where its value comes from: a linear to pack, or the model.

    `as_stored`: the source's own tensor of this name, whatever it is.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    linear: LinearInfo | None = None
    as_stored: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is a value of the model: neither of a packed weight, nor the source's own."""
        alone = self.linear is None or self.name.endswith((".weight_plain", ".bias"))
        return alone and not self.as_stored

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


def tensor_specs(
    model: nn.Module,
    linears: Sequence[LinearInfo],
    assignment: Assignment,
    dtype: torch.dtype,
    weights: Weights | None = None,
) -> list[TensorSpec]:
    """Every tensor of the checkpoint, from shapes alone (a meta model will do).

    Plain tensors are of the types that `weights`, the source's, has; without it of `dtype`.
    """
    packed = {i.name: i for i in linears if is_packed(i.name, assignment)}
    split_modules = {split_expert_name(i.name)[0] for i in packed.values() if i.is_expert}
    linears = [*linears, *_siblings(model, linears, split_modules)]
    specs: list[TensorSpec] = []
    for info in packed.values():
        spec = recipe_spec(assignment[info.name], info.out_features, info.in_features)
        for name, (kind, shape) in spec.items():
            specs.append(TensorSpec(f"{info.name}.{name}", kind, shape, info))
    for info in linears:  # experts that were left alone beside packed ones
        left = info.is_expert and info.name not in packed
        if left and split_expert_name(info.name)[0] in split_modules:
            kind = _stack_dtype(weights, stack_of(model, info)) or dtype
            shape = (info.out_features, info.in_features)
            specs.append(TensorSpec(f"{info.name}.weight_plain", kind, shape, info))
    layouts = {name: layout_of(model.get_submodule(name)) for name in split_modules}
    for info in linears:  # biases of experts go with their weights
        layout = layouts.get(split_expert_name(info.name)[0]) if info.is_expert else None
        if layout is not None and layout.biased:
            kind = _stack_dtype(weights, f"{stack_of(model, info)}_bias") or dtype
            specs.append(TensorSpec(f"{info.name}.bias", kind, (info.out_features,), info))
    gone = {f"{name}.weight" for name in packed} | tied_copies(model)
    gone |= {f"{m}.{p}" for m, layout in layouts.items() if layout for p in layout.stacks}
    state = model.state_dict()
    is_quantized = weights is not None and not weights.is_plain
    as_stored = _left_quantized(weights, assignment, gone) if weights and is_quantized else {}
    for name, tensor in state.items():
        if name not in gone and name not in as_stored:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            # BF16, where a plan says so, is 16 bits.
            if weights is not None and name.removesuffix(".weight") not in assignment:
                kind = weights.stored_dtype(name) or kind
            specs.append(TensorSpec(name, kind, tuple(tensor.shape)))
    if weights is not None:
        parts = [part for names in as_stored.values() for part in names]
        for part in dict.fromkeys([*parts, *weights.carried_parts]):
            specs.append(TensorSpec(part, *weights.files.headers[part], as_stored=True))
    return specs


def _siblings(
    model: nn.Module, linears: Sequence[LinearInfo], split_modules: Iterable[str]
) -> Iterator[LinearInfo]:
    """Linears of experts modules that are taken apart which are not among `linears`: --ignore."""
    known = {info.name for info in linears}
    for name in sorted(split_modules):
        module = model.get_submodule(name)
        layout = layout_of(module)
        assert layout is not None
        yield from (i for i in expert_linears(name, module, layout, 0) if i.name not in known)


def stack_of(model: nn.Module, info: LinearInfo) -> str:
    """The parameter that holds an expert's weight."""
    module, _, projection = split_expert_name(info.name)
    layout = layout_of(model.get_submodule(module))
    assert layout is not None
    return f"{module}.{layout.stack(projection)}"


def _stack_dtype(weights: Weights | None, name: str) -> torch.dtype | None:
    return None if weights is None else weights.stored_dtype(name)


def _left_quantized(
    weights: Weights, assignment: Assignment, gone: Container[str]
) -> dict[str, list[str]]:
    """Tensors of the model that the plan leaves as the source has quantized them, with the parts.

    What is made together with something that is packed, or that has a scheme, is made plain.
    """
    found: dict[str, list[str]] = {}
    taken = {
        id(weights.groups[name])
        for name in weights.groups
        if name in gone or name.removesuffix(".weight") in assignment
    }
    for name, group in weights.groups.items():
        if not weights.is_stored_plain(name) and id(group) not in taken:
            found[name] = weights.parts(name)
    return found


def is_packed(name: str, assignment: Assignment) -> bool:
    return name in assignment and assignment[name].packed


def tied_copies(model: Any) -> set[str]:
    """State-dict names that share another's storage by design, such as a tied head's.

    transformers ties them after loading only: until then, its list is all there is.
    """
    return set(model.all_tied_weights_keys)


@dataclass(frozen=True)
class Shard:
    """One weight file: its name, and the tensors that it holds, in their order."""

    file: str
    specs: list[TensorSpec]

    @property
    def nbytes(self) -> int:
        """Exact size of the file: 8 bytes of length, the header, the data."""
        return _header_bytes(self.specs) + sum(s.nbytes for s in self.specs)


def _header_bytes(specs: Sequence[TensorSpec]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    rank = {dtype: -index for index, dtype in enumerate(DTYPE_NAMES)}
    offset = 0
    for spec in sorted(specs, key=lambda s: (rank[s.dtype], s.name)):
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
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
    model: nn.Module,
    linears: Sequence[LinearInfo],
    assignment: Assignment,
    dtype: torch.dtype,
    weights: Weights | None = None,
) -> int:
    """Exact size of the weight files for an assignment."""
    specs = tensor_specs(model, linears, assignment, dtype, weights)
    return sum(shard.nbytes for shard in make_shards(specs))


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Where each tensor is, if there is more than one file."""
    if len(shards) > 1:
        places = {name: s.file for s in shards for name in sorted(spec.name for spec in s.specs)}
        total = sum(s.nbytes for shard in shards for s in shard.specs)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def quantization_config(assignment: Assignment, provenance: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of config.json but its checksum; `MixbitsConfig` reads it back."""
    from .. import __version__

    return {
        "quant_method": "mixbits",
        "to_load": TO_LOAD,
        "mixbits_version": __version__,
        "layout": layout_number(assignment.values()),
        **dict.fromkeys(_MODES, "floor"),
        **provenance,
        "modules": {n: describe(r) for n, r in assignment.items() if r.packed},
    }


def _output_config(source: Source, quantization: dict[str, Any], untie: bool) -> dict[str, Any]:
    """config.json of the output."""
    config = plain_config(source.path, source.dtype)
    if untie:  # the head has weights of its own
        for part in _with_parts(config):
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    config["quantization_config"] = quantization
    require_mixbits(config)
    return config


def _with_parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A configuration, and those of the towers inside it."""
    return [config, *(v for k, v in config.items() if isinstance(v, dict) and k.endswith("config"))]


def require_mixbits(config: dict[str, Any]) -> None:
    """Let transformers refuse the model that a config.json describes where mixbits is missing."""
    for part in (config, config.get("text_config")):  # AutoModelForCausalLM may look there alone
        if isinstance(part, dict):
            part["transformers_weights"] = NOT_A_FILE


def plain_config(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a folder as if nothing were quantized, plain weights of `dtype`."""
    config, kind = read_object(folder / "config.json"), str(dtype).removeprefix("torch.")
    before = config.get("dtype", config.get("torch_dtype"))
    for part in _with_parts(config):
        part.pop("quantization_config", None)
        part.pop("transformers_weights", None)  # the names of files are ours
        if before is not None and part.get("dtype", part.get("torch_dtype")) == before:
            part.pop("torch_dtype", None)
            part["dtype"] = kind
    config["dtype"] = kind
    return config


def _kinds(specs: Iterable[TensorSpec], dtype: torch.dtype) -> dict[str, str]:
    """`dtypes` of quantization_config: plain floats that are not of the model's own type."""
    return {
        s.name: DTYPE_NAMES[s.dtype]
        for s in specs
        if s.is_plain and s.dtype.is_floating_point and s.dtype != dtype
    }


def kinds_of(
    state: Mapping[str, Tensor], recipes: Assignment, dtype: torch.dtype
) -> dict[str, str]:
    """`dtypes` of quantization_config for the tensors of a packed model."""
    scale = re.compile(r"(\.segments\.\d+)?\.weight_scale")
    return {
        name: DTYPE_NAMES[value.dtype]
        for name, value in state.items()
        if value.is_floating_point() and value.dtype != dtype and scale.sub("", name) not in recipes
    }


def _exceptions(
    specs: Sequence[TensorSpec], weights: Weights, dtype: torch.dtype
) -> dict[str, Any]:
    """Keys of quantization_config on what is neither packed nor plain in `dtype`."""
    carried = weights.carried_parts
    found = {"dtypes": _kinds(specs, dtype), "carried": carried}
    stored = [s.name for s in specs if s.as_stored and s.name not in set(carried)]
    if stored or not all(one.is_plain for one in weights.carried):
        found["stored"] = {"quantization_config": weights.quantization, "tensors": stored}
    return {key: value for key, value in found.items() if value}


@dataclass(frozen=True)
class Layout:
    """What a packed checkpoint is made of: all but values, and their checksum."""

    specs: list[TensorSpec]
    quantization: dict[str, Any]
    config: dict[str, Any]  # of which `quantization` is a part


def layout_of_output(
    source: Source,
    model: nn.Module,
    linears: Sequence[LinearInfo],
    assignment: Assignment,
    provenance: Mapping[str, Any] = MappingProxyType({}),
) -> Layout:
    """What `save` writes, from shapes alone (a meta model will do)."""
    weights = source.weights
    specs = tensor_specs(model, linears, assignment, source.dtype, weights)
    head = output_head(model)[0]
    untie = source.untied or (head_is_tied(model) and is_packed(head, assignment))
    facts = {**provenance, **_exceptions(specs, weights, source.dtype)}
    quantization = quantization_config(assignment, facts)
    return Layout(specs, quantization, _output_config(source, quantization, untie))


def crc(name: str, value: Tensor) -> int:
    """crc32 of a tensor's name and values."""
    data: Any = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return zlib.crc32(data, zlib.crc32(name.encode()))


def file_crcs(path: Path) -> Iterator[int]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file, ThreadPoolExecutor(4) as pool:
        yield from pool.map(lambda name: crc(name, file.get_tensor(name)), file.keys())


def checksum(crcs: Iterable[int], quantization: Mapping[str, Any]) -> str:
    """Of all tensors and what a `quantization_config` says of them.

    A sum, so that neither the order of tensors nor their division among files matters.
    """
    said = [quantization.get(k) for k in ("layout", *_MODES, "modules")]
    said += [quantization[k] for k in ("dtypes", "carried", "stored") if quantization.get(k)]
    text = json.dumps(said, sort_keys=True).encode()
    return f"{(sum(crcs) + zlib.crc32(text)) % (1 << 32):08x}"
