"""Bring weights from the host to a device while the device computes.

Weights stay mapped from their files. A worker thread copies them, piece by piece, into two pinned
buffers that take turns, and from there to the device on a stream of its own: reading the file,
crossing the bus and computing go on at the same time. The device holds the module that runs and the
next one, never a third: before it copies the next, the worker waits until the device has finished
the module before these two.

On a CPU device the same steps run without streams, for tests: nothing needs to be brought there.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

PIECE_BYTES = 64 << 20


class _Slot:
    """A host buffer whose contents may still be on their way to the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.sent: Any = None  # torch.cuda.Event

    def send(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """uint8 source on the host -> uint8 target on the device, both at most the buffer long."""
        if self.sent is not None:
            self.sent.synchronize()
        part = self.buffer[: len(source)]
        part.copy_(source)
        with torch.cuda.stream(stream):  # does nothing where there is no stream
            target.copy_(part, non_blocking=True)
        self.sent = None if stream is None else stream.record_event()


def foreign_tensors(module: nn.Module, device: torch.device) -> list[Tensor]:
    """Parameters and buffers of `module` that do not lie on `device`."""
    return [t for t in (*module.parameters(), *module.buffers()) if t.device != device]


class Prefetcher:
    """Copies of tensors on `device`: begun with `start`, used after `take`."""

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        self.device = device
        self.piece_bytes = piece_bytes
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots: list[_Slot] = []
        self._worker = ThreadPoolExecutor(1, "mixbits-prefetch")
        self._pending: tuple[frozenset[int], Future[dict[int, Tensor]], list[Tensor]] | None = None

    def start(self, tensors: Iterable[Tensor]) -> None:
        """Begin to copy what a later `take` will ask for; one thing at a time is begun."""
        found = list(tensors)
        key = frozenset(map(id, found))
        if found and (self._pending is None or self._pending[0] != key):
            self._pending = key, self._submit(found), found  # an id is good while it lives

    def take(self, tensors: Iterable[Tensor]) -> dict[int, Tensor]:
        """id of a tensor -> its copy, in its own dtype, that the current stream may use.

        What was begun for others stays begun.
        """
        found = list(tensors)
        if not found:
            return {}
        if self._pending is not None and self._pending[0] == frozenset(map(id, found)):
            future, self._pending = self._pending[1], None
        else:
            future = self._submit(found)
        copies = future.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for copy in copies.values():
                copy.record_stream(current)  # its memory is the other stream's
        return copies

    def _submit(self, tensors: list[Tensor]) -> Future[dict[int, Tensor]]:
        before: Any = None
        if self._stream is not None:
            before = torch.cuda.current_stream(self.device).record_event()
        return self._worker.submit(self._copy, tensors, before)

    def _copy(self, tensors: list[Tensor], before: Any) -> dict[int, Tensor]:
        if before is not None:
            before.synchronize()
        with torch.cuda.stream(self._stream):
            copies = {
                id(t): torch.empty(t.shape, dtype=t.dtype, device=self.device) for t in tensors
            }
        number = 0
        for tensor in tensors:
            source, target = (
                t.detach().contiguous().view(-1).view(torch.uint8)
                for t in (tensor, copies[id(tensor)])
            )
            for start in range(0, len(source), self.piece_bytes):
                piece = slice(start, start + self.piece_bytes)
                self._slot(number).send(target[piece], source[piece], self._stream)
                number += 1
        return copies

    def _slot(self, number: int) -> _Slot:
        while len(self._slots) < 2:
            self._slots.append(_Slot(self.piece_bytes, self.device))
        return self._slots[number % 2]
