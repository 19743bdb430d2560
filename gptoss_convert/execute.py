"""Running a plan: read ahead, decode, rewrite, write; groups side by side, memory bounded."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from gptoss_convert.crew import claim
from gptoss_convert.device import Device
from gptoss_convert.dtypes import torch_dtype
from gptoss_convert.encoder import Encoder
from gptoss_convert.errors import ConvertError, MismatchError, ResourceError
from gptoss_convert.layout import take
from gptoss_convert.notes import Notes, flat
from gptoss_convert.ops import Copy
from gptoss_convert.pieces import Piece, decoded, read_parts, require_equal
from gptoss_convert.plan import ConversionPlan, Group, Output, Step, step_bytes_in
from gptoss_convert.readahead import read_ahead
from gptoss_convert.scratch import PAGE, Scratch
from gptoss_convert.spoiled import Spoiled
from gptoss_convert.staging import human
from gptoss_convert.threads import torch_threads

if TYPE_CHECKING:
    from torch import Tensor

    from gptoss_convert.types import GroupWriter, TensorSink, TensorSource, Validator

DEFAULT_MAX_MEMORY = 1 << 30
PIECE_BYTES = 8 << 20  # of output; larger pieces win nothing and fragment the heap
CLAIM = ".claim-"  # prefix of the files by which a process holds a group
Progress = Callable[[int], None]


class _Stored(NamedTuple):
    """What a piece needs from disk: per input its parts, and per output its codec's hints."""

    inputs: list[list[Tensor]]
    hints: list[list[Tensor] | None]


