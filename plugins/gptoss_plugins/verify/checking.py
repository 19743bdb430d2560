"""``verify``: what is found out of one checkpoint, or of two beside each other."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_convert.compare import finite
from gptoss_convert.crew import current_crew
from gptoss_convert.damage import check_manifest
from gptoss_convert.errors import ConvertError, NoCheckpointError, PlanError, PluginError
from gptoss_convert.logical import Logical, open_logical
from gptoss_convert.manifest import MANIFEST, read_manifest, root_of
from gptoss_convert.progress import reporting
from gptoss_convert.types import Finding
from gptoss_plugins.adapter.finding import halves
from gptoss_plugins.verify.naming import broken, problem
from gptoss_plugins.verify.shares import together
from gptoss_plugins.verify.states import zero_sinks
from gptoss_plugins.verify.values import Values, compare_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from gptoss_convert.compare import Difference
    from gptoss_convert.execute import Progress
    from gptoss_convert.opening import Choice
    from gptoss_convert.registry import Registry
    from gptoss_convert.types import Config, TensorSource

SCHEMA = "gptoss-convert.verify/1"


@dataclass
class Report:
    """What was found out.

    Attributes:
        paths: the checkpoints as the user named them.
        formats: theirs; None where that could not be told.
        findings: what is wrong or worth a look.
        values: of the tensors, if they were read.
        tolerance: the relative error up to which tensors count as the same.
        logits: what running both models showed, as plain values, if they were run.
        files: how many were held against the manifest; None if there was none to hold them against.
        seconds: how long it took.

    """

    paths: tuple[str, ...]
    formats: list[str | None] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    values: Values | None = None
    tolerance: float = 0.0
    logits: dict[str, Any] | None = None
    files: int | None = None
    seconds: float = 0.0

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.severity == "error" for finding in self.findings)

    def take(self, path: str, error: ConvertError) -> None:
        """Note an error that left nothing to look at, if something is known to be wrong already:
        a damaged file may be why. Otherwise it is raised, for then nothing was found out.
        """
        if self.is_sound:
            raise error
        self.findings += _found(path, error)

    def look(self, check: Callable[..., Iterable[Finding]], *checkpoints: Logical | None) -> None:
        """Add what a check finds, or that a file could not be read which is read only now."""
        try:
            self.findings += check(*checkpoints)
        except ConvertError as error:
            self.findings += _found(" and ".join(self.paths), error)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the schema is described in docs/json.md."""
        values = self.values.tensors.values() if self.values else ()
        return {
            "schema": SCHEMA,
            "paths": list(self.paths),
            "formats": self.formats,
            "sound": self.is_sound,
            "tolerance": finite(self.tolerance),
            "findings": [asdict(finding) for finding in self.findings],
            "tensors": [
                {
                    "name": tensor.name,
                    "layer": tensor.layer,
                    "shape": list(tensor.shape),
                    "dtypes": list(tensor.dtypes),
                    **tensor.difference.to_json(),
                }
                for tensor in values
            ]
            if self.values
            else None,
            "logits": self.logits and plain(self.logits),
            "files": self.files,
            "seconds": round(self.seconds, 3),
        }


def open_both(
    paths: Iterable[str],
    registry: Registry,
    choice: Choice,
    report: Report,
    *,
    reference: Config | None = None,
    revision: str | None = None,
) -> list[Logical]:
    """The checkpoints that can be looked into; what is wrong with the others is a finding.

    Raises:
        NoCheckpointError: there is none by that name.
        PluginError: no plugin can look into it, or several would.

    """
    names, opened = list(paths), dict[int, Logical]()
    order = sorted(range(len(names)), key=lambda n: not (Path(names[n]) / "config.json").is_file())
    for number in order:  # one that carries its config first, to lend it to one that does not
        path, lent = names[number], next((one.config for one in opened.values()), None)
        try:
            opened[number] = open_logical(
                path, registry, choice, config=reference or lent, revision=revision
            )
        except (NoCheckpointError, PluginError) as error:
            report.take(path, error)
        except ConvertError as error:
            report.findings += _found(path, error)
    return [opened[number] for number in sorted(opened)]


def check_bytes(path: str, report: Report, *, workers: int | None, show: bool) -> None:
    """Hold a folder's files against its manifest, if it has one; ``show`` progress meanwhile."""
    started = time.monotonic()
    if (root := root_of(Path(path))) is None:
        report.findings.append(
            Finding(
                "info",
                path,
                f"has no {MANIFEST}, so its bytes are checked against nothing",
                "name the checkpoint it was made from as well, to compare their values",
            )
        )
        return
    try:
        files = read_manifest(root).files
        size = sum(file.nbytes for file in files.values())
        with reporting("verify", size, show=show) as progress:
            report.findings += check_manifest(root, workers=workers, progress=progress)
        report.files = len(files)
    except ConvertError as error:
        report.findings.append(broken(str(root), str(error)))
    report.seconds += time.monotonic() - started


