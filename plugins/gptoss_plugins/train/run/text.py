"""Running text in samples: megatron-core's blended datasets."""

from __future__ import annotations

import contextlib
import logging
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import _IndexReader

from gptoss_convert.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gptoss_plugins.train.config import PretrainDataset, TrainingConfig

log = logging.getLogger("gptoss_convert")


class Tokens:
    """What megatron-core's datasets ask of a tokenizer.

    Attributes:
        eod: the token that ends a document.
        pad: one that is never learned.
        vocab_size: how many there are.

    """

    def __init__(self, name: str, vocab_size: int, eod: int, pad: int) -> None:
        self.unique_identifiers = {"class": name, "size": str(vocab_size), "eod": str(eod)}
        self.vocab_size, self.eod, self.pad = vocab_size, eod, pad


def text_datasets(config: TrainingConfig, tokens: Tokens) -> tuple[Any, Any]:
    """Training and validation samples of running text; None where there are none.

    Raises:
        CheckpointError: a file is missing.

    """
    dataset: PretrainDataset = config.dataset  # type: ignore[assignment]
    train = config.train
    evaluations = train.train_iters // train.eval_interval + 1
    wanted = [
        train.train_iters * train.global_batch_size,
        evaluations * train.eval_iters * train.global_batch_size,
        0,
    ]
    shares = dataset.split
    if dataset.blend is not None:
        _require(dataset.blend[0])
        shares = _shares(dataset.blend[0], dataset.split)
    settings = GPTDatasetConfig(
        random_seed=dataset.random_seed,
        sequence_length=dataset.sequence_length,
        blend=dataset.blend and tuple(map(_listed, dataset.blend)),
        split=shares,
        path_to_cache=dataset.path_to_cache,
        tokenizer=tokens,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        num_dataset_builder_threads=1,
    )
    kind = MockGPTDataset if dataset.blend is None else GPTDataset
    with _readable("dataset.blend"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = BlendedMegatronDatasetBuilder(kind, wanted, lambda: True, settings).build()
    for one in found:
        _with_own_masks(one)
    train_samples, valid_samples, _ = (one and _Whole(one) for one in found)
    return train_samples, valid_samples


def _with_own_masks(dataset: Any) -> None:
    """megatron-core keeps the mask of the first sample that is read for all others, padding and all."""
    for part in getattr(dataset, "datasets", [dataset] if dataset is not None else []):
        part.masks_and_position_ids_are_cacheable = False


class _Whole:
    """Samples of whole rows, without the positions that megatron-core numbers anew."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = self._samples[number % len(self._samples)]
        return {name: sample[name] for name in ("tokens", "labels", "loss_mask")}


def _shares(prefixes: Sequence[str], split: str) -> str:
    """The split, without parts that some file has no document for: megatron-core would look for one
    without an end.

    Raises:
        CheckpointError: a file cannot be read, or there is nothing to train on.

    """
    shares = [*map(float, split.split(",")), 0.0, 0.0][:3]
    ends = [sum(shares[: n + 1]) / sum(shares) for n in range(3)]
    for prefix in prefixes:
        with _readable(prefix):
            documents = len(_IndexReader(f"{prefix}.idx", multimodal=False).document_indices) - 1
        stops = [round(end * documents) for end in ends]
        sizes = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
        if not sizes[0]:
            raise CheckpointError(
                f"{prefix}: has {documents} documents, and dataset.split {split} leaves none to train "
                f"on; say dataset.split=100,0,0"
            )
        for number, (name, size) in enumerate(zip(("", "validation", "test"), sizes, strict=True)):
            if shares[number] and not size:
                log.warning("%s: has no document for %s, so there is none", prefix, name)
                shares[number] = 0.0
    return ",".join(f"{share:g}" for share in shares)


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Inside, megatron-core reads data; what it says of damaged ones becomes a sentence."""
    try:
        yield
    except (
        AssertionError,
        OSError,
        ValueError,
        RuntimeError,
        OverflowError,
        struct.error,
    ) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{what}: megatron-core cannot read the data or write its indices ({reason[0][:200]}); "
            f"prepare it again, or set dataset.path_to_cache to a folder of your own"
        ) from error


def _listed(value: Any) -> Any:
    return None if value is None else list(value)


def _require(prefixes: Any) -> None:
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            if Path(prefix + suffix).is_file():
                continue
            stem = prefix.removesuffix(".bin").removesuffix(".idx")
            if stem != prefix:
                raise CheckpointError(
                    f"{prefix}{suffix}: is not there; dataset.blend names prefixes, so say {stem}"
                )
            raise CheckpointError(
                f"{prefix}{suffix}: is not there; dataset.blend names prefixes of .bin and .idx "
                f"files, as data preprocess makes them"
            )
