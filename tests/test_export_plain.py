"""Back to 16 bits: what transformers loads by itself is the packed model, its activations whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import export, logits, packed
from tiny import read
from transformers import AutoModelForCausalLM

import mixbits
from mixbits.formats import Mixed, Recipe, parse_scheme
from mixbits.model import find_linears
from mixbits.source import open_source

A16 = "MXFP4A16,W4A16G32,BF16,W8A16G32ASYM,MXFP8A16,W2A16G32"


def loaded(folder: Path, **options: Any) -> Any:
    """By transformers alone; every tensor is there and taken."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def slabs(source: Path, head: bool) -> dict[str, Recipe]:
    """Orders, stored and folded; rotations; several schemes in a linear."""
    numbers = random.Random(0)
    low, high = parse_scheme("MXFP4A16"), parse_scheme("W8A16G32")
    found: dict[str, Recipe] = {}
    for i, info in enumerate(find_linears(open_source(str(source)).load(), include_head=head)):
        order = tuple(numbers.sample(range(info.in_features), info.in_features))
        segments = ((high, 32), (low, info.in_features - 32))
        folded = info.name.endswith("down_proj") and i % 2 == 0
        found[info.name] = Mixed(segments, order if i % 3 else None, i % 4 == 1, folded)
    return found


CASES: dict[str, tuple[str, bool, bool, dict[str, Any]]] = {  # kind, head, slabs, overrides
    "llama": ("llama", True, False, {}),
    "llama tied": ("llama", False, False, {"tie_word_embeddings": True}),
    "llama untied by us": ("llama", True, False, {"tie_word_embeddings": True}),
    "llama slabs": ("llama", True, True, {}),
    "qwen2 biases, slabs": ("qwen2", False, True, {}),
    "mixtral": ("mixtral", True, False, {}),
    "qwen3_moe slabs": ("qwen3_moe", False, True, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_without_mixbits(case: str, tmp_path: Path) -> None:
    kind, head, in_slabs, overrides = CASES[case]
    recipes: dict[str, Recipe] = {}
    change: Callable[[Path], None] = lambda f: recipes.update(slabs(f, head)) if in_slabs else None  # noqa: E731
    source, _, folder = packed(
        tmp_path, A16, kind, head=head, recipes=recipes, change=change, **overrides
    )
    exact, rounded = export(folder, "plain", "--dtype", "float32"), export(folder, "plain")
    config = read(rounded / "config.json")
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    expected = logits(mixbits.load(folder, dtype=torch.float32))
    got = logits(loaded(exact))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    # In the model's own dtype each weight is the nearest to what the packed one stands for.
    plain, model = loaded(rounded).state_dict(), loaded(exact).state_dict()
    assert (
        plain.keys()
        == model.keys()
        == loaded(source.path).state_dict().keys()
        | ({"lm_head.weight"} if case == "llama untied by us" else set())
    )
    for name, value in plain.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, model[name].to(torch.bfloat16))
