"""The tensors of a checkpoint's files, as a model has them: which is which, and what is left over.

transformers renames what a checkpoint holds, and joins or splits some of it (the experts of a
layer, fused projections), on its way into a model. `Weights` asks the same rules, on names and
shapes alone, so that before anything is read it is known what every tensor of the model is made
of, in what dtype, and which stored tensors the model's class does not take: those are *carried*.
Values are then read tensor by tensor, plain, or as they are stored (`mixbits.source.stored`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, first_line, plain_errors
from ..files.io import check_file, is_plain_name
from ..formats.schemes import Format
from ..model.experts import Layout, layout_of
from ..model.layout import CausalLM, split_expert_name
from .layouts import stored_tensors
from .stored import GptOss, Header, Headers, Kept, Stored

DTYPE_NAMES = {  # in the order of safetensors, which stores the last first
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What safetensors and torch raise of a file that they cannot read is a UsageError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UsageError(
            f"cannot read {path}: {first_line(error)}; is the file complete?"
        ) from error


class Files:
    """Tensors of safetensors files by name: their headers at once, their values when asked for.

    Raises UsageError for a file that cannot be read, a name that is in two, or an unknown dtype.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)
        self._opened: dict[Path, Any] = {}  # mapped once each
        self.places: dict[str, Path] = {}
        self.headers: dict[str, Header] = {}
        for path in self.paths:
            self._read_headers(path)

    def _read_headers(self, path: Path) -> None:
        from safetensors import safe_open

        check_file(path)
        with _readable(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                if not is_plain_name(name):
                    raise UsageError(f"a tensor has no printable name: {name!r:.80} ({path})")
                if name in self.places:
                    raise UsageError(f"{name} is in two weight files ({path} is the second)")
                part = file.get_slice(name)
                if (kind := part.get_dtype()) not in DTYPES:
                    raise UsageError(f"dtype {kind} of {name} cannot be read ({path})")
                self.places[name] = path
                self.headers[name] = Header(DTYPES[kind], tuple(part.get_shape()))

    def nbytes(self, names: Iterable[str]) -> int:
        """Of these tensors, without headers."""
        found = (self.headers[name] for name in names)
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in found)

    def read(self, name: str) -> Tensor:
        """The value, mapped from its file."""
        from safetensors import safe_open

        path = self.places[name]
        with _readable(path):
            if path not in self._opened:
                self._opened[path] = safe_open(path, framework="pt").__enter__()
            value: Tensor = self._opened[path].get_tensor(name)
        return value

    def sha256(self, path: Path, look: Callable[[str, Tensor], None]) -> bytes:
        """The SHA-256 of one of the files, whose tensors go to `look` on the way, name and value.

        So a file that is larger than the memory is read once, and not a second time for its hash:
        its data are its tensors, one after the other without a gap, as safetensors insists.
        """
        with _readable(path), path.open("rb") as file:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
        digest, places = hashlib.sha256(length + header), json.loads(header)
        places.pop("__metadata__", None)
        for name in sorted(places, key=lambda name: places[name]["data_offsets"]):
            value = self.read(name)
            look(name, value)
            data: Any = value.reshape(-1).view(torch.uint8).numpy()
            digest.update(data)
        return digest.digest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # of a copy, or in another process, anew


