"""Two checkpoints streamed side by side, tensor by tensor, in flat memory."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptoss_convert.compare import Difference, difference
from gptoss_convert.errors import ConvertError
from gptoss_convert.logical import Key, Logical, in_common, pieces, read, shapes_of
from gptoss_convert.plan import step_bytes_in
from gptoss_convert.scratch import Scratch
from gptoss_convert.threads import torch_threads
from gptoss_convert.types import Finding, Pair
from gptoss_plugins.mxfp4 import BLOCK
from gptoss_plugins.verify.finite import not_finite, spoiled_by_design

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from gptoss_convert.crew import Crew
    from gptoss_convert.execute import Progress
    from gptoss_convert.pieces import Piece
    from gptoss_convert.plan import Step
    from gptoss_convert.types import Codec, Validator

PIECE_BYTES = 8 << 20  # logical bytes of one checkpoint
MOST_WORKERS = 4  # each holds a piece of both checkpoints


@dataclass(frozen=True)
class Compared:
    """What was found out of one tensor.

    Attributes:
        name: the Hugging Face name.
        layer: which layer, or None outside the layers.
        shape: the logical one.
        dtypes: of the first and of the second checkpoint.
        difference: of their values.

    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    difference: Difference


@dataclass
class Values:
    """What was found out of all tensors.

    Attributes:
        tensors: by name, in the table's order.
        findings: of the validators, and of values that are not finite.

    """

    tensors: dict[str, Compared] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def nbytes(first: Logical, second: Logical | None) -> int:
    """How much will be read."""
    return sum(
        step_bytes_in(step)
        for key, *steps in _pairs(first, second)
        for step in steps
        if step is not None
    )


def compare_values(
    first: Logical,
    second: Logical | None,
    validators: Iterable[Validator] = (),
    *,
    codecs: Iterable[Codec] = (),
    workers: int | None = None,
    progress: Progress = lambda nbytes: None,
    crew: Crew | None = None,
) -> Values:
    """Read both, and compare what both have.

    Args:
        first: a checkpoint.
        second: what it is compared with; without one only the first is looked at.
        validators: those of stage ``values`` see every piece.
        codecs: that a source may have been kept of, with the values that it cannot hold.
        workers: pieces at work side by side.
        progress: called with the bytes just read, from any thread.
        crew: the processes at it; this one reads its share.

    """
    count = workers or max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0))))
    looks = [v.check for v in validators if v.stage == "values"]
    work = _Work(first, second, looks, progress, spoiled_by_design(first, codecs))
    with torch_threads(count), ThreadPoolExecutor(count, "verify") as pool:
        for number, jobs in enumerate(_pairs(first, second)):
            if crew is None or number % crew.size == crew.rank:
                list(pool.map(work.run, _jobs(*jobs)))
    return work.result()


def _pairs(first: Logical, second: Logical | None) -> Iterator[tuple[Key, Step, Step | None]]:
    """The steps that are compared: those of both whose tensors have the same shapes."""
    for key, step in first.steps.items():
        other = second.steps.get(key) if second else None
        if second is None or (other and shapes_of(key, step) == shapes_of(key, other)):
            yield key, step, other


def _jobs(key: Key, one: Step, two: Step | None) -> list[tuple[Key, Piece, Piece | None]]:
    return [(key, *pair) for pair in pieces(one, two, PIECE_BYTES)]


class _Work:
    """Pieces by any thread, results added up."""

    def __init__(
        self,
        first: Logical,
        second: Logical | None,
        looks: list[Callable[[Pair], Iterable[Finding]]],
        progress: Progress,
        meant: Collection[str],
    ) -> None:
        self._first, self._second, self._is_pair = first, second, second is not None
        self._meant = meant
        self._looks, self._progress = looks, progress
        self._sums: dict[str, Difference] = {}
        self._about: dict[str, tuple[int | None, tuple[int, ...], tuple[str, ...]]] = {}
        self._findings: dict[tuple[str, str], Finding] = {}
        self._local, self._adding = threading.local(), threading.Lock()

    def run(self, job: tuple[Key, Piece, Piece | None]) -> None:
        """One piece of both."""
        key, mine, theirs = job
        scratch = self._local.__dict__.setdefault("scratch", Scratch())
        scratch.reset()
        in_order = self._second is not None and self._first.side == self._second.side == "hf"
        try:
            one = read(self._first, mine, scratch, in_order=in_order)
            two = None
            if theirs is not None and self._second is not None:
                two = read(self._second, theirs, scratch, in_order=in_order)
        except ConvertError as error:
            self._note(Finding("error", key[0], str(error)))
            return
        parts = [part for part in (one, two) if part]
        dtypes = tuple(part.step.inputs[0].spec.dtype for part in parts)
        in_hf_order = all(part.side == "hf" for part in parts)
        natural = mine.step.rule.quantizable and not in_hf_order
        shapes = shapes_of(key, mine.step)
        for name, left, right in in_common(key, one, two):
            fits = natural and left.shape[-1] % BLOCK == 0
            found = difference(left, right, scratch, block=BLOCK if fits else 0)
            pair = Pair(
                name,
                mine.step.layer,
                shapes[name],
                left,
                right if two else None,
                found.is_equal,
                in_hf_order,
            )
            self._add(pair, dtypes, found)
            for look in self._looks:
                for finding in look(pair):
                    self._note(finding)
        self._progress(sum(tensor.nbytes for part in parts for s in part.stored for tensor in s))

    def _add(self, pair: Pair, dtypes: tuple[str, ...], found: Difference) -> None:
        with self._adding:
            self._about.setdefault(pair.name, (pair.layer, pair.shape, dtypes))
            self._sums[pair.name] = self._sums.get(pair.name, Difference()) + found

    def _note(self, finding: Finding) -> None:
        with self._adding:
            self._findings.setdefault((finding.where, finding.what), finding)

    def result(self) -> Values:
        """In the table's order."""
        made = Values(findings=list(self._findings.values()))
        for key in self._first.steps:
            for name in key:
                if name in self._sums:
                    made.tensors[name] = Compared(name, *self._about[name], self._sums[name])
                    meant = name in self._meant
                    made.findings += not_finite(name, self._sums[name], self._is_pair, meant=meant)
        return made
