"""Records -> tokens on disk: a part per unit of input, read back as one long list of samples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_convert.errors import CheckpointError
from gptoss_plugins.data.parts import part_file
from gptoss_plugins.data.records import place_of, records_in
from gptoss_plugins.data.sft.records import BadRecordError
from gptoss_plugins.data.sft.samples import Sample, encode, pieces_in

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from gptoss_plugins.data.sft.form import Form
    from gptoss_plugins.data.units import Unit
    from gptoss_plugins.infer.tokenizer import Tokenizer

LAST = ".npz"
_AT_ONCE = 256  # records that are encoded in one call, on all cores


@dataclass(frozen=True)
class Job:
    """What is made of records.

    Attributes:
        form: of the records.
        tokenizer: its control tokens and vocabulary.

    """

    form: Form
    tokenizer: Tokenizer


def make_part(parts: Path, number: int, unit: Unit, job: Job) -> None:
    """One unit's tokens: ``.ids`` int32, ``.learned`` bool, and the index, which appears last.

    Raises:
        CheckpointError: a record is bad; says which.

    """
    lengths: list[int] = []
    owners: list[int] = []
    records = 0
    found = records_in(unit)
    with (
        open(part_file(parts, number, ".ids"), "wb") as ids,
        open(part_file(parts, number, ".learned"), "wb") as learned,
    ):
        while batch := [*itertools.islice(found, _AT_ONCE)]:
            samples = []
            for place, record in batch:
                try:
                    new = [*pieces_in(record, job.form, job.tokenizer)]
                except BadRecordError as error:
                    raise CheckpointError(f"{place_of(unit, place)} {error}") from None
                samples += new
                owners += [records] * len(new)
                records += 1
            for sample in encode(samples, job.tokenizer):
                ids.write(sample.ids.tobytes())
                learned.write(sample.learned.tobytes())
                lengths.append(len(sample.ids))
    half = part_file(parts, number, ".half")
    with open(half, "wb") as file:
        np.savez(
            file,
            lengths=np.array(lengths, np.int64),
            owners=np.array(owners, np.int64),
            records=np.array(records, np.int64),
        )
    half.rename(part_file(parts, number, LAST))


class Samples:
    """The samples of all parts, in order of the input; read where they lie.

    Attributes:
        lengths: int64 ``[n]``, tokens of each.
        owners: int64 ``[n]``, the number of the record that each was made of.
        records: how many there were.

    """

    def __init__(self, parts: Path, count: int) -> None:
        lengths, owners, self.records = [], [], 0
        self._ids: list[NDArray[np.int32]] = []
        self._learned: list[NDArray[np.bool_]] = []
        for number in range(count):
            with np.load(part_file(parts, number, LAST), allow_pickle=False) as index:
                lengths.append(index["lengths"])
                owners.append(index["owners"] + self.records)
                self.records += int(index["records"])
            self._ids.append(_mapped(part_file(parts, number, ".ids"), np.int32))
            self._learned.append(_mapped(part_file(parts, number, ".learned"), np.bool_))
        none = [np.empty(0, np.int64)]
        self.lengths = np.concatenate(lengths or none)
        self.owners = np.concatenate(owners or none)
        # Where each sample is: its part, and its first token there.
        counts = [len(one) for one in lengths]
        self._part = np.repeat(np.arange(count), counts)
        self._start = np.concatenate([np.cumsum(one) - one for one in lengths] or none)

    def __getitem__(self, number: int) -> Sample:
        part, start = self._part[number], self._start[number]
        place = slice(start, start + self.lengths[number])
        return Sample(self._ids[part][place], self._learned[part][place])


def _mapped(path: Path, dtype: type) -> NDArray[Any]:
    """A file's values; an empty one cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
