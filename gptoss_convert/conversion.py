"""A prepared conversion, and running it."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import gptoss_convert
from gptoss_convert.blockio import write_note
from gptoss_convert.crew import COMMAND, Crew, claim, current_crew
from gptoss_convert.device import working_on
from gptoss_convert.dtypes import itemsize
from gptoss_convert.errors import (
    CheckpointError,
    ConvertError,
    IncompleteError,
    MismatchError,
    ResourceError,
)
from gptoss_convert.execute import (
    CLAIM,
    DEFAULT_MAX_MEMORY,
    Budget,
    Executor,
    Progress,
    default_workers,
    make_budget,
)
from gptoss_convert.filesums import sums_in
from gptoss_convert.loss import Loss, total
from gptoss_convert.manifest import MANIFEST, Manifest
from gptoss_convert.notes import FOUND, LOSS, SUMS, Notes
from gptoss_convert.provenance import origin
from gptoss_convert.spoiled import Spoiled
from gptoss_convert.staging import Staging, human
from gptoss_convert.types import MegatronSink

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gptoss_convert.plan import ConversionPlan
    from gptoss_convert.registry import Registry
    from gptoss_convert.types import Format, TensorSink, TensorSource

log = logging.getLogger("gptoss_convert")
COMMIT = ".commit"  # held by the process that puts the result of several in place
_NOTES = (LOSS, FOUND, SUMS, CLAIM, COMMAND, COMMIT)
RESIDENT = 432 << 20  # Python with torch and numba, compiling and threads, measured and rounded up


@dataclass(frozen=True)
class Result:
    """What a conversion did."""

    plan: ConversionPlan = field(repr=False)
    target: Path
    bytes_out: int
    seconds: float
    resumed: bool
    losses: Mapping[str, Loss] = field(default_factory=dict, repr=False)
    finished: bool = True  # False if another process put it in place, or will
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """Plain values; the schema is described in docs/json.md."""
        return {
            "schema": "gptoss-convert.result/1",
            "direction": self.plan.direction,
            "model": self.plan.family,
            "target": str(self.target),
            "parameters": self.plan.parameters,
            "bytes_in": self.plan.bytes_in,
            "bytes_out": self.bytes_out,
            "seconds": round(self.seconds, 3),
            "resumed": self.resumed,
            "encoding": self._encoding() if self.losses else None,
        }

    @property
    def encoding(self) -> Mapping[str, str]:
        """The codec that wrote and its options, those that it chose itself as it chose them."""
        told, outputs = self.plan.encoding, (o for s in self.plan.steps for o in s.outputs)
        codec = next((o.codec for o in outputs if o.codec), None)
        if codec is None or codec.settle is None:
            return told
        options = {name: value for name, value in told.items() if name != "codec"}
        return {**told, **codec.settle(self.device, **options)}

    def _encoding(self) -> dict[str, Any]:
        """What encoding cost, in all and per tensor."""
        tensors = [{"name": name, **self.losses[name].to_json()} for name in sorted(self.losses)]
        return {
            **self.encoding,
            "total": total(self.losses.values()).to_json(),
            "tensors": tensors,
        }


@dataclass(frozen=True)
class Conversion:
    """A prepared conversion: everything is known, nothing has been written."""

    plan: ConversionPlan
    source: TensorSource
    target_format: Format
    registry: Registry
    reference: Path | None = None
    hints: TensorSource | None = None

    def sink(self, folder: Path) -> TensorSink:
        """The sink that would write to ``folder``; touches no disk."""
        return self.target_format.create(folder, self.plan)

    def run(
        self,
        target: str | Path,
        *,
        workers: int | None = None,
        max_memory: int = DEFAULT_MAX_MEMORY,
        overwrite: bool = False,
        progress: Progress = lambda nbytes: None,
        command: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> Result:
        """Convert into the folder ``target``, which appears whole or not at all.

        Args:
            target: the folder to make.
            workers: groups (layers or shards) written side by side; None picks.
            max_memory: bound of the bytes in flight.
            overwrite: whether a target that holds a checkpoint may be replaced.
            progress: called with the bytes of output just finished, from any thread.
            device: ``cpu`` or ``cuda``, where to compute; the result is the same.
            command: how to do this again, kept while several processes are at it.

        As one of several processes (``crew.py``) it does its share, and puts the result in place
        if nothing is left to do.

        Raises:
            ConvertError: see its subclasses for the exit codes.

        """
        started = time.monotonic()
        crew = current_crew()
        self._check(Path(target))
        key = self._key()
        staging = Staging(
            Path(target),
            key,
            self._is_checkpoint if overwrite else None,
            shared=not crew.is_alone,
        )
        if staging.is_finished and self._is_whole(staging.target):
            log.info("%s: is finished already", staging.target)
            return Result(self.plan, staging.target, 0, 0.0, resumed=True, finished=False)
        staging.recover()
        staging.check_target()
        sink = self.sink(staging.folder)
        budget = make_budget(sink, workers or default_workers(), max_memory)
        check_memory(budget.in_flight + RESIDENT)
        staging.check_space(sink.nbytes)
        try:
            resumed = staging.open()
            if command and crew.size > 1:
                note = staging.folder / f"{COMMAND}{crew.rank}.json"
                resumed = resumed and note.exists()  # or another process has just made the folder
                write_note(note, json.dumps(command).encode())
            if resumed:
                log.info("going on with the unfinished %s", staging.folder)
            notes = Notes(staging.folder, Spoiled(keep=bool(self.plan.kept)))
            with working_on(device) as place:
                executor = Executor(
                    self.plan,
                    self.source,
                    sink,
                    self.registry.validators().values(),
                    progress,
                    self.hints,
                    notes,
                    crew.share(sink.groups),
                    place,
                )
                executor.run(budget)
            if self._key() != key:
                raise CheckpointError(
                    f"{self.source.path}: changed while it was being converted; leave it alone and "
                    f"run again"
                )
            finished = crew.is_alone or self._ready(crew, sink, executor, staging)
            notes.spoiled.tell()
            if finished:
                executor.recall_others()
                self._finish(sink, notes, staging)
        except BaseException as error:
            _stopped(error, staging, sink, crew)
        staging.release()
        seconds = time.monotonic() - started
        losses = notes.losses
        made = sum(group.nbytes for group in sink.groups)
        return Result(self.plan, staging.target, made, seconds, resumed, losses, finished, device)

    def obstacles(self, target: Path | None, budget: Budget) -> list[str]:
        """Why it would not run with that target and budget, a sentence each; changes nothing."""
        memory = budget.in_flight + RESIDENT
        checks: list[Callable[[], None]] = [lambda: check_memory(memory)]
        if target is not None:
            staging = Staging(target, self._key())
            need = self.sink(staging.folder).nbytes
            checks = [
                lambda: self._check_apart(target),
                staging.check_target,
                lambda: staging.check_space(need),
                *checks,
            ]
        found = []
        for check in checks:
            try:
                check()
            except ConvertError as error:
                found.append(str(error))
        return found

    def _ready(self, crew: Crew, sink: TensorSink, executor: Executor, staging: Staging) -> bool:
        """Whether all processes' work is done, and putting it in place falls to this one.

        Raises:
            IncompleteError: it is asked to put it in place, and parts are missing.

        """
        owners = crew.owners(sink.groups)
        missing = [group.name for group in sink.groups if not executor.is_finished(group)]
        if missing and crew.commits_only:
            raise IncompleteError(
                f"{staging.target}: {len(missing)} of {len(sink.groups)} parts are missing; run the "
                f"processes again that did not end well"
            )
        if missing:
            whose = sorted({owners[name] for name in missing})
            log.info(
                "process %d of %d has done its share; %d of %d parts are left, of process %s",
                crew.rank, crew.size, len(missing), len(sink.groups), ", ".join(map(str, whose)),
            )  # fmt: skip
            return False
        held = claim(staging.folder / COMMIT)
        if held is None:
            log.info("another process is putting %s in place", staging.target)
            return False
        return True  # held until the process ends

    def _finish(self, sink: TensorSink, notes: Notes, staging: Staging) -> None:
        """Write what makes the folder a checkpoint, look at it, and put it in place."""
        with notes.listening():
            residues = notes.spoiled.residues()
            if residues and isinstance(sink, MegatronSink):
                sink.keep(residues)
            sink.finish()
        made = origin(self.plan, self.source, self.hints, self.target_format, self.registry)
        files = sums_in(staging.folder, notes.sums, leave_out=_NOTES)
        write_note(staging.folder / MANIFEST, Manifest(made, files).dump())
        self._validate("checkpoint", staging.folder)
        for prefix in _NOTES:
            for note in staging.folder.glob(f"{prefix}*"):
                note.unlink()
        staging.publish()

    def _is_checkpoint(self, folder: Path) -> bool:
        """Whether --overwrite may replace a folder: by its own kind; a parent of checkpoints is none."""
        kind = self.registry.formats(self.target_format.side)
        return any(format_.detect(folder) for format_ in kind.values())

    def _is_whole(self, folder: Path) -> bool:
        """Whether all files that this conversion makes are in a folder."""
        sink = self.sink(folder)
        return all(sink.done(group) for group in sink.groups)

    def _key(self) -> str:
        """Stands for all that decides the bytes of the result."""
        facts = (
            self.plan.digest(),
            self.source.fingerprint(),
            self.hints.fingerprint() if self.hints else "",
            self.target_format.name,
            gptoss_convert.__version__,
            *sorted(f"{p.distribution} {p.version}" for p in self.registry.plugins),
        )
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def _check_apart(self, target: Path) -> None:
        """Refuse a target that contains what is read, or lies in it."""
        hints = self.hints.path if self.hints else None
        for path in filter(None, (self.source.path, self.reference, hints)):
            mine, theirs = target.resolve(), path.resolve()
            if mine == theirs or mine in theirs.parents or theirs in mine.parents:
                raise ConvertError(
                    f"{target}: contains {path}, or lies in it; choose another target"
                )

    def _check(self, target: Path) -> None:
        """What can be refused for the sake of the source and the plan."""
        self._check_apart(target)
        self.source.check()
        if self.hints:
            self.hints.check()
        self._validate("plan", None)
        written = {o.spec.dtype for s in self.plan.steps for o in s.outputs if not o.codec}
        if self.plan.codecs and len(written) > 1:
            log.warning(
                "what %s decodes to does not fit into the type of the other tensors, and keeps its own "
                "(%s); the model is declared %s, which holds both",
                " and ".join(self.plan.codecs), ", ".join(sorted(written)), self.plan.dtype,
            )  # fmt: skip
        if self.plan.encoding and self.plan.dtype != "BF16":
            log.warning(
                "what is not encoded stays %s; for BF16, as models are published, write the checkpoint "
                "with --torch-dtype bfloat16 first",
                self.plan.dtype,
            )
        for before, after in self.plan.casts:
            if itemsize(after) > itemsize(before):
                log.info("widening %s to %s, which is exact", before, after)
            else:
                log.warning("rounding %s to %s (to nearest, ties to even)", before, after)

    def _validate(self, stage: str, folder: Path | None) -> None:
        for validator in self.registry.validators().values():
            if validator.stage != stage:
                continue
            found = validator.check(self.plan, folder) if folder else validator.check(self.plan)
            for finding in found:
                text = f"{finding.where}: {finding.what}"
                if finding.severity == "error":
                    raise MismatchError(f"{text}; {finding.remedy}")
                log.warning("%s", text)


def _stopped(error: BaseException, staging: Staging, sink: TensorSink, crew: Crew) -> NoReturn:
    """Keep finished work if going on makes sense, else remove it; then raise what the user needs."""
    done = sum(sink.done(group) for group in sink.groups)
    resumable = isinstance(error, OSError) or not isinstance(error, Exception)  # Ctrl-C
    if crew.is_alone and (not resumable or not done):
        staging.discard()
    else:
        staging.release()
    if not isinstance(error, OSError):
        raise error
    where = error.filename or staging.target
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"{where}: the disk is full; make room and run the same command again"
        raise ResourceError(text) from error
    text = f"{where}: {error.strerror or error}; "
    if not done:
        raise ConvertError(text + "nothing was written, mend it and try again") from error
    raise IncompleteError(
        f"{text}{done} of {len(sink.groups)} parts are done, run the same command again to go on"
    ) from error


def check_memory(need: int) -> None:
    """Raise ResourceError unless ``need`` bytes of memory are available."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: nothing to compare with
        return
    if need > available:
        raise ResourceError(
            f"{human(need)} of memory are needed and {human(available)} are available; "
            f"lower --max-memory or --workers"
        )