def check_adapter(path: str, source: TensorSource, report: Report) -> None:
    """Look at an adapter, as far as that can be done without its model."""
    report.findings += _whole(path, source)
    for names in ((".lora_A.", ".lora_B."), (".linear_in.", ".linear_out.")):
        report.findings += (problem(path, text) for text in halves(source.specs(), *names))
    report.findings.append(
        Finding(
            "info",
            path,
            "is an adapter, and whether it fits a model was not looked at",
            "name the model, what the two were merged to, and this with --adapter",
        )
    )


def check(
    first: Logical,
    second: Logical | None,
    report: Report,
    registry: Registry,
    *,
    values: bool,
    sinks: bool = False,
    workers: int | None = None,
    progress: Progress = lambda nbytes: None,
) -> bool:
    """Look at headers, config and, if wanted, at all values.

    Args:
        first: a checkpoint.
        second: what it is compared with.
        report: what is found goes here.
        registry: the plugins.
        values: whether to read all tensors.
        sinks: whether to read the sinks where not all is read; they are tiny.
        workers: pieces at work side by side.
        progress: called with the bytes just read, from any thread.

    Returns:
        whether the report is whole; False in all but one of several processes.

    """
    started = time.monotonic()
    validators = list(registry.validators().values())
    checkpoints = [one for one in (first, second) if one]
    for one in checkpoints:
        report.findings += _complete(one)
    for validator in (v for v in validators if v.stage == "model"):
        report.look(validator.check, first, second)
    if sinks:
        report.look(zero_sinks, first)
    if values:
        crew = current_crew()
        share = compare_values(
            first,
            second,
            validators,
            codecs=registry.codecs().values(),
            workers=workers,
            progress=progress,
            crew=crew,
        )
        report.values = together(share, crew, first, second)
        if report.values is None:
            return False
        report.findings += report.values.findings
        if second:
            report.findings += _different(report.values, report.tolerance)
    report.seconds += time.monotonic() - started
    return values or current_crew().rank == 0


def _found(path: str, error: ConvertError) -> list[Finding]:
    """What an error says, as findings."""
    if isinstance(error, PlanError):
        return [problem(path, text) for text in error.problems]
    return [broken(path, str(error))]


def _complete(of: Logical) -> Iterator[Finding]:
    """Everything that the table names is there, and nothing else."""
    path = str(of.source.path)
    yield from _whole(path, of.source)
    yield from (problem(path, text) for text in of.problems)


def _whole(path: str, source: TensorSource) -> Iterator[Finding]:
    """Files that are missing, or cut short."""
    try:
        source.check()
    except ConvertError as error:
        yield from _found(path, error)


def _different(values: Values, tolerance: float) -> Iterator[Finding]:
    """Tensors further apart than they may be."""
    named = {finding.where for finding in values.findings if finding.severity == "error"}
    for tensor in values.tensors.values():
        found = tensor.difference
        if found.is_equal or found.relative <= tolerance:
            continue
        if found.squares == 0:  # all that differs is NaN or infinite, and was told
            continue
        share = (found.elements - found.equal) / found.elements
        near = f"at a relative error of {found.relative:.3g} and a largest of {found.largest:.3g}"
        if not found.powers[0]:
            near = f"where A has only zeros; the largest is {found.largest:.3g}"
        remedy = "make B again from the model that A is"
        if tensor.name in named:
            remedy = ""  # the mistake that was found is to be mended, and not to be tolerated
        elif found.relative < 1:
            remedy = f"if the checkpoints may differ so far, say --tolerance {_allowing(found)}"
        what = f"differs in {found.elements - found.equal:,} elements ({share:.2%}), {near}"
        yield Finding("error", tensor.name, what, remedy)


def _allowing(found: Difference) -> str:
    """The least tolerance of two digits that lets a difference pass."""
    step = 10.0 ** (math.floor(math.log10(found.relative)) - 1)
    return f"{math.ceil(1.001 * found.relative / step) * step:.2g}"


def plain(logits: dict[str, Any]) -> dict[str, Any]:
    """Their figures for JSON: null for what is not defined."""
    return {name: finite(x) if isinstance(x, float) else x for name, x in logits.items()}
