"""Recipes as JSON, for config.json: a scheme's name, or the segments of a `Mixed`.

    "MXFP4"
    {"segments": [["MXFP8", 64], ["MXFP4", 128]], "ordered": true, "rotated": false}

An order itself is a tensor of the weight files (`mixbits.pack`).
"""

from __future__ import annotations

from typing import Any

from .formats import Mixed, Recipe, ScaleMode, UsageError, parse_scheme


def describe(recipe: Recipe) -> Any:
    """The JSON value of a recipe; `parse_recipe` reads it back, but for the order."""
    if not isinstance(recipe, Mixed):
        return recipe.name
    return {
        "segments": [[scheme.name, columns] for scheme, columns in recipe.segments],
        "ordered": recipe.order is not None,
        "rotated": recipe.rotated,
    }


def parse_recipe(value: Any, weight_scale_mode: ScaleMode, act_scale_mode: ScaleMode) -> Recipe:
    """The recipe that a JSON value describes; an order is a placeholder, the natural one.

    Raises UsageError for anything else.
    """
    modes = weight_scale_mode, act_scale_mode
    if isinstance(value, str):
        return parse_scheme(value, *modes)
    try:
        segments = tuple((parse_scheme(name, *modes), int(n)) for name, n in value["segments"])
        order = tuple(range(sum(n for _, n in segments))) if value["ordered"] else None
        return Mixed(segments, order, bool(value["rotated"]))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            "a recipe must be a scheme's name, or hold segments, ordered and rotated: "
            f"got {value!r}"
        ) from None
