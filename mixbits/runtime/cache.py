"""Keys and values that grow in place: a layer of transformers' `DynamicCache`.

`DynamicLayer` copies everything with each token, in torch.cat. A `GrowingLayer` has room for more
tokens than it holds, and moves to half as much again when that is full.

What was handed out is never written again. A row of the room is written once; a layer that is
cropped, reordered or filled from elsewhere, or that shares its room with a copy of itself, moves
out before it grows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64  # tokens


class Room:
    """Memory for keys and values [B, heads, capacity, D], of which `used` tokens are written.

    kind     of keys, and of values: shape [B, heads], D, dtype, device type
    address  of keys and of values, and the capacity: `mixbits.backends.cpu.token_step` reads them
    """

    def __init__(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        """Copies of keys and values [B, heads, L, D], with space for at least `tokens` more."""
        if keys.shape[-2] != values.shape[-2]:
            got = f"{keys.shape[-2]} keys and {values.shape[-2]} values"
            raise ValueError(f"a cache must have as many values as keys: got {got}")
        self.used = keys.shape[-2]
        self.capacity = self.used + max(tokens, self.used // 2, _LEAST_ROOM)
        self.keys, self.values = (
            torch.empty((*x.shape[:2], self.capacity, x.shape[-1]), dtype=x.dtype, device=x.device)
            for x in (keys, values)
        )
        self.keys[:, :, : self.used] = keys
        self.values[:, :, : self.used] = values
        self.kind = tuple(
            (x.shape[:2], x.shape[-1], x.dtype, x.device.type) for x in (self.keys, self.values)
        )
        self.address = (self.keys.data_ptr(), self.values.data_ptr(), self.capacity)

    def __deepcopy__(self, memo: dict[int, Any]) -> Room:
        return Room(self.keys[:, :, : self.used], self.values[:, :, : self.used], 0)

    def is_writable(self) -> bool:
        return torch.is_inference_mode_enabled() or not self.keys.is_inference()


class GrowingLayer(DynamicLayer):
    """`DynamicLayer`, but with a room to grow in once `update` or `make_room` has been called."""

    def __init__(self, **kwargs: Any) -> None:
        self._room: Room | None = None
        self._length = 0  # of what is in the room
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        super().__init__(**kwargs)

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """A layer that holds what `layer` holds."""
        growing = cls()
        growing.__dict__.update(
            {k: v for k, v in vars(layer).items() if k not in ("keys", "values")}
        )
        growing.keys, growing.values = layer.keys, layer.values
        return growing

    @property
    def keys(self) -> Tensor | None:
        return self._keys if self._room is None else self._room.keys[:, :, : self._length]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._leave_room()
        self._keys = keys

    @property
    def values(self) -> Tensor | None:
        return self._values if self._room is None else self._room.values[:, :, : self._length]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._leave_room()
        self._values = values

    def _leave_room(self) -> None:
        if self._room is not None:
            self._keys, self._values, self._room = self.keys, self.values, None

    def get_seq_length(self) -> int:
        return self._length if self._room is not None else int(super().get_seq_length())

    def make_room(self, tokens: int) -> Room:
        """A room with what the layer holds and space for `tokens` more, which it alone may fill."""
        room = self._room
        if (
            room is None
            or room.used != self._length
            or room.used + tokens > room.capacity
            or not room.is_writable()
        ):
            assert self.keys is not None and self.values is not None
            room = Room(self.keys, self.values, tokens)
            self._room, self._length = room, room.used
            self._keys = self._values = None
        return room

    def grow(self, tokens: int) -> None:
        """Count `tokens` more, which somebody has written behind the others in the room."""
        assert self._room is not None
        self._length += tokens
        self._room.used = self._length

    def needs_gradient(self, *more: Tensor) -> bool:
        """Whether what is held (a prefix that is learned), or `more`, asks for gradients."""
        tensors = (self.keys, self.values, *more)
        wanted = any(x is not None and x.requires_grad for x in tensors)
        return wanted and torch.is_grad_enabled()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, heads, T, D]; returns all of them."""
        plain = self.get_seq_length() == 0 or torch.compiler.is_compiling()
        if plain or self.needs_gradient(key_states, value_states):
            out: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return out
        tokens = key_states.shape[-2]
        room = self.make_room(tokens)
        new = slice(self._length, self._length + tokens)
        room.keys[:, :, new], room.values[:, :, new] = key_states, value_states
        self.grow(tokens)
        return self.keys, self.values  # type: ignore[return-value]


def growing_layers(cache: object) -> list[GrowingLayer] | None:
    """The layers of a `DynamicCache`, which from now on grow in place.

    None, and nothing is changed, if the cache is of another kind, or any layer is.
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    layers: list[Any] = cache.layers
    if any(type(layer) not in (DynamicLayer, GrowingLayer) for layer in layers):
        return None
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[i] = GrowingLayer.of(layer)
    return layers
