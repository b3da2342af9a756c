"""What the files of a packed checkpoint hold, compared with what its config.json says.

`quantization_config` has a checksum of all values and recipes, in whatever files they lie, so that
what reads a checkpoint notices any damage.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, plain_errors
from ..files.io import read_object
from ..formats.schemes import Assignment
from ..model.layout import LinearInfo, find_linears, meta_model
from ..source.source import Source
from ..source.stored import Header
from ..source.weights import DTYPE_NAMES, DTYPES, Files, Renaming, Weights
from .folder import TensorSpec, checksum, file_crcs, layout_of_output, tensor_specs, tied_copies


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
) -> Stock:
    """The tensors of `model` with linears packed by `recipes`: files hold these, and no others.

    `model` has shapes only, and its linears still; `quantization` is the `quantization_config`. A
    model of another class than config.json says, such as the text part of one that also sees, may
    leave some of the files' tensors aside.
    Raises UsageError that names the tensor that is missing, too many, or of another dtype or
    shape; or that says that values are not those that were written.
    """
    folder, opened = files[0].parent, Files(files)
    config = read_object(folder / "config.json")
    is_part = type(model).__name__ not in (config.get("architectures") or [type(model).__name__])
    where = Place(str(folder), plain_dtype(folder), Renaming(model) if is_part else None)
    stock = check_tensors(model, recipes, opened, quantization, where)
    actual = checksum((crc for path in files for crc in file_crcs(path)), quantization)
    if actual != quantization.get("checksum"):
        raise UsageError(
            "values and schemes of a checkpoint must have the checksum in config.json, "
            f"{quantization.get('checksum')}: got {actual}; a file was damaged or edited, or is of "
            f"another checkpoint ({folder})"
        )
    return stock


@dataclass(frozen=True)
class Place:
    """A checkpoint's folder, for messages; its 16-bit type; and the names of a model that is a
    part of it, None for all of it.
    """

    folder: str
    dtype: torch.dtype
    rename: Renaming | None = None


def check_tensors(
    model: Any, recipes: Assignment, opened: Files, quantization: Mapping[str, Any], place: Place
) -> Stock:
    """`check_files` but for values: names, dtypes and shapes of tensors."""
    rename, folder = place.rename, place.folder
    recipes = {_renamed(rename, name): recipe for name, recipe in recipes.items()}
    linears = find_linears(model, include_head=True, by_use=False)
    unknown = sorted(set(recipes) - {info.name for info in linears})
    if unknown:
        raise UsageError(
            f"quantization_config names a linear that the model lacks: {unknown[0]} ({folder})"
        )
    tied = sorted(tied_copies(model) & {f"{name}.weight" for name in recipes})
    if tied:
        raise UsageError(f"config.json ties {tied[0]}, which has packed weights ({folder})")
    stock = _stock(model, linears, recipes, opened, quantization, place.dtype)
    stock = replace(stock, is_part=rename is not None)
    expected = {
        _renamed(rename, s.name) if s.as_stored else s.name: (DTYPE_NAMES[s.dtype], s.shape)
        for s in stock.specs
    }
    found = {
        _renamed(rename, n): (DTYPE_NAMES[h.dtype], h.shape) for n, h in opened.headers.items()
    }
    for name in sorted(expected.keys() if rename is not None else expected.keys() | found.keys()):
        wanted, got = (
            f"{t[name][0]} {list(t[name][1])}" if name in t else "none" for t in (expected, found)
        )
        if wanted != got:
            raise UsageError(
                f"the tensors of a checkpoint must be those that config.json says: {name} must be "
                f"{wanted}: got {got} ({folder})"
            )
    return stock


def rehearse(
    source: Source, shapes: Any, linears: Sequence[LinearInfo], assignment: Assignment
) -> None:
    """Raises UsageError where a checkpoint that `saving.save` wrote would not be loaded.

    Nothing is written but a config.json, and nothing read but headers: what is compared with what
    `check_files` will expect are the names, dtypes and shapes that would be written.
    """
    from transformers import AutoConfig

    layout = layout_of_output(source, shapes, linears, assignment)
    opened = Files([])
    with tempfile.TemporaryDirectory(prefix="mixbits-") as folder:
        where = Path(folder)
        opened.headers |= {s.name: Header(s.dtype, s.shape) for s in layout.specs}
        opened.places |= dict.fromkeys(opened.headers, where / "model.safetensors")
        (where / "config.json").write_text(json.dumps(layout.config), encoding="utf-8")
        for code in source.path.glob("*.py"):
            shutil.copyfile(code, where / code.name)
        with plain_errors(f"a quantized {source.path} could not be loaded again"):
            config = AutoConfig.from_pretrained(where, trust_remote_code=source.trust_remote_code)
            model = meta_model(config, source.trust_remote_code)
            place = Place(f"as {source.path} would be written", plain_dtype(where))
            packed = {name: recipe for name, recipe in assignment.items() if recipe.packed}
            check_tensors(model, packed, opened, layout.quantization, place)


@dataclass(frozen=True)
class Stock:
    """What the files of a checkpoint hold, as a model of some class has it.

    left     the source's own quantized weights, which are to be made plain; None: there are none
    is_part  whether the model is of another class than the checkpoint, such as its text part
    """

    specs: list[TensorSpec]
    recipes: Assignment
    files: Files
    left: Weights | None
    is_part: bool = False


def _stock(
    model: Any,
    linears: Sequence[LinearInfo],
    recipes: Assignment,
    files: Files,
    quantization: Mapping[str, Any],
    dtype: torch.dtype,
) -> Stock:
    kinds, carried = quantization.get("dtypes") or {}, quantization.get("carried") or []
    stored, left = quantization.get("stored") or {}, None
    names = list(stored.get("tensors") or [])
    for name in [*names, *carried]:
        if name not in files.headers:
            raise UsageError(f"a tensor of quantization_config is in no file: {name}")
    if names:
        headers = {name: files.headers[name] for name in names}
        left = Weights(model, files, stored.get("quantization_config"), dtype, headers)
    made = set() if left is None else set(left.groups)
    specs = [
        replace(s, dtype=_kind(kinds[s.name])) if s.name in kinds and s.is_plain else s
        for s in tensor_specs(model, linears, recipes, dtype)
        if s.name not in made
    ]
    specs += [TensorSpec(n, *files.headers[n], as_stored=True) for n in [*names, *carried]]
    return Stock(specs, recipes, files, left)


def _kind(name: Any) -> torch.dtype:
    if name not in DTYPES:
        raise UsageError(f"dtypes of quantization_config must be of safetensors: got {name!r}")
    return DTYPES[name]


def _renamed(rename: Renaming | None, name: str) -> str:
    """What a model calls a tensor, or a linear, of the files."""
    if rename is None:
        return name
    for suffix in ("", ".weight"):
        found = rename(name + suffix)[0].removesuffix(suffix)
        if found != name or name + suffix in rename.state:
            return found
    return name
