"""Packed folders of tiny models, to be exported: columns are whole groups of 32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixbits.checkpoint.saving import save
from mixbits.export.__main__ import main
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Recipe, ScaleMode
from mixbits.model.layout import find_linears
from mixbits.runtime.fake import fake_quantize_model
from mixbits.source.source import Source, open_source

SIZES = {"intermediate_size": 160, "vocab_size": 160}
IDS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def packed(
    tmp_path: Path,
    schemes: str = "MXFP4A16,MXFP8A16,BF16",
    kind: str = "llama",
    mode: ScaleMode = "even",
    head: bool = True,
    recipes: dict[str, Recipe] | None = None,
    change: Callable[[Path], None] = lambda _: None,
    **overrides: object,
) -> tuple[Source, dict[str, Recipe], Path]:
    """A model, how its linears are packed (schemes in turn, then `recipes`), and its folder.

    `change` is what to do to the model's folder before.
    """
    source = open_source(str(make_model(tmp_path / "model", kind, **{**SIZES, **overrides})))
    if kind == "qwen2":
        _fill_biases(source.path)
    change(source.path)
    linears = find_linears(source.load(), include_head=head)
    parsed = [parse_recipe(name, act_scale_mode=mode) for name in schemes.split(",")]
    assignment: dict[str, Recipe] = {
        info.name: parsed[i % len(parsed)] for i, info in enumerate(linears)
    }
    assignment |= recipes or {}
    folder = tmp_path / "packed"
    folder.mkdir()
    modes = {"weight_scale_mode": "floor", "act_scale_mode": mode}
    save(folder, source, source.load(), linears, assignment, modes)
    return source, assignment, folder


def _fill_biases(folder: Path) -> None:
    """They begin as zeros, which would hide a bias that is lost."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    model.save_pretrained(folder)


def export(folder: Path, name: str, *more: str) -> Path:
    """The folder that `python -m mixbits.export` writes."""
    out = folder.parent / f"{name}-{len(list(folder.parent.iterdir()))}"
    assert main([str(folder), "--format", name, "--out", str(out), *more]) == 0
    return out


def loaded(folder: Path, dtype: Any = "auto", **options: Any) -> Any:
    """What transformers makes of an exported folder, of which it must need every tensor."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **options
    )
    assert not any(info.values())
    return model.eval()


def fake_model(source: Source, assignment: dict[str, Recipe]) -> Any:
    model = source.load()
    fake_quantize_model(model, assignment)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(IDS).logits.float()
    return out
