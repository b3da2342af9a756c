"""What is brought ahead is what would have been copied, once each, in any size of piece."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model

from mixbits.measuring.sensitivity import measure
from mixbits.model import streaming
from mixbits.model.prefetch import Prefetcher, foreign_tensors
from mixbits.model.streaming import StreamedModel
from mixbits.source.source import open_source

CPU = torch.device("cpu")


class Counting(Prefetcher):
    """Counts what is copied, and what is taken."""

    def __init__(self) -> None:
        super().__init__(CPU, piece_bytes=999)
        self.copied = self.taken = 0

    def _submit(self, tensors):
        self.copied += 1
        return super()._submit(tensors)

    def take(self, tensors):
        self.taken += bool(tensors)
        return super().take(tensors)


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1 << 20])
def test_copies_equal_their_sources(piece_bytes):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(5, 7, generator=generator).bfloat16(),
        torch.randn(0, 3, generator=generator),
        torch.randn(4, 6, generator=generator).T,
        torch.randint(256, (33,), generator=generator).to(torch.uint8),
        torch.tensor(2.5, dtype=torch.float16),
    ]
    prefetcher = Prefetcher(CPU, piece_bytes)
    for _ in range(2):
        copies = prefetcher.take(tensors)
        assert set(copies) == set(map(id, tensors))
        for tensor in tensors:
            copy = copies[id(tensor)]
            assert copy.dtype == tensor.dtype and torch.equal(copy, tensor)
            assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


def test_take_gives_what_it_is_asked_for_and_not_what_was_begun():
    first, second = torch.ones(3), torch.zeros(3)
    prefetcher = Prefetcher(CPU)
    prefetcher.start([first])
    assert torch.equal(prefetcher.take([second])[id(second)], second)
    assert prefetcher._pending is not None  # what was begun for others stays begun
    assert torch.equal(prefetcher.take([first])[id(first)], first)
    assert prefetcher._pending is None and prefetcher.take([]) == {}


def test_an_error_of_the_worker_reaches_the_one_who_takes():
    prefetcher = Prefetcher(CPU)
    broken = torch.ones(3, device="meta")
    prefetcher.start([broken])
    with pytest.raises(RuntimeError):
        prefetcher.take([broken])


def test_what_lies_on_the_device_is_not_foreign():
    assert foreign_tensors(torch.nn.Linear(2, 2), CPU) == []


@pytest.fixture
def prefetched(tmp_path, monkeypatch):
    """A model whose tensors are all brought, as if the device were another one."""

    def everything(module, device):
        return [*module.parameters(), *module.buffers()]

    monkeypatch.setattr(streaming, "foreign_tensors", everything)
    make_model(tmp_path, "qwen2")
    model = StreamedModel(open_source(str(tmp_path)).load())
    model.prefetcher = Counting()
    return model, StreamedModel(open_source(str(tmp_path)).load())


def _ids():
    return torch.randint(130, (4, 16), generator=torch.Generator().manual_seed(0))


def test_prefetched_logits_and_scores_are_the_same(prefetched):
    from mixbits.formats.schemes import parse_scheme
    from mixbits.model.layout import find_linears

    model, plain = prefetched
    assert torch.equal(model.logits(_ids()), plain.logits(_ids()))
    schemes = [parse_scheme(name) for name in ("MXFP4", "W4A16")]
    linears = find_linears(plain.model, include_head=True)
    for method in ("fisher", "deltaloss"):
        scores = [measure(m, linears, schemes, _ids(), method, 2) for m in prefetched]
        assert scores[0] == scores[1]
    # Nothing is brought in vain.
    assert model.prefetcher.copied == model.prefetcher.taken > 0


def test_blocks_that_run_twice_are_brought_ahead_all_the_same(prefetched):
    """Rounding with error compensation runs each block on two streams of hidden states."""
    model, plain = prefetched

    def twice(streamed):
        def block(index, hidden, *args, **kwargs):
            streamed.run_block(index, hidden, *args, **kwargs)
            return streamed.run_block(index, hidden, *args, **kwargs)

        return streamed.run(_ids(), block)

    assert torch.equal(twice(model), twice(plain))
    assert model.prefetcher.copied == model.prefetcher.taken > 0
