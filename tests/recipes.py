"""Recipes for the linears of a model: of every scheme, in segments, and of every kind at once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tiny import make_model

from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Recipe, parse_scheme
from mixbits.model.layout import LinearInfo, find_linears
from mixbits.source.source import open_source

SCHEMES = ["MXFP4", "MXFP8", "W4A16", "W2A16G32ASYM", "BF16", "MXFP8E5M2A16", "W8A16G64ASYM"]


def whole(linears: list[LinearInfo]) -> dict[str, Recipe]:
    """Every scheme in turn."""
    return {info.name: parse_recipe(SCHEMES[i % 7]) for i, info in enumerate(linears)}


def slabs(linears: list[LinearInfo]) -> dict[str, Recipe]:
    """Two schemes in each linear: with and without an order, folded or stored, and rotated."""
    numbers = random.Random(0)
    low, high = parse_scheme("MXFP4"), parse_scheme("MXFP8")
    recipes: dict[str, Recipe] = {}
    for i, info in enumerate(linears):
        order = tuple(numbers.sample(range(info.in_features), info.in_features))
        segments = ((high, 32), (low, info.in_features - 32))
        folded = info.name.endswith("down_proj") and i % 2 == 0
        recipes[info.name] = Recipe(segments, order if i % 3 else None, i % 4 == 1, folded)
    return recipes


MODES = "floor", "even"


def of_every_kind(linears: list[Any]) -> dict[str, Recipe]:
    """Every kind of recipe in turn; columns of some are ordered and rotated."""
    mxfp4, mxfp8, w4 = (parse_scheme(s, *MODES) for s in ("MXFP4", "MXFP8", "W4A16G32"))
    found: dict[str, Recipe] = {}
    for number, info in enumerate(linears):
        columns = info.in_features
        order = tuple(reversed(range(columns)))
        found[info.name] = [
            Recipe.plain(mxfp4),
            Recipe(((mxfp8, 32), (mxfp4, columns - 32)), order),
            Recipe.plain(w4),
            Recipe(((mxfp4, columns),), None, rotated=True),
            Recipe(((parse_scheme("W8A16G32"), 32), (w4, columns - 32)), order, rotated=True),
        ][number % 5]
        if info.name.endswith("down_proj"):  # its order goes into the rows of gate and up
            found[info.name] = Recipe(
                ((mxfp8, 32), (mxfp4, columns - 32)), order, True, order_in_producer=True
            )
    return found


def opened(folder: Path, kind: str) -> tuple[Any, Any, list[Any], dict[str, Recipe], torch.Tensor]:
    source = open_source(str(make_model(folder, kind)))
    model = source.load()
    linears = find_linears(model, include_head=True)
    ids = torch.randint(0, 130, (12, 32))
    return source, model, linears, of_every_kind(linears), ids
