"""Keys and values of what has been read so far, with room for what will be.

A full layer keeps every token at its position. A window layer keeps the last ``window`` tokens only,
each at its position modulo the window: a ring. Sequences of a batch have lengths of their own.

Letters: b sequences, s new tokens, t cached keys, g key-value groups of this rank, d channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Keys(NamedTuple):
    """What the new queries of a layer look at; as ``gptoss_kernels.attention.attend`` takes it.

    Attributes:
        key, value: ``[b, t, g, d]``.
        offset: int64 ``[b]``: the index of the first new query's own key.
        begin: int64 ``[b]``: the first index that holds anything; None if 0.
        window: how many keys a query sees, its own included; None if all up to its own.

    """

    key: Tensor
    value: Tensor
    offset: Tensor
    begin: Tensor | None
    window: int | None


@dataclass(frozen=True)
class Shape:
    """Of a cache.

    Attributes:
        batch: sequences.
        capacity: tokens of the longest one, those to be made included.
        windows: by layer of this rank; None for a full one.
        groups: key-value groups of this rank.
        channels: of a head.

    """

    batch: int
    capacity: int
    windows: tuple[int | None, ...]
    groups: int
    channels: int


class Cache:
    """All layers of this rank.

    Args:
        shape: its sizes.
        dtype: of keys and values.
        device: where they are.

    Attributes:
        shape: its sizes.
        lengths: tokens that each sequence has: int64 ``[b]``.
        is_empty: whether no sequence has any; known without asking the device.

    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.lengths = torch.zeros(shape.batch, dtype=torch.int64, device=device)
        self.is_empty = True
        self._rows = torch.arange(shape.batch, device=device)[:, None]
        self._layers = [
            torch.empty(
                (2, shape.batch, window or shape.capacity, shape.groups, shape.channels),
                dtype=dtype,
                device=device,
            )
            for window in shape.windows
        ]

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return sum(layer.nbytes for layer in self._layers)

    def positions(self, count: int) -> Tensor:
        """Of ``count`` new tokens of every sequence: int64 ``[b, count]``."""
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def put(self, layer: int, key: Tensor, value: Tensor, counts: Tensor) -> Keys:
        """Take the new tokens' keys and values of a layer, and say what their queries look at.

        ``advance`` has to follow when all layers have theirs.

        Args:
            layer: of this rank.
            key: ``[b, s, g, d]``.
            value: ``[b, s, g, d]``.
            counts: how many of each sequence's s tokens are its own, and not padding: int64 ``[b]``.

        """
        window = self.shape.windows[layer]
        if window is None:
            return self._put_full(layer, key, value)
        if key.shape[1] == 1:
            return self._put_one(layer, key, value, window)
        return self._put_many(layer, key, value, counts, window)

    def advance(self, counts: Tensor) -> None:
        """Count the new tokens."""
        self.lengths += counts
        self.is_empty = False

    def clear(self) -> None:
        """Forget everything."""
        self.lengths.zero_()
        self.is_empty = True

    def _put_full(self, layer: int, key: Tensor, value: Tensor) -> Keys:
        """Padding is written, too: behind its sequence's end, where the next token will stand."""
        keys, values = self._layers[layer]
        count = key.shape[1]
        if self.is_empty:
            keys[:, :count], values[:, :count] = key, value
        else:
            places = self.positions(count)
            keys[self._rows, places], values[self._rows, places] = key, value
        return Keys(keys, values, self.lengths, None, None)

    def _put_one(self, layer: int, key: Tensor, value: Tensor, window: int) -> Keys:
        """The oldest token goes, its place is the new one's. Softmax needs no order of keys."""
        keys, values = self._layers[layer]
        places = self.lengths[:, None] % window
        keys[self._rows, places], values[self._rows, places] = key, value
        return Keys(keys, values, self.lengths.clamp(max=window - 1), None, None)

    def _put_many(
        self, layer: int, key: Tensor, value: Tensor, counts: Tensor, window: int
    ) -> Keys:
        """The queries see the ring, put in order, and behind it the new tokens."""
        if self.is_empty:
            seen = Keys(key, value, torch.zeros_like(self.lengths), None, window)
        else:
            before = torch.arange(1 - window, 0, device=key.device) + self.lengths[:, None]
            kept = self._layers[layer][:, self._rows, before % window]
            keys, values = (torch.cat(p, 1) for p in zip(kept, (key, value), strict=True))
            begin = (window - 1 - self.lengths).clamp(min=0)
            seen = Keys(keys, values, torch.full_like(begin, window - 1), begin, window)
        # By slot of the ring: the newest token that belongs there, and which of the new ones it is.
        last = (self.lengths + counts - 1)[:, None]
        newest = last - (last - torch.arange(window, device=key.device)) % window
        index = (newest - self.lengths[:, None]).clamp(0, key.shape[1] - 1)
        is_new = (newest >= self.lengths[:, None])[..., None, None]
        for ring, new in zip(self._layers[layer], (key, value), strict=True):
            ring.copy_(torch.where(is_new, new[self._rows, index], ring))
        return seen


class Mark:
    """A point that a cache of one sequence can go back to, whatever was read since.

    What full layers have behind the point is forgotten; the rings are kept here.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache, self._length = cache, cache.lengths.clone()
        self._rings = {
            layer: cache._layers[layer].clone()
            for layer, window in enumerate(cache.shape.windows)
            if window is not None
        }

    def restore(self) -> None:
        """Go back."""
        self._cache.lengths.copy_(self._length)
        self._cache.is_empty = False
        for layer, ring in self._rings.items():
            self._cache._layers[layer].copy_(ring)


def windows_of(lefts: Sequence[int | None]) -> tuple[int | None, ...]:
    """Megatron's windows, tokens to the left, as numbers of tokens."""
    return tuple(None if left is None else left + 1 for left in lefts)