@dataclass
class _Group:
    """Stored tensors that become tensors of the model together; `converter` is transformers'."""

    first: str  # name of the model's (first) tensor
    converter: Any = None
    members: list[tuple[str, Stored]] = field(default_factory=list)  # pattern, tensor

    def convert(self, model: CausalLM, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """The model's tensors, from plain values of the members."""
        if self.converter is None:
            return {self.first: values[0]}
        converter = deepcopy(self.converter)
        for (pattern, one), value in zip(self.members, values, strict=True):
            converter.add_tensor(self.first, one.name, pattern, value)
        made = converter.convert(self.first, model=model, config=model.config)
        return {n: v[0] if isinstance(v, list) else v for n, v in made.items()}


def _check_kinds(group: _Group, dtype: torch.dtype) -> None:
    """Raises UsageError for integers, or bytes, in the place of floats: codes without a scale."""
    for _, one in group.members:
        is_float = one.dtype.is_floating_point and one.dtype.itemsize > 1
        if one.is_plain and dtype.is_floating_point and not is_float:
            raise UsageError(
                f"{one.name} is stored as {str(one.dtype).removeprefix('torch.')} "
                f"{list(one.shape)}, in a way that quantization_config of config.json does not say"
            )


class Renaming:
    """transformers' names of stored tensors for a model, which may be without storage."""

    def __init__(self, model: CausalLM) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.converters = {p: rule for rule in converters for p in rule.source_patterns}
        self._converters = converters
        self.prefix, self.state = model.base_model_prefix, model.state_dict()

    def __call__(self, name: str) -> tuple[str, str | None]:
        """The model's name of a stored tensor, and the pattern of the converter it goes through."""
        from transformers.core_model_loading import rename_source_key

        found, pattern = rename_source_key(
            name, self.renamings, self._converters, self.prefix, self.state
        )
        if found not in self.state and name in self.state:
            found, pattern = rename_source_key(name, [], [], self.prefix, self.state)
        return found, pattern


class Weights:
    """What a model's tensors are made of. `model` needs shapes only; `dtype` is its 16-bit type.

    groups   name of a tensor of the model -> what makes it
    carried  stored tensors that the model's class does not take

    Raises UsageError for tensors that have no plain value, or do not fit the model.
    """

    def __init__(
        self,
        model: CausalLM,
        files: Files,
        quantization: Mapping[str, Any] | None,
        dtype: torch.dtype,
        headers: Headers | None = None,
    ) -> None:
        from transformers.core_model_loading import dot_natural_key

        self.model, self.files, self.dtype = model, files, dtype
        self.quantization = dict(quantization) if quantization else None
        stored = stored_tensors(files.headers if headers is None else headers, quantization)
        rename = Renaming(model)
        groups: dict[str, _Group] = {}
        self.carried: list[Stored] = []
        for one in sorted(stored, key=lambda s: dot_natural_key(s.name)):
            name, pattern = rename(one.name)
            if name not in rename.state:
                self.carried.append(one)
                continue
            converter = None if pattern is None else rename.converters[pattern]
            group = groups.setdefault(name, _Group(name, converter))
            group.members.append((pattern or one.name, one))
        self.groups = self._targets(groups.values(), rename.state)

    @property
    def carried_parts(self) -> list[str]:
        """Names of the stored tensors that are carried."""
        return [part for one in self.carried for part in one.parts]

    def _targets(self, groups: Iterable[_Group], state: Mapping[str, Tensor]) -> dict[str, _Group]:
        found: dict[str, _Group] = {}
        for group in groups:
            _check_kinds(group, state[group.first].dtype)
            shapes = [torch.empty(s.shape, device="meta") for _, s in group.members]
            with plain_errors(f"{group.first} cannot be made of {group.members[0][1].name}"):
                made = group.convert(self.model, shapes)
            for name, value in made.items():
                if name not in state:
                    continue
                if value.shape != state[name].shape:
                    raise UsageError(
                        f"{name} has another shape than config.json says, "
                        f"{list(state[name].shape)}: got {list(value.shape)} "
                        f"({self.files.places[group.members[0][1].parts[0]]})"
                    )
                found[name] = group
        return found

    def missing(self) -> list[str]:
        """Tensors of the model that nothing makes; transformers may know why."""
        return sorted(set(self.model.state_dict()) - set(self.groups))

    @cached_property
    def is_plain(self) -> bool:
        """Whether no tensor of the files is quantized."""
        return all(one.is_plain for group in self.groups.values() for _, one in group.members)

    def is_stored_plain(self, name: str) -> bool:
        """Whether what makes a tensor of the model is not quantized."""
        return all(one.is_plain for _, one in self.groups[name].members)

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """What a tensor of the model is kept in: the files' own type, 16 bits where quantized."""
        return self._dtypes.get(name)

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        found = {}
        for name, group in self.groups.items():
            kinds = {one.dtype if one.is_plain else self.dtype for _, one in group.members}
            found[name] = kinds.pop() if len(kinds) == 1 else self.dtype
        return found

    def parts(self, name: str) -> list[str]:
        """Names of the stored tensors that a tensor of the model is made of."""
        return [part for _, one in self.groups[name].members for part in one.parts]

    def nbytes(self, name: str) -> int:
        """Bytes of the stored tensors that a tensor of the model is made of."""
        return self.files.nbytes(self.parts(name))

    def plain(self, one: Stored) -> Tensor:
        """The plain value of a stored tensor: as it is, or in 16 bits where it is quantized."""
        value = one.plain(self.files.read)
        return value if one.is_plain else value.to(self.dtype)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A tensor of the model, and those that are made together with it, in their own types."""
        group = self.groups[name]
        made = group.convert(self.model, [self.plain(one) for _, one in group.members])
        return {n: v.contiguous() for n, v in made.items() if n in self.groups}

    def tensor(self, name: str) -> Tensor:
        return self.tensors(name)[name]

    def _stored_linear(
        self, linear: str, is_expert: bool
    ) -> tuple[Stored, Callable[[Tensor], Tensor]] | None:
        """What holds a linear's weight, and which part of it; None for what is not that simple."""
        if not is_expert:
            group = self.groups.get(f"{linear}.weight")
            if group is None or group.converter is not None:
                return None
            return group.members[0][1], lambda rows: rows
        module, expert, projection = split_expert_name(linear)
        layout = layout_of(self.model.get_submodule(module))
        assert layout is not None
        group = self.groups.get(f"{module}.{layout.stack(projection)}")
        if group is None:
            return None
        if group.converter is None:
            one = group.members[0][1]
            part = functools.partial(_of_expert, layout, expert, projection)
            return (one, part) if isinstance(one, GptOss) else None
        patterns = list(dict.fromkeys(pattern for pattern, _ in group.members))
        joins_two = layout.joins(projection)  # gate and up, in this order
        if layout.interleaved or len(patterns) != 1 + joins_two:
            return None
        wanted = patterns[joins_two and projection != layout.projections[0]]
        members = [one for pattern, one in group.members if pattern == wanted]
        return (members[expert], lambda rows: rows) if expert < len(members) else None

    def kept_format(self, linear: str, is_expert: bool) -> Format | None:
        """The format of ours that a linear is stored in, as far as shapes tell."""
        found = self._stored_linear(linear, is_expert)
        return None if found is None else found[0].format()

    def kept(self, linear: str, is_expert: bool) -> Kept | None:
        """Codes and scales of a linear as they are stored, where a format of ours has them."""
        found = self._stored_linear(linear, is_expert)
        kept = None if found is None else found[0].kept(self.files.read)
        if found is None or kept is None:
            return None
        of_linear = found[1]
        return Kept(kept.format, kept.packed.map(lambda _, tensor: of_linear(tensor).contiguous()))


def _of_expert(layout: Layout, expert: int, projection: str, stack: Tensor) -> Tensor:
    return layout.part(stack[expert], projection)
