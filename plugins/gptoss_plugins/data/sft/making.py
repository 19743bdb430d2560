"""Files of records -> a file of packs."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_convert.errors import CheckpointError, UsageError
from gptoss_plugins.data.parts import claim, make_parts
from gptoss_plugins.data.sft.packed_file import Pack, write_packs
from gptoss_plugins.data.sft.packing import first_fit_decreasing
from gptoss_plugins.data.sft.plan import plan_of
from gptoss_plugins.data.sft.tokenizing import LAST, Job, Samples, make_part
from gptoss_plugins.data.units import units_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from gptoss_plugins.data.sft.form import Form
    from gptoss_plugins.infer.tokenizer import Tokenizer

log = logging.getLogger("gptoss_convert")


@dataclass(frozen=True)
class Shape:
    """Of the rows that are made.

    Attributes:
        sequence_length: tokens of a row.
        pad_to_multiple: each sample is padded to a multiple of so many.
        packing: as many samples as fit in a row; else each has one to itself.

    """

    sequence_length: int
    pad_to_multiple: int = 1
    packing: bool = True

    def __post_init__(self) -> None:
        if self.sequence_length % self.pad_to_multiple:
            raise UsageError(
                f"the sequence length {self.sequence_length} is no multiple of {self.pad_to_multiple}, "
                f"which samples are to be padded to; choose one that is"
            )


def tokenize(
    files: Sequence[Path],
    parts: Path,
    job: Job,
    *,
    workers: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Samples:
    """All samples of files of records; what an earlier run did is not done again.

    Args:
        files: JSONL, zstd JSONL or Parquet.
        parts: folder for the tokens, the caller's to remove.
        job: how.
        workers: processes.
        progress: is told bytes of input as they are done.

    Raises:
        CheckpointError: a record is bad, or there is none.
        IncompleteError: the folder is of other inputs or options.

    """
    units = [unit for path in files for unit in units_of(path)]
    claim(parts, plan_of(units, job), LAST)
    make_parts(make_part, parts, units, job, LAST, workers=workers, progress=progress)
    samples = Samples(parts, len(units))
    if not samples.records:
        raise CheckpointError(f"{', '.join(map(str, files))}: no record in it; write one a line")
    if not len(samples.lengths):
        raise CheckpointError(
            f"{files[0]}: has {samples.records} records, and nothing in them is learned; choose other "
            f"channels to learn"
        )
    return samples


def pack(
    samples: Samples,
    chosen: NDArray[np.int64],
    path: Path,
    shape: Shape,
    job: Job,
    name: str,
) -> dict[str, Any]:
    """A file of those samples.

    Args:
        samples: of all records.
        chosen: int64, their numbers.
        path: the file.
        shape: of its rows.
        job: how they were made, for the file's metadata.
        name: of the input, for messages.

    Returns:
        ``samples``, ``dropped`` (longer than a row), ``tokens`` and ``learned_tokens`` of those that
        are in, ``packs``, ``fill`` (tokens per place), ``longest`` (of all, in places).

    Raises:
        CheckpointError: all are longer than a row.

    """
    places = samples.lengths[chosen] - 1  # the last token is a label only
    fits = places <= shape.sequence_length
    if not fits.any():
        least = -(-places.min() // shape.pad_to_multiple) * shape.pad_to_multiple
        raise CheckpointError(
            f"{name}: all {len(chosen)} samples are longer than the sequence length "
            f"{shape.sequence_length}, the shortest takes {least}; say --sequence-length {least} or more "
            f"(in a recipe dataset.sequence_length and model.seq_length)"
        )
    if dropped := int((~fits).sum()):
        log.warning(
            "%s: %d of %d samples are longer than the sequence length %d and left out; the longest "
            "takes %d",
            name,
            dropped,
            len(chosen),
            shape.sequence_length,
            places.max(),
        )
    kept = chosen[fits]
    padded = -(-places[fits] // shape.pad_to_multiple) * shape.pad_to_multiple
    if shape.packing:
        order, edges = first_fit_decreasing(padded, shape.sequence_length)
    else:
        order, edges = np.arange(len(kept)), np.arange(len(kept) + 1)
    padding = padding_of(job.tokenizer)
    tokens, count = int(places[fits].sum()), len(edges) - 1
    learned = sum(int(np.count_nonzero(samples[number].learned)) for number in kept.tolist())
    report = {
        "samples": len(kept),
        "dropped": dropped,
        "tokens": tokens,
        "learned_tokens": learned,
        "packs": count,
        "fill": round(tokens / (count * shape.sequence_length), 6),
        "longest": int(places.max()),
    }
    facts = {**facts_of(shape, job.form, job.tokenizer), "report": report}
    write_packs(path, _packs(samples, kept[order], padded[order], edges, padding), facts)
    return report


def facts_of(shape: Shape, form: Form, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a file of packs depends on, its records apart."""
    return {
        **dataclasses.asdict(shape),
        "tokenizer": tokenizer.digest,
        "form": dataclasses.asdict(form),
    }


def padding_of(tokenizer: Tokenizer) -> int:
    """A token for the places that no sample takes; it is never learned."""
    padding, end = tokenizer.id_of("<|padding|>"), tokenizer.end_of_text
    return padding if padding is not None else end or 0


def _packs(
    samples: Samples,
    numbers: NDArray[np.int64],
    padded: NDArray[np.int64],
    edges: NDArray[np.int64],
    padding: int,
) -> Iterator[Pack]:
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        sizes = padded[begin:end] + 1
        starts = (np.cumsum(sizes) - sizes).astype(np.int32)
        ids = np.full(int(sizes.sum()), padding, np.int32)
        mask = np.zeros(len(ids), np.int8)
        for start, number in zip(starts.tolist(), numbers[begin:end].tolist(), strict=True):
            sample = samples[number]
            stop = start + len(sample.ids)
            ids[start:stop] = sample.ids
            mask[start : stop - 1] = sample.learned[1:]
        yield Pack(ids, mask, starts)
