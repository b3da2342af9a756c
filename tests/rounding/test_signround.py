"""auto-round's tuning of our plans: what it learns is packed as it is, and compared in the gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, add_tokenizer, make_model, read

pytest.importorskip("auto_round")

from mixbits.errors import UsageError
from mixbits.formats.recipes import parse_recipe
from mixbits.measuring.evaluate import sequence_kl
from mixbits.model.layout import find_linears
from mixbits.model.streaming import StreamedModel
from mixbits.rounding.nearest import packed_values
from mixbits.rounding.signround import tune
from mixbits.rounding.whole_model import RoundedModel, round_model
from mixbits.source.source import open_source

SCHEMES = ("MXFP4", "MXFP8", "W4A16", "W4A16ASYM", "W2A16G64", "MXFP4A16", "BF16", "W8A16G32")


def test_tuned_weights_are_packed_and_better_than_nearest(tmp_path: Path) -> None:
    make_model(add_tokenizer(tmp_path), hidden_size=128, intermediate_size=192)
    source = open_source(str(tmp_path))
    linears = find_linears(source.load())
    recipes = {i.name: parse_recipe(SCHEMES[k % 8]) for k, i in enumerate(linears)}
    ids = torch.randint(VOCAB, (8, 32), generator=torch.Generator().manual_seed(3))
    tuned = tune(
        source.load(), source.tokenizer(), linears, recipes, ids, iterations=30, batch_size=8
    )
    assert set(tuned) == {n for n, s in recipes.items() if s.packed}
    model = StreamedModel(source.load())
    nearest = round_model(model, linears, recipes, "rtn")
    moved = 0
    for info in linears:
        if info.name in tuned:
            ours, theirs = (
                packed_values(r[info.name], recipes[info.name], info.in_features)
                for r in (nearest, tuned)
            )
            moved += int((ours != theirs).sum())
    assert moved
    kl = [
        float(sequence_kl(model, RoundedModel(model, linears, recipes, r), ids).mean())
        for r in (tuned, nearest)
    ]
    assert kl[0] < kl[1]


@pytest.mark.parametrize(
    ("kind", "scheme", "what"),
    [
        ("qwen3_moe", "MXFP4", "experts"),
        ("llama", "MXFP8E5M2", "not known to auto-round"),
        ("llama", "MXFP4", "whole MX blocks of 32 columns: got 172"),
    ],
)
def test_what_auto_round_cannot_have(tmp_path: Path, kind: str, scheme: str, what: str) -> None:
    source = open_source(str(make_model(tmp_path, kind)))
    linears = find_linears(source.load())
    recipes = {i.name: parse_recipe(scheme) for i in linears}
    with pytest.raises(UsageError, match=what):
        ids = torch.zeros(2, 8, dtype=torch.int64)
        tune(source.load(), None, linears, recipes, ids, iterations=1, batch_size=8)


@pytest.mark.parametrize("gate", [0, 4])
def test_the_command_ships_the_better_one(
    gate: int, run: Callable[..., int], tmp_path: Path
) -> None:
    model = make_model(add_tokenizer(tmp_path / "model"), intermediate_size=192)
    options = ("--tune", 4, "--rounding", "rtn", "--gate", gate)
    assert run("--avg-bits", 5, *options, model=model) == 0
    report = read(tmp_path / "out" / "report.json")
    rows = (report["gate"] or {}).get("candidates", [])
    names = [row["name"] for row in rows]
    assert (not gate) or {"optimal, tuned", "optimal"} <= set(names)
    is_tuned = not gate or names[0] == "optimal, tuned"
    assert report["rounding"]["method"] == ("signround" if is_tuned else "rtn")
    assert [row["kl"] for row in rows] == sorted(row["kl"] for row in rows)
