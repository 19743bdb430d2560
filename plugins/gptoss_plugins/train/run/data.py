"""Samples into microbatches: which of them a rank sees when, read ahead by other processes.

A step's samples depend on how many came before and on nothing else: not on the layout, nor on how often
the run was stopped.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from megatron.core import parallel_state
from torch.utils.data import DataLoader, Dataset, default_collate

from gptoss_convert.errors import CheckpointError, ConvertError
from gptoss_plugins.train.run.step import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from gptoss_plugins.train.config import TrainingConfig


class Place(NamedTuple):
    """A rank among those that share the data.

    Attributes:
        rank, ranks: its number among those that see different sequences, and how many there are.
        part, parts: its number among those that share each sequence, and how many.
        device: where its batches are to be.

    """

    rank: int
    ranks: int
    part: int
    parts: int
    device: torch.device


def place_of(device: torch.device) -> Place:
    """This rank's."""
    return Place(
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
        device,
    )


class Steps:
    """A rank's microbatches of step after step.

    Args:
        dataset: map-style; ``dataset[n]`` is a dict of ``tokens``, ``labels``, ``loss_mask`` and
            perhaps ``positions`` and ``starts``, each ``[whole row]``.
        config: the run.
        place: the rank.
        vocabulary: rows of the model's embedding.

    """

    def __init__(self, dataset: Any, config: TrainingConfig, place: Place, vocabulary: int) -> None:
        self._dataset, self._config, self._place = dataset, config, place
        self._vocabulary = vocabulary

    def since(self, sample: int, steps: int | None = None) -> Iterator[list[Batch]]:
        """Step after step, the first one from a sample on.

        Raises:
            CheckpointError: the data has tokens that the model has not.

        """
        train = self._config.train
        each = train.global_batch_size // (train.micro_batch_size * self._place.ranks)
        workers = self._config.dataset.num_workers
        rows = DataLoader(
            _Checked(self._dataset, self._vocabulary),
            batch_sampler=self._numbers(sample, steps),
            num_workers=workers,
            pin_memory=self._place.device.type == "cuda",
            prefetch_factor=max(2, each) if workers else None,
            collate_fn=_stacked,
        )
        batches: list[Batch] = []
        for row in rows:
            if isinstance(row, ConvertError):
                raise row
            batches.append(self._batch(row))
            if len(batches) == each:
                yield batches
                batches = []

    def _numbers(self, sample: int, steps: int | None) -> Iterator[list[int]]:
        rows, size = self._config.train.micro_batch_size, self._config.train.global_batch_size
        for step in count() if steps is None else range(steps):
            start = sample + step * size
            first = start + self._place.rank * rows
            for number in range(first, start + size, rows * self._place.ranks):
                yield list(range(number, number + rows))

    def _batch(self, rows: dict[str, Tensor]) -> Batch:
        length = rows["tokens"].shape[1]
        if "positions" not in rows:
            rows["positions"] = torch.arange(length).expand_as(rows["tokens"])
        size = length // self._place.parts
        part = slice(self._place.part * size, (self._place.part + 1) * size)
        mine = {
            name: rows[name][:, part] for name in ("tokens", "labels", "loss_mask", "positions")
        }
        there = {
            name: tensor.contiguous().to(self._place.device, non_blocking=True)
            for name, tensor in mine.items()
        }
        starts = rows.get("starts")
        return Batch(
            there["tokens"],
            there["labels"],
            there["loss_mask"],
            there["positions"],
            None if starts is None else starts.to(self._place.device, non_blocking=True),
            length,
        )


def _stacked(samples: list[Any]) -> Any:
    """Samples as a microbatch; or what is wrong with one: raised in a worker, it would lose its words."""
    wrong = next((one for one in samples if isinstance(one, ConvertError)), None)
    return wrong or default_collate(samples)


class _Checked(Dataset[Any]):
    """The dataset's samples, for any number, with none of them beyond the vocabulary."""

    _TYPES = (
        ("tokens", torch.int64),
        ("labels", torch.int64),
        ("loss_mask", torch.float32),
        ("positions", torch.int64),
        ("starts", torch.int64),
    )

    def __init__(self, dataset: Any, vocabulary: int) -> None:
        self._dataset, self._vocabulary = dataset, vocabulary

    def __getitem__(self, number: int) -> Any:
        try:
            return self._sample(number)
        except ConvertError as error:
            return error
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            return CheckpointError(
                f"sample {number} of the data cannot be read ({error}); prepare the data again"
            )

    def _sample(self, number: int) -> dict[str, Tensor]:
        sample = self._dataset[number]
        found = {
            name: torch.as_tensor(sample[name]).to(dtype)
            for name, dtype in self._TYPES
            if name in sample
        }
        largest = int(torch.maximum(found["tokens"], found["labels"]).max())
        if largest >= self._vocabulary:
            raise CheckpointError(
                f"the data has token {largest}, and the model {self._vocabulary} tokens; prepare it "
                f"with the model's own tokenizer"
            )
        return found
