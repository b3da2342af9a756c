"""What a file is refused with; and files that are as they should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mixbits.checkpoint.folder import quantization_config
from mixbits.errors import UsageError
from mixbits.formats.recipes import parse_recipe
from mixbits.formats.schemes import Recipe, parse_scheme


def sentence(call: Callable[[], object]) -> str:
    """What a call refuses with."""
    with pytest.raises(UsageError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and 10 < len(said) < 700
    return said


CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def packed_config() -> dict[str, Any]:
    mixed = Recipe(((parse_scheme("MXFP8"), 32), (parse_scheme("MXFP4"), 32)), tuple(range(64)))
    modules = {"a": parse_recipe("W4A16"), "b": mixed}
    told = {**quantization_config(modules, {}), "checksum": "00000000"}
    return {"model_type": "llama", "quantization_config": told}
