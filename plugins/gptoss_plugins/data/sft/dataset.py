"""Rows for training, by number: packs, or samples one by one, in another order every epoch."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from gptoss_convert.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from gptoss_plugins.data.sft.packed_file import Pack
    from gptoss_plugins.data.sft.reading import PackedFile


class SftRows:
    """Map-style dataset without an end: ``rows[number]`` for any number from 0 on.

    Which row that is depends on the seed and the number alone, so a run that goes on at ``number``
    sees what an undisturbed one would. All rows come once before any comes again.

    Args:
        file: of packs.
        numbers: int64, those of its packs that belong here.
        length: tokens of a row, s.
        padding: the token after the last sample.
        seed: of the order.

    """

    def __init__(
        self, file: PackedFile, numbers: NDArray[np.int64], length: int, padding: int, seed: int
    ) -> None:
        self.file, self.length, self._padding = file, length, padding
        self._numbers, self._seed = numbers, seed

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._numbers)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """See :func:`gptoss_plugins.data.sft.sft_datasets`."""
        epoch, place = divmod(number, len(self._numbers))
        row = int(self._numbers[_order(len(self._numbers), self._seed, epoch)[place]])
        pack = self.file[row]
        if (places := len(pack.ids) - len(pack.starts)) > self.length:
            raise CheckpointError(
                f"{self.file.path}: row {row} takes {places} tokens, more than sequence_length "
                f"{self.length}; pack the data again for this length"
            )
        return row_of(pack, self.length, self._padding)


def row_of(pack: Pack, length: int, padding: int) -> dict[str, torch.Tensor]:
    """A pack as tensors ``[length]``."""
    import torch

    ids, mask, starts = pack
    sizes = np.diff(starts, append=len(ids))
    is_input = np.ones(len(ids), np.bool_)
    is_input[starts + sizes - 1] = False  # a sample's last token is a label only
    used = int(is_input.sum())
    begins = np.concatenate([np.cumsum(sizes - 1) - (sizes - 1), [used]])
    tokens, labels = np.full((2, length), padding, np.int64)
    loss_mask = np.zeros(length, np.float32)
    tokens[:used] = ids[is_input]
    labels[:used] = np.append(ids[1:], padding)[is_input]
    loss_mask[:used] = mask[is_input]
    own_start = np.repeat(begins, [*(sizes - 1), length - used]).astype(np.int64)
    found = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": loss_mask,
        "positions": np.arange(length) - own_start,
        "starts": own_start,
    }
    return {name: torch.from_numpy(values) for name, values in found.items()}


@lru_cache(4)  # training and validation, an epoch that ends and one that begins
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Legacy, as its numbers are promised not to change with numpy."""
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(count)
