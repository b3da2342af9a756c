"""What arguments, and config.json read by hand, tell: asked before torch is imported.

That takes seconds, and transformers more; a wrong word is seen at once. What needs a model's shapes
is asked by `mixbits.pipeline.feasibility`.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files.atomic import check_destination, recover
from ..files.io import read_object
from ..formats.menus import MENUS
from ..formats.schemes import ROW, parse_scheme
from ..measuring.hub_data import check_datasets
from ..source.model_files import already_quantized, check_name
from .settings import Settings

_TASKS = Path(__file__).parent.parent / "demo" / "tasks"
_SIZES = {"hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim"}
_GPUS = ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")
_KEYS = re.compile(r"(?:task|group|tag)s?\s*:|-\s")  # of a YAML line that may name a task


def check_seqlen(settings: Settings, longest: Any) -> None:
    """Raises UsageError for sequences that are longer than a model's positions."""
    if isinstance(longest, int) and longest and settings.seqlen > longest:
        raise UsageError(
            f"--seqlen must be at most {longest} for this model: got {settings.seqlen}"
        )


def check(settings: Settings) -> None:
    """Raises UsageError for what needs no model to be known as wrong.

    What a killed run has left of the output is put right before.
    """
    if not settings.dry_run:
        recover(settings.folder)
    for name in settings.schemes or ():
        parse_scheme(name)
    settings.kept()
    check_name(str(settings.model))
    if not settings.dry_run:
        check_destination(settings.folder, settings.overwrite, inputs(settings))
        _check_inputs(settings)
    _check_config(settings)
    if settings.tasks and not (settings.dry_run or settings.solve_only):
        _check_tasks(list(settings.tasks), settings.include_path)


def inputs(settings: Settings) -> list[Path]:
    """What the run reads, as far as it is files: the output does not replace it."""
    names = (
        settings.model,
        *(settings.dataset or ()),
        *(settings.eval_dataset or ()),
        settings.plan,
        settings.scores,
        settings.include_path,
    )
    return [Path(name) for name in names if name]


def _check_inputs(settings: Settings) -> None:
    for path in (settings.scores, settings.plan):
        if path is not None:
            try:
                path.stat()
            except OSError as error:
                raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if not settings.demo:
        check_datasets("--dataset", settings.dataset or ())
        check_datasets("--eval-dataset", settings.eval_dataset or ())


def _check_config(settings: Settings) -> None:
    folder = Path(str(settings.model))
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
    check_seqlen(settings, text.get("max_position_embeddings"))
    _check_bits(settings, text)


def _check_bits(settings: Settings, config: dict[str, Any]) -> None:
    """Raises UsageError for fewer bits than any scheme has, where the range is the same for all.

    It is where whole groups fill all rows, as far as sizes in a configuration tell; the others are
    left to `feasibility.check_budget`.
    """
    is_varied = settings.keep or settings.quantize_lm_head or settings.slabs
    if settings.avg_bits is None or not settings.asks_budget or is_varied:
        return
    if not settings.schemes and (settings.target or settings.scores):
        return
    if not settings.schemes and settings.device is None and any(map(os.path.exists, _GPUS)):
        return  # torch is to say whether it can compute there
    names = settings.schemes or MENUS[settings.default_menu[0]]
    schemes = [parse_scheme(name) for name in names]
    groups = [s.weight.group_size for s in schemes if s.weight is not None]
    sizes = [v for k, v in config.items() if k in _SIZES and isinstance(v, int)]
    # A scale per row weighs the less the longer the row is.
    if not sizes or ROW in groups or any(value % group for value in sizes for group in groups):
        return
    width = 128 * 32  # columns that all groups divide
    bits = [s.storage_bits(1, width, settings.ignore_scale_bits) / width for s in schemes]
    if settings.avg_bits < min(bits):
        raise UsageError(
            f"--avg-bits must be between {min(bits):g} and {max(bits):g} for these schemes: "
            f"got {settings.avg_bits:g}"
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
