"""A model's folder, looked at before anything opens what is in it.

Git and archives keep links, pipes and whatever sizes; transformers opens what has a name that it
knows, and builds as many layers as config.json says. So every file that is going to be read must
be a regular one that lies in the folder, configurations must be JSON objects, and the numbers of
layers and experts must be such as there are, or as the weight files have tensors for.

What is only copied is another matter: `mixbits.source.companions` leaves out what links lead to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files.io import check_file, lies_within, read_object

WHOLE = "model.safetensors"
TOKENIZER_BYTES = 128 << 20  # those of 250,000 tokens take 35 MB
_HEADER_BYTES = 100_000_000  # the most that safetensors reads
_MOST_LAYERS = 512  # without tensors for more; published models have up to 130
_MOST_EXPERTS = 1 << 17  # the same, of all layers together: Kimi-K2 has 23,000

# What transformers, tokenizers or we open by name. Tokenizers of other kinds than JSON are few.
_READ = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt")
_TEMPLATES = "additional_chat_templates"
_OBJECTS = re.compile(r"(.*_)?(config|tokens_map|tokens|template)\.json")
_TOKENIZERS = re.compile(r"tokenizer\.json|vocab\..*|tekken\.json|merges\.txt|.*\.(model|tiktoken)")
# Keys of JSON files that make transformers open other files than the usual.
_REDIRECTS = ("configuration_files", "fast_tokenizer_files", "transformers_weights")
_LAYERS = re.compile(r"(.*_)?(n|num)_(.*_)?(layers?|blocks|stages)|(.*_)?(layers|depth)")
_EXPERTS = re.compile(r"(.*_)?(n|num)_(.*_)?experts|num_labels")  # a name is made for each label


def check_folder(folder: Path, code: bool = False) -> None:
    """Raise UsageError, in one sentence that names the file, for what must not be read.

    `code`: whether Python files are going to be, as well.
    """
    for path in _read_from(folder, code):
        is_tokenizer = _TOKENIZERS.fullmatch(path.name)
        check_inside(path, folder, TOKENIZER_BYTES if is_tokenizer else None)
        if _OBJECTS.fullmatch(path.name):
            data = read_object(path)
            _check_object(path, data)
            if path.name == "config.json":
                check_counts(folder, data)
    index = folder / f"{WHOLE}.index.json"
    if index.exists() and not (folder / WHOLE).exists():
        indexed(index)


def check_inside(path: Path, folder: Path, most: int | None = None) -> None:
    """Raise UsageError unless a path is a regular file of at most `most` bytes in the folder."""
    check_file(path, most)
    if not lies_within(path, folder):
        raise UsageError(
            f"files of a model must lie in its folder: {path} leads to {path.resolve()}"
        )


def _read_from(folder: Path, code: bool) -> Iterator[Path]:
    """What is there by the names that are read: links that lead nowhere are not there."""
    patterns = [*_READ, *(["*.py"] if code else []), f"{_TEMPLATES}/*.jinja"]
    for pattern in patterns:
        yield from (path for path in sorted(folder.glob(pattern)) if path.exists())


def _check_object(path: Path, data: dict[str, Any]) -> None:
    for key in _REDIRECTS:
        named = data.get(key)
        for name in named if isinstance(named, list) else [named]:
            if name is not None and (not isinstance(name, str) or Path(name).name != name):
                raise UsageError(
                    f"{key} must name files beside {path.name}: got {name!r:.80} ({path})"
                )


def indexed(index: Path) -> list[Path]:
    """The files that a weight index names. Raises UsageError for one outside of its folder."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise UsageError(f"weight_map must map tensors to files ({index})")
    names = sorted(set(places.values()))
    for name in names:
        path = index.parent / name
        inside = Path(name).name == name and path.is_file() and lies_within(path, index.parent)
        if not inside:
            raise UsageError(
                f"a weight file must lie beside the index that names it: {name!r:.160} of {index}"
            )
    if not names:
        raise UsageError(f"weight_map must name a file: got none ({index})")
    return [index.parent / name for name in names]


def check_counts(folder: Path, config: dict[str, Any]) -> None:
    """Raise UsageError for more layers, or experts, than config.json can mean.

    transformers makes a module for each, and lists of them, before anything else is known.
    """
    found = list(_counts(config))
    layers = max([(n, key) for n, key in found if _LAYERS.fullmatch(key)], default=(0, ""))
    experts = max([(n, key) for n, key in found if _EXPERTS.fullmatch(key)], default=(0, ""))
    if layers[0] <= _MOST_LAYERS and experts[0] * max(layers[0], 1) <= _MOST_EXPERTS:
        return
    tensors = sum(_tensor_count(file) for file in sorted(folder.glob("*.safetensors")))
    for most, what, (count, key) in (
        (_MOST_LAYERS, layers[0], layers),
        (_MOST_EXPERTS, experts[0] * max(layers[0], 1), experts),
    ):
        if what > max(most, tensors):
            raise UsageError(
                f"{key} of config.json must be such that the weight files, which have "
                f"{tensors:,} tensors, can hold them: got {count!r:.40} ({folder})"
            )


def _counts(config: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """All numbers of a configuration, those of its parts among them, with their keys."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif isinstance(value, int | float):
            yield value, key


def _tensor_count(path: Path) -> int:
    """How many tensors the header of a safetensors file tells of; 0 where it has none."""
    check_file(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= _HEADER_BYTES else b""
    try:
        return len(json.loads(header))
    except (ValueError, RecursionError, TypeError):
        return 0


def check_name(model: str) -> None:
    """Raises UsageError for what is neither a folder nor a Hugging Face name."""
    path = Path(model)
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or path.exists()
    if not path.is_dir() and is_path:
        raise UsageError(f"MODEL must be a folder or a Hugging Face name: {model} is no folder")


def already_quantized(path: Path) -> UsageError:
    return UsageError(f"the model in {path} is quantized by mixbits already: pass the original")
