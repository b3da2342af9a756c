"""Patches of others' functions end with their `with`, whatever ends it."""

from __future__ import annotations

import ast
import types
from pathlib import Path

import pytest
from torch import nn

import mixbits
from mixbits.model.replaced import replaced


def test_what_was_there_comes_back() -> None:
    module = types.ModuleType("other")
    module.value = 1  # type: ignore[attr-defined]
    with pytest.raises(KeyError), replaced(module, "value", 2), replaced(module, "value", 3):
        assert vars(module)["value"] == 3
        raise KeyError
    assert vars(module)["value"] == 1


def test_a_method_of_the_class_shows_again() -> None:
    linear = nn.Linear(2, 2)
    before = linear.forward
    with replaced(linear, "forward", lambda x: x):
        assert linear(5) == 5
    assert "forward" not in vars(linear)
    assert linear.forward == before


def test_none_is_a_value_like_others() -> None:
    owner = types.SimpleNamespace(config=None)
    with replaced(owner, "config", 1):
        assert owner.config == 1
    assert owner.config is None


def test_the_product_patches_by_no_testing_tool() -> None:
    for path in Path(mixbits.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not any(str(n).startswith("unittest") for n in names), path
