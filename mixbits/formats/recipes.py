"""Recipes as JSON, for config.json: a scheme's name if they are plain, else the segments.

    "MXFP4"
    {"segments": [["MXFP8", 64], ["MXFP4", 128]], "ordered": true, "rotated": false}

An order itself is a tensor of the weight files (`mixbits.formats.pack`), unless the linears before
make the input in it: then it is that of their rows.
"""

from __future__ import annotations

from typing import Any

from .schemes import Recipe, ScaleMode, parse_scheme


def describe(recipe: Recipe) -> Any:
    """The JSON value of a recipe; `parse_recipe` reads it back, but for the order."""
    if recipe.is_plain:
        return recipe.name
    return {
        "segments": [[scheme.name, columns] for scheme, columns in recipe.segments],
        "ordered": bool(recipe.order_bits),
        "rotated": recipe.rotated,
    }


def parse_recipe(
    value: Any, weight_scale_mode: ScaleMode = "floor", act_scale_mode: ScaleMode = "floor"
) -> Recipe:
    """The recipe that a `schemas.RecipeJson` describes.

    Of an order only its being there is known here: a range stands for it (`Recipe.order`).
    Raises UsageError for schemes that are not known.
    """
    modes = weight_scale_mode, act_scale_mode
    if isinstance(value, str):
        return Recipe.plain(parse_scheme(value, *modes))
    segments = tuple((parse_scheme(name, *modes), n) for name, n in value["segments"])
    order = range(sum(n for _, n in segments)) if value["ordered"] else None
    return Recipe(segments, order, value["rotated"])
