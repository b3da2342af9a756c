"""Linears of tiny models, scores that are made up for them, and plans of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import make_model
from transformers import AutoConfig

from mixbits.formats.schemes import parse_scheme
from mixbits.measuring.scores import Scores
from mixbits.model.layout import LinearInfo, find_linears, meta_model
from mixbits.model.units import make_units
from mixbits.pipeline.settings import parse_keep
from mixbits.planning.plan import (
    Budget,
    Plan,
    solve,
    unit_options,
)

MODES = ("floor", "floor")


def linears_of_llama(folder: Path) -> list[LinearInfo]:
    config = AutoConfig.from_pretrained(make_model(folder))
    return find_linears(meta_model(config), include_head=True)


def made_up_scores(linears: list[LinearInfo], names: list[str], **kwargs: Any) -> Scores:
    """Coarser formats hurt more, and later linears more than earlier ones."""
    slabs = {
        info.name: {
            name: [(1 + index) * 2.0 ** -parse_scheme(name).element_bits] * 3 for name in names
        }
        for index, info in enumerate(linears)
    }
    model = {"name": "made up", "sha256": "0" * 64}
    return Scores.build(slabs, linears, "fisher", kwargs.get("modes", MODES), model, {"seed": 0})


def solved(
    linears: list[LinearInfo],
    budget: Budget,
    names: tuple[str, ...] = ("MXFP4", "MXFP8"),
    keep: tuple[str, ...] = (),
    strategy: str = "optimal",
    **units: bool,
) -> Plan:
    grouped = make_units(linears, **units)
    kept = [parse_keep(text, MODES) for text in keep]
    schemes = [parse_scheme(name) for name in names]
    known = list(dict.fromkeys([*names, *(s.name for _, s in kept if s.weight)]))
    options = unit_options(grouped, schemes, kept)
    return solve(grouped, options, made_up_scores(linears, known), budget, strategy)
