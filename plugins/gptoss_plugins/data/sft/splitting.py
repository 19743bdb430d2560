"""Which of the data are kept for validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gptoss_plugins.train.config import SftDataset


def split(
    owners: NDArray[np.int64], count: int, config: SftDataset, share: float | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of samples for training and for validation, in order.

    Whole records are kept, chosen by ``random_seed``: a conversation that makes several samples shall
    not be on both sides. Where there is more than one, neither side is left without.

    Args:
        owners: int64, the record of each sample, from 0 to ``count``.
        count: records.
        config: says how many training may have at most.
        share: part of the records that is kept; the config's, if left out.

    """
    share = config.val_proportion if share is None else share
    kept = min(max(round(count * share), 1), count - 1) if share else 0
    bits = np.random.MT19937(np.random.SeedSequence(config.random_seed))
    is_kept = np.zeros(count, np.bool_)
    is_kept[np.random.RandomState(bits).permutation(count)[:kept]] = True
    training = np.flatnonzero(~is_kept[owners])
    return training[: config.max_train_samples], np.flatnonzero(is_kept[owners])
