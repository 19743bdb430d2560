"""Questions and answers for fine-tuning: samples with a mask of what is learned, packed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss_plugins.data.sft.dataset import SftRows
    from gptoss_plugins.infer.tokenizer import Tokenizer
    from gptoss_plugins.train.config import SftDataset


def sft_datasets(config: SftDataset, tokenizer: Tokenizer) -> tuple[SftRows, SftRows | None]:
    """Training and validation rows; None, where nothing is kept for validation.

    ``rows[number]``, for any number from 0 on, is a dict of tensors ``[s]``, s = ``sequence_length``:

    * ``tokens`` int64: what the model reads;
    * ``labels`` int64: the next token of the same sample;
    * ``loss_mask`` float32: 1 where the label is learned, else 0;
    * ``positions`` int64: from 0 in each sample;
    * ``starts`` int64: where in the row the token's own sample begins. A token attends to
      ``starts[i] .. i``.

    What no sample takes is padding: without loss, and a sample of its own to ``positions`` and
    ``starts``. With ``packing`` a row has several samples, without it has one: the samples are the
    same, and so is the sum of the losses over an epoch. ``len(rows)`` rows are an epoch, each in an
    order of its own, which ``random_seed`` decides.

    Packing takes a while, and several processes may not all do it: call :func:`prepare` on one rank
    and wait for it, then this on all of them. Without that the first one packs, and the others on that
    machine wait.

    Args:
        config: the recipe's ``dataset``.
        tokenizer: the run's.

    Raises:
        ConvertError: the data are missing, bad, or packed for another tokenizer or length.

    """
    from gptoss_plugins.data.sft.opening import open_rows

    return open_rows(config, tokenizer)


def prepare(config: SftDataset, tokenizer: Tokenizer, *, show: bool = True) -> None:
    """Fetch and pack what :func:`sft_datasets` reads, unless it is there.

    Args:
        config: the recipe's ``dataset``.
        tokenizer: the run's.
        show: progress on stderr.

    Raises:
        ConvertError: as there.

    """
    from gptoss_plugins.data.sft.opening import prepared

    prepared(config, tokenizer, show=show)
