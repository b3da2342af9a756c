"""What lies beside a model's weights, and comes along: processors, templates, code, licences."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ..files.io import lies_within

# Not copied: weights in whatever form, and what speaks of them alone.
_WEIGHT_FILES: tuple[str, ...] = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_WEIGHT_FILES += (".gguf", ".onnx", ".onnx_data", ".npz", ".pkl", ".pickle", ".ot", ".index.json")
_OF_THE_SOURCE = {"config.json", "quantize_config.json", "quant_config.json", "recipe.yaml"}
_OF_THE_SOURCE |= {"hf_quant_config.json", "mixbits-export.json", "README.md", "plan.json"}
_OF_THE_SOURCE |= {"mixbits-manifest.json"}
_OF_THE_SOURCE |= {"scores.json", "report.json", "report.html", "curve.csv", "curve.svg"}
_OF_THE_SOURCE |= {"curve.png"}  # of older versions


def copy_companions(source: Path, folder: Path) -> None:
    """Everything beside the weights: tokenizer, processor, templates, code, licences.

    Not weights, their indices, nor reports; no hidden files, nor links that lead out of the model's
    folder (of the hub's cache, out of that model's); no folders that are links, models or outputs.
    """
    for path in companions(source):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(path, copy)


def companions(folder: Path, top: Path | None = None) -> Iterator[Path]:
    """The files that `copy_companions` copies, sorted."""
    top = folder if top is None else top
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not lies_within(path, top):
            continue
        if path.is_dir():
            if not (path.is_symlink() or path.name == "__pycache__" or _is_a_model(path)):
                yield from companions(path, top)
        elif path.is_file() and not _speaks_of_weights(path.name):
            yield path


def _is_a_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "plan.json", "report.json"))


def _speaks_of_weights(name: str) -> bool:
    return name in _OF_THE_SOURCE or name.lower().endswith(_WEIGHT_FILES)