def default_workers() -> int:
    """Groups written side by side if the user does not say: four at most, and one per two cores,
    since each reads, converts and writes on threads of its own.
    """
    return max(1, min(4, len(os.sched_getaffinity(0)) // 2))


@dataclass(frozen=True)
class Budget:
    """How a plan is cut so that it fits the memory.

    Attributes:
        workers: groups written side by side.
        per_worker: bytes that one worker may hold, its write buffers left out.
        in_flight: upper bound of the bytes all workers hold together.

    """

    workers: int
    per_worker: int
    in_flight: int


def make_budget(sink: TensorSink, workers: int, max_memory: int) -> Budget:
    """Divide ``max_memory`` bytes among at most ``workers`` workers.

    Raises:
        ResourceError: if not even one worker could hold the largest step's smallest piece.

    """
    steps = [step for group in sink.groups for step in group.steps]
    least = max((_cost(step, 1), step.outputs[0].name) for step in steps)
    need = least[0] + sink.buffer_bytes
    if need > max_memory:
        raise ResourceError(
            f"--max-memory {human(max_memory)} is too little: {least[1]} needs "
            f"{human(need)}; give at least that much"
        )
    workers = max(1, min(workers, len(sink.groups), max_memory // need))
    share = max_memory // workers - sink.buffer_bytes
    largest = max(_cost(step, _units_per_piece(step, share)) for step in steps)
    return Budget(workers, share, workers * (largest + sink.buffer_bytes))


def _cost(step: Step, units: int) -> int:
    """Bytes held while ``units`` of a step are at work: two sets of input, one being read ahead,
    the decoded tensor, the rewritten one (which is often a view, but need not be), what it is
    encoded to, and the encoded parts that wait for the first one to end.
    """
    encoded = [o for o in step.outputs if o.codec]
    parts = [dict(o.parts) for o in encoded]
    hints = sum(
        found[name].nbytes for o, found in zip(encoded, parts, strict=True) for name in o.hints
    )
    waiting = sum(spec.nbytes for o in encoded for _, spec in o.parts[1:])
    decoded = sum(i.spec.nbytes for i in step.inputs if i.codec) + sum(o.nbytes for o in encoded)
    slack = 4 * PAGE * sum(len(i.parts) for i in step.inputs)
    # scratch memory at most doubles when it grows
    reused = 2 * (2 * (step_bytes_in(step) + hints) + decoded)
    rewritten = sum(o.spec.nbytes for o in step.outputs)
    if {i.spec.dtype for i in step.inputs} != {o.spec.dtype for o in step.outputs}:
        rewritten *= 2  # once before the cast, once after it
    return (reused + rewritten) * units // step.units + 2 * waiting + slack


def _units_per_piece(step: Step, share: int) -> int:
    made = sum(o.spec.nbytes if o.box else o.nbytes for o in step.outputs)
    wanted = max(1, PIECE_BYTES * step.units // max(1, made))
    fitting = max(1, share // max(1, _cost(step, 1)))
    return min(step.units, wanted, fitting)


def _pieces(group: Group, budget: Budget) -> Iterator[Piece]:
    for step in group.steps:
        size, before = _units_per_piece(step, budget.per_worker), 0
        for first, last in step.runs:
            for start in range(first, last, size):
                stop = min(start + size, last)
                yield Piece(step, start, stop, before)
                before += stop - start


class _Memory:
    """What one worker reuses from piece to piece: one input at work, one being read, one result,
    and from step to step the parts that are written last.
    """

    def __init__(self, device: Device) -> None:
        self.stored = (Scratch(), Scratch())
        self.made = device.memory()
        self.waiting = device.memory()


class Executor:
    """Runs one plan.

    Args:
        plan: what to do.
        source: where tensors come from.
        sink: where they go.
        validators: those of stage ``tensor`` see every piece.
        progress: called with the bytes of output just finished, from any thread.
        hints: where the hints that the plan names are read.
        notes: takes and keeps what is found out about each group.
        device: where to compute.
        groups: those to write; all of the sink's by default. Other processes write the others.

    """

    def __init__(
        self,
        plan: ConversionPlan,
        source: TensorSource,
        sink: TensorSink,
        validators: Iterable[Validator] = (),
        progress: Progress = lambda nbytes: None,
        hints: TensorSource | None = None,
        notes: Notes | None = None,
        groups: Sequence[Group] | None = None,
        device: Device | None = None,
    ) -> None:
        self._plan, self._source, self._sink = plan, source, sink
        self._hints, self._notes = hints, notes or Notes(None, Spoiled(keep=False))
        self._device = device or Device()
        self._groups = sink.groups if groups is None else groups
        self._shared = len(self._groups) < len(sink.groups)
        self._validators = [v for v in validators if v.stage == "tensor"]
        self._progress = progress
        self._stop = threading.Event()

    def run(self, budget: Budget) -> None:
        """Write every group that is ours and not done yet.

        Raises:
            ConvertError, OSError: the first problem of any worker; the others stop at their next
                piece, and finished groups stay.

        """
        todo: list[Group] = []
        for group in self._groups:
            if self._sink.done(group) and self._notes.recall(group):
                self._progress(group.nbytes)
            else:
                todo.append(group)
        with (
            _loading(todo, self._device),
            torch_threads(budget.workers),
            ThreadPoolExecutor(budget.workers, "convert") as pool,
        ):
            self._run_groups(pool, todo, budget)

    def _run_groups(self, pool: ThreadPoolExecutor, todo: Sequence[Group], budget: Budget) -> None:
        local = threading.local()
        jobs = [pool.submit(self._run_group, group, budget, local) for group in todo]
        try:
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
        finally:
            self._stop.set()
            for job in jobs:
                job.cancel()

    def _run_group(self, group: Group, budget: Budget, local: threading.local) -> None:
        if self._stop.is_set():
            return
        with self._alone(group), self._notes.listening(group), self._device.at_work():
            if not (self._shared and self._sink.done(group) and self._notes.recall(group)):
                self._write_group(group, budget, local)

    @contextlib.contextmanager
    def _alone(self, group: Group) -> Iterator[None]:
        """Hold a group against a process that was started twice."""
        if not self._shared or self._notes.folder is None:
            yield
            return
        held = claim(self._notes.folder / f"{CLAIM}{flat(group)}.lock")
        if held is None:
            raise ConvertError(
                f"{group.name}: another process is writing it; wait for it to end, or stop it"
            )
        try:
            yield
        finally:
            os.close(held)

    def _write_group(self, group: Group, budget: Budget, local: threading.local) -> None:
        memory = local.__dict__.setdefault("memory", _Memory(self._device))
        writer = self._sink.open(group)
        encoder, spoiled = Encoder(writer, memory.waiting), Spoiled(keep=bool(self._plan.kept))
        try:
            for piece, stored in read_ahead(
                list(_pieces(group, budget)), self._read, memory.stored
            ):
                if self._stop.is_set():
                    writer.abort()
                    return
                for of, parts in zip(piece.step.inputs, stored.inputs, strict=True):
                    spoiled.look(of, parts, piece.start, piece.stop)
                self._convert(piece, stored, memory.made, writer, encoder)
            self._notes.keep(group, encoder.losses, spoiled)
        except BaseException:
            writer.abort()
            raise
        writer.close()
        self._notes.complete(group)

    def is_finished(self, group: Group) -> bool:
        """Whether nobody has to do a group again."""
        return self._sink.done(group) and self._notes.are_there(group)

    def recall_others(self) -> None:
        """Take up what was found out about the groups that other processes wrote."""
        mine = {group.name for group in self._groups}
        for group in self._sink.groups:
            if group.name not in mine:
                self._notes.recall(group)

    def _read(self, piece: Piece, scratch: Scratch) -> _Stored:
        step = piece.step
        return _Stored(
            [read_parts(self._source, piece, i, scratch) for i in step.inputs],
            [self._read_hints(piece, output, scratch) for output in step.outputs],
        )

    def _read_hints(self, piece: Piece, of: Output, scratch: Scratch) -> list[Tensor] | None:
        if self._hints is None or not of.hints:
            return None
        specs = dict(of.parts)
        return [self._hints.read(n, piece.rows(specs[n].shape[0]), scratch) for n in of.hints]

    def _originals(self, piece: Piece, of: Output) -> Tensor | None:
        """The source's own first part, where its residue was kept."""
        read = getattr(self._hints, "original", None)
        name, spec = of.parts[0]
        found = read and read(name, spec, piece.rows(spec.shape[0]))
        return None if found is None else self._device.here(found)

    def _convert(
        self,
        piece: Piece,
        stored: _Stored,
        scratch: Scratch,
        writer: GroupWriter,
        encoder: Encoder,
    ) -> None:
        scratch.reset()
        tensors = [
            decoded(
                i,
                list(map(self._device.here, parts)),
                scratch,
                as_is=isinstance(piece.step.rule.op, Copy),
            )
            for i, parts in zip(piece.step.inputs, stored.inputs, strict=True)
        ]
        op = piece.step.rule.op
        if self._plan.direction in ("export", "reshard"):
            require_equal(piece.step.inputs, tensors)
        made = (
            op.inverse(tensors[0]) if self._plan.direction == "export" else (op.forward(tensors),)
        )
        hinted = [h and list(map(self._device.here, h)) for h in stored.hints]
        for output, tensor, hints in zip(piece.step.outputs, made, hinted, strict=True):
            if tensor.numel() * piece.step.units != output.spec.numel * (piece.stop - piece.start):
                raise ConvertError(
                    f"{output.name}: {op} made {list(tensor.shape)} for units {piece.start} to "
                    f"{piece.stop} of {output.spec}; the op is wrong, report it to its plugin"
                )
            rows = piece.place(output)
            if output.codec:
                self._validate(output.name, rows, tensor)
                originals = partial(self._originals, piece, output) if hints else None
                encoder.write(output, rows, tensor, hints, scratch, originals)
                self._progress(output.nbytes * (piece.stop - piece.start) // piece.step.units)
            else:
                tensor = cast(_part(tensor, output, piece), output.spec.dtype, output.name)
                self._validate(output.name, rows, tensor)
                writer.write(output.name, rows, self._device.to_write(tensor))
                self._progress(tensor.nbytes)

    def _validate(self, name: str, rows: slice, tensor: Tensor) -> None:
        for validator in self._validators:
            for finding in validator.check(self._plan, name, rows, tensor):
                if finding.severity == "error":
                    raise MismatchError(f"{finding.where}: {finding.what}; {finding.remedy}")


@contextlib.contextmanager
def _loading(groups: Sequence[Group], device: Device) -> Iterator[None]:
    """Meanwhile let codecs load what takes long: what comes first in a model is in no codec's form."""
    steps = [step for group in groups for step in group.steps]
    used = {id(o.codec): (o.codec, True) for step in steps for o in step.outputs}
    used |= {id(i.codec): (i.codec, False) for step in steps for i in step.inputs}
    with ThreadPoolExecutor(1, "load") as pool:
        for codec, encodes in used.values():
            if codec and codec.load:
                pool.submit(codec.load, device.name, encodes=encodes)
        yield


def _part(tensor: Tensor, output: Output, piece: Piece) -> Tensor:
    """What one rank has of a piece."""
    inner = output.box[1:]
    cut_rows = bool(output.box) and piece.step.units == 1
    if not cut_rows and all(
        r == ((0, size),) for r, size in zip(inner, output.spec.shape[1:], strict=False)
    ):
        return tensor
    whole = tensor.reshape(-1, *output.spec.shape[1:])
    rows = output.box[0] if cut_rows else ((0, len(whole)),)
    return take(whole, (rows, *inner))


def cast(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """Round to ``dtype`` (to nearest, ties to even); exact when ``dtype`` is wider.

    Raises:
        ConvertError: if a finite value would become infinite.

    """
    wanted = torch_dtype(dtype)
    if tensor.dtype == wanted:
        return tensor
    rounded = tensor.to(wanted)
    if wanted.itemsize <= tensor.dtype.itemsize and bool((rounded.isinf() & ~tensor.isinf()).any()):
        raise ConvertError(
            f"{name}: holds values too large for {dtype}; choose a wider type (bfloat16 or float32)"
        )
    return rounded
