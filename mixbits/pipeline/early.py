"""What arguments, and config.json read by hand, tell: asked before torch is imported.

That takes seconds, and transformers more; a wrong word is seen at once. What needs a model's shapes
is asked by `mixbits.pipeline.feasibility`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..export.targets import DEFAULT_SCHEMES
from ..files.atomic import check_destination
from ..files.io import read_object
from ..formats.schemes import parse_scheme
from ..measuring.hub_data import _OTHERS, check_dataset
from ..source.model_files import already_quantized, check_name
from .options import parse_keep

_OTHERS |= {".pkl", ".pickle", ".safetensors", ".gguf", ".h5", ".hdf5", ".tfrecord", ".msgpack"}
_OTHERS |= {".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".rar", ".lz4", ".sqlite"}
_OTHERS |= {".db", ".xls", ".xlsx", ".pdf", ".doc", ".docx", ".odt", ".epub"}
_TASKS = Path(__file__).parent.parent / "demo" / "tasks"
_SIZES = {"hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim"}
_KEYS = re.compile(r"(?:task|group|tag)s?\s*:|-\s")  # of a YAML line that may name a task


def check_seqlen(args: argparse.Namespace, longest: Any) -> None:
    """Raises UsageError for sequences that are longer than a model's positions."""
    if isinstance(longest, int) and longest and args.seqlen > longest:
        raise UsageError(f"--seqlen must be at most {longest} for this model: got {args.seqlen}")


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for what needs no model to be known as wrong."""
    for name in args.schemes.split(",") if args.schemes else ():
        parse_scheme(name)
    for text in args.keep:
        parse_keep(text, (args.weight_scale_mode, args.act_scale_mode))
    check_name(args.model)
    if not args.dry_run:
        check_destination(args.out, args.overwrite, inputs(args))
        _check_inputs(args)
    _check_config(args)
    if args.tasks and not (args.dry_run or args.solve_only):
        _check_tasks(args.tasks.split(","), args.include_path)


def inputs(args: argparse.Namespace) -> list[Path]:
    """What the run reads, as far as it is files: the output does not replace it."""
    names = (args.model, args.dataset, args.eval_dataset, args.plan, args.scores, args.include_path)
    return [Path(name) for name in names if name]


def _check_inputs(args: argparse.Namespace) -> None:
    for path in (args.scores, args.plan):
        if path is not None:
            try:
                path.stat()
            except OSError as error:
                raise UsageError(f"cannot read {path}: {error.strerror}") from None
    for source in (args.dataset, args.eval_dataset):
        if source is not None and not args.demo:
            check_dataset(source)


def _check_config(args: argparse.Namespace) -> None:
    folder = Path(args.model)
    if not folder.is_dir():
        return  # the hub's
    if not (folder / "config.json").is_file():
        raise UsageError(f"a model folder must hold config.json: {folder} does not")
    config = read_object(folder / "config.json")
    method = config.get("quantization_config")
    if isinstance(method, dict) and method.get("quant_method") == "mixbits":
        raise already_quantized(folder)
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    check_seqlen(args, text.get("max_position_embeddings"))
    _check_bits(args, text)


def _check_bits(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Raises UsageError for fewer bits than any scheme has, where the range is the same for all.

    It is where whole groups fill all rows, as far as sizes in a configuration tell; the others are
    left to `feasibility.check_budget`.
    """
    is_varied = args.keep or args.quantize_lm_head or args.granularity == "slab"
    if args.avg_bits is None or not args.asks_budget or is_varied:
        return
    if not args.schemes and (args.target or args.scores):
        return
    schemes = [
        parse_scheme(name) for name in (args.schemes or ",".join(DEFAULT_SCHEMES)).split(",")
    ]
    groups = [s.weight.group_size for s in schemes if s.weight is not None]
    sizes = [v for k, v in config.items() if k in _SIZES and isinstance(v, int)]
    if not sizes or any(value % group for value in sizes for group in groups):
        return
    width = 128 * 32  # columns that all groups divide
    bits = [s.storage_bits(1, width, args.ignore_scale_bits) / width for s in schemes]
    if args.avg_bits < min(bits):
        raise UsageError(
            f"--avg-bits must be between {min(bits):g} and {max(bits):g} for these schemes: "
            f"got {args.avg_bits:g}"
        )


def _check_tasks(tasks: list[str], include_path: str | None) -> None:
    """Raises UsageError for a name that stands in no file of lm-eval's, ours, or the user's.

    What does stand somewhere is left to lm-eval.
    """
    if include_path and not Path(include_path).is_dir():
        raise UsageError(f"--include-path must be a folder: {include_path} is none")
    folders = [_TASKS, *([Path(include_path)] if include_path else [])]
    own = _named(folders)
    missing = _missing(tasks, own)
    spec = importlib.util.find_spec("lm_eval") if missing else None
    if spec is None or not spec.submodule_search_locations:
        return  # lm-eval is asked, or said to be missing, later
    known = _named([Path(spec.submodule_search_locations[0]) / "tasks"])
    if missing := _missing(missing, known):
        near = difflib.get_close_matches(missing[0], known | own, 1)
        raise UsageError(
            f"--tasks must name lm-eval tasks: {', '.join(missing)} is none"
            f"{f' ({near[0]}?)' if near else ''}; --include-path adds a folder of your own"
        )


def _missing(tasks: list[str], known: set[str]) -> list[str]:
    return [task for task in tasks if task.strip() not in known]


def _named(folders: list[Path]) -> set[str]:
    """Whatever may be a task in the YAML files of folders: single words after certain keys."""
    found: set[str] = set()
    for folder in folders:
        for where, _, files in os.walk(folder):
            for file in files:
                if file.endswith((".yaml", ".yml")):
                    text = Path(where, file).read_text(encoding="utf-8", errors="replace")
                    found.update(_words(text))
    return found


def _words(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    named = [line for line in lines if _KEYS.match(line)]
    return [word.strip("\"',[]") for line in named for word in re.split(r"[\s:,]+", line)]
