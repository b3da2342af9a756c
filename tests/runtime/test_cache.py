"""A cache that grows in place holds what transformers' own holds, and never writes what it gave."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from mixbits.runtime.cache import GrowingLayer, growing_layers


def tokens(count, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, count, 4, generator=generator), torch.randn(
        batch, 3, count, 5, generator=generator
    )


def pair():
    """The same tokens in transformers' cache and in one whose layers grow."""
    caches = DynamicCache(), DynamicCache()
    for cache in caches:
        for layer in range(2):
            cache.update(*tokens(7, seed=layer), layer)
    assert growing_layers(caches[1]) is caches[1].layers
    return caches


def assert_same(plain, growing):
    assert plain.get_seq_length() == growing.get_seq_length()
    for a, b in zip(plain.layers, growing.layers, strict=True):
        assert type(b) is GrowingLayer
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


CHANGES = {
    "grow": lambda cache: [cache.update(*tokens(n, seed=n), 0) for n in (1, 1, 3, 70, 1)],
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(1),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "reset": lambda cache: cache.reset(),
    "write": lambda cache: setattr(cache.layers[0], "keys", cache.layers[0].keys * 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_that_of_transformers(name):
    plain, growing = pair()
    for cache in (plain, growing):
        for layer in range(2):
            cache.update(*tokens(1, seed=9), layer)
        CHANGES[name](cache)
        for number in range(2):
            outs = [cache.update(*tokens(1, seed=10 + number), layer) for layer in range(2)]
    assert_same(plain, growing)
    assert torch.equal(outs[1][0], plain.layers[1].keys)


def test_growing_copies_rarely():
    _, cache = pair()
    places = set()
    for number in range(300):
        keys, _ = cache.update(*tokens(1, seed=number), 0)
        places.add(keys.data_ptr())
    assert len(places) <= 5  # by half each time, from 71 on


@pytest.mark.parametrize("name", ["crop", "reorder", "select", "write"])
def test_what_was_handed_out_is_not_written_again(name):
    _, cache = pair()
    keys, values = cache.update(*tokens(1, seed=1), 0)
    before = keys.clone(), values.clone()
    CHANGES[name](cache)
    cache.update(*tokens(4, seed=2), 0)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_a_layer_grow_apart(copied):
    _, cache = pair()
    layer = cache.layers[0]
    layer.update(*tokens(1, seed=1))
    other = copied(layer)
    keys, _ = layer.update(*tokens(1, seed=2))
    other_keys, _ = other.update(*tokens(1, seed=3))
    assert torch.equal(keys[:, :, :8], other_keys[:, :, :8])
    assert torch.equal(keys[:, :, 8:], tokens(1, seed=2)[0])
    assert torch.equal(other_keys[:, :, 8:], tokens(1, seed=3)[0])


def test_a_gradient_flows_through_the_cache():
    _, cache = pair()
    keys, values = tokens(1, seed=1)
    out, _ = cache.update(keys.requires_grad_(), values, 0)
    out.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_a_cache_of_inference_mode_grows_outside_of_it():
    with torch.inference_mode():
        plain, growing = pair()
        for cache in (plain, growing):
            cache.update(*tokens(1, seed=1), 0)
    for cache in (plain, growing):
        cache.update(*tokens(1, seed=2), 0)
    assert_same(plain, growing)


def test_other_caches_are_left_alone():
    class Other(DynamicCache):
        pass

    cache = pair()[0]
    cache.layers[1] = object()
    before = list(cache.layers)
    assert growing_layers(cache) is None and cache.layers == before
    assert growing_layers(Other()) is None
    assert growing_layers(None) is None
