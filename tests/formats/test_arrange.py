"""Orders and rotations of columns change the basis and nothing else."""

import pytest
import torch
from mixes import hadamard_matrix

from mixbits.errors import UsageError
from mixbits.formats.arrange import Arrangement, arrangement_of, hadamard
from mixbits.formats.schemes import Recipe, parse_scheme

MXFP4, MXFP8 = parse_scheme("MXFP4"), parse_scheme("MXFP8")
ARRANGEMENTS = {
    "nothing": lambda k: Arrangement(),
    "ordered": lambda k: Arrangement(torch.randperm(k)),
    "rotated": lambda k: Arrangement(None, rotated=True),
    "both": lambda k: Arrangement(torch.randperm(k), rotated=True),
}


@pytest.mark.parametrize("width", [1, 2, 8, 32])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 172, 192])
def test_hadamard_is_a_product_with_the_matrix_some_columns_at_a_time(columns, width):
    x = torch.randn(3, 5, columns, dtype=torch.float64)
    expected = x.clone()
    for start in range(0, columns - width + 1, width):
        block = x[..., start : start + width] @ hadamard_matrix(width).double()
        expected[..., start : start + width] = block
    torch.testing.assert_close(hadamard(x, width), expected, rtol=1e-14, atol=1e-13)
    if width == 32:
        assert torch.equal(hadamard(x), hadamard(x, width))


@pytest.mark.parametrize("kind", ARRANGEMENTS)
@pytest.mark.parametrize("columns", [20, 96, 172])
def test_the_product_stays_the_same(kind, columns):
    arrangement = ARRANGEMENTS[kind](columns)
    x = torch.randn(7, columns, dtype=torch.float64)
    weight = torch.randn(5, columns, dtype=torch.float64)
    arranged = arrangement.input(x) @ arrangement.weight(weight).T
    torch.testing.assert_close(arranged, x @ weight.T, rtol=1e-13, atol=1e-13)
    restored = arrangement.restore(arrangement.weight(weight))
    torch.testing.assert_close(restored, weight, rtol=1e-14, atol=1e-14)
    # In float32 an order alone is exact, and a rotation rounds to float32 at most.
    assert arrangement.input(x.bfloat16()).dtype == (
        torch.float32 if arrangement.rotated else torch.bfloat16
    )


@pytest.mark.parametrize("kind", ARRANGEMENTS)
def test_the_arguments_are_left_as_they_were(kind):
    weight = torch.randn(4, 64)
    before = weight.clone()
    arrangement = ARRANGEMENTS[kind](64)
    arrangement.restore(arrangement.weight(weight))
    arrangement.input(weight)
    assert torch.equal(weight, before)


def test_a_recipe_says_its_arrangement():
    assert arrangement_of(Recipe.plain(MXFP4)) == Arrangement()
    mixed = Recipe(((MXFP8, 1), (MXFP4, 2)), order=(2, 0, 1), rotated=True)
    arrangement = arrangement_of(mixed)
    assert arrangement.order is not None and arrangement.order.tolist() == [2, 0, 1]
    assert arrangement.rotated
    assert mixed.name == "MXFP8+MXFP4"


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (0, 1, 3)])
def test_an_order_holds_each_column_once(order):
    with pytest.raises(UsageError, match="each of 3 columns once"):
        Recipe(((MXFP8, 1), (MXFP4, 2)), order=order)


def test_what_a_mixed_linear_stores_is_counted():
    mixed = Recipe(((MXFP8, 32), (MXFP4, 64)), order=tuple(range(96)))
    bits = 10 * (32 * 8 + 8) + 10 * (64 * 4 + 16)
    assert mixed.storage_bits(10, 96) == bits + 96 * 8
    folded = Recipe(mixed.segments, mixed.order, order_in_producer=True)
    assert folded.storage_bits(10, 96) == bits
    assert mixed.storage_bits(10, 96, ignore_scale_bits=True) == 10 * (32 * 8 + 64 * 4)
    assert Recipe(mixed.segments).storage_bits(10, 96) == bits
    with pytest.raises(UsageError, match="96 columns"):
        mixed.parts(95)
