"""Weights in large pages are the same weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mixes import packed_copy
from tiny import make_model

from mixbits.formats.recipes import parse_recipe
from mixbits.model.layout import find_linears
from mixbits.runtime.linear import PackedLinear
from mixbits.runtime.pages import use_large_pages
from mixbits.source.source import open_source


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def make(folder, kind="qwen2", **sizes):
    model = open_source(str(make_model(folder, kind, **sizes))).load().requires_grad_(False)
    names = [info.name for info in find_linears(model)][1:]  # one is left alone, as is the head
    return packed_copy(model, dict.fromkeys(names, parse_recipe("W4A16ASYM")))


def test_weights_move_and_stay_what_they_are(tmp_path):
    model = make(tmp_path, intermediate_size=9000, hidden_size=512)
    before = copy.deepcopy(model)
    use_large_pages(model)
    moved = 0
    for (name, old), new in zip(tensors(before).items(), tensors(model).values(), strict=True):
        assert new.dtype == old.dtype and torch.equal(new, old), name
    for linear in model.modules():
        if isinstance(linear, PackedLinear):
            assert linear.weight_packed.data_ptr() % 64 == 0
            moved += linear.weight_packed.nbytes
    assert moved > 2 << 20
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, before(ids).logits)
    assert torch.equal(copy.deepcopy(model)(ids).logits, before(ids).logits)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_the_memory_is_advised(tmp_path):
    model = make(tmp_path, intermediate_size=9000, hidden_size=512)
    use_large_pages(model)
    address = model.model.layers[0].mlp.up_proj.weight_packed.data_ptr()
    flags = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition("-")
        if " " in rest and ":" not in first:
            inside = int(first, 16) <= address < int(rest.split()[0], 16)
        elif line.startswith("VmFlags:") and inside:
            flags = line.split()[1:]
    assert flags is not None and "hg" in flags


def test_a_small_model_stays_where_it_is(tmp_path):
    model = make(tmp_path)
    places = [x.data_ptr() for x in tensors(model).values()]
    use_large_pages(model)
    assert [x.data_ptr() for x in tensors(model).values()] == places
