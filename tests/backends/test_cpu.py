"""The native CPU library and Python say the same numbers."""

import pytest
import torch

from mixbits.backends import cpu
from mixbits.formats import compensate
from mixbits.formats.schemes import MAX_SEGMENTS

pytestmark = pytest.mark.skipif(
    cpu.why_unavailable() is not None, reason=f"cpu backend: {cpu.why_unavailable()}"
)


def test_a_linear_has_as_many_segments_at_most():
    assert cpu._native.MAX_SEGMENTS == MAX_SEGMENTS


def test_the_same_shares_of_a_range_are_tried():
    assert torch.tensor(cpu._native.SHARES).equal(torch.tensor(compensate._SHARES))
    assert torch.tensor(cpu._native.NV_SHARES).equal(torch.tensor(compensate._NV_SHARES))
