"""The Python API: prepare a conversion, look at it, run it.

>>> from gptoss_convert.convert import import_checkpoint
>>> import_checkpoint("openai/gpt-oss-20b", "models/gpt-oss-20b")  # doctest: +SKIP
"""

from __future__ import annotations

import errno
import hashlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gptoss_convert
from gptoss_convert.dtypes import from_torch_name
from gptoss_convert.errors import (
    CheckpointError,
    ConfigError,
    ConvertError,
    IncompleteError,
    MismatchError,
    ResourceError,
    blame,
)
from gptoss_convert.execute import (
    DEFAULT_MAX_MEMORY,
    Executor,
    Progress,
    default_workers,
    make_budget,
)
from gptoss_convert.plan import ConversionPlan, make_plan
from gptoss_convert.registry import Registry, default_registry
from gptoss_convert.staging import Staging, human, require_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptoss_convert.fit import Direction
    from gptoss_convert.types import Config, Format, ModelFamily, Side, TensorSink, TensorSource

log = logging.getLogger("gptoss_convert")
RESIDENT = 320 << 20  # Python with torch imported and its threads, measured and rounded up


@dataclass(frozen=True)
class Choice:
    """Names that decide between plugins where several would do (``--model`` and so on)."""

    model: str | None = None
    codec: str | None = None
    format: str | None = None


@dataclass(frozen=True)
class Result:
    """What a conversion did."""

    plan: ConversionPlan = field(repr=False)
    target: Path
    seconds: float
    resumed: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values; the schema is described in docs/json.md."""
        return {
            "schema": "gptoss-convert.result/1",
            "direction": self.plan.direction,
            "model": self.plan.family,
            "target": str(self.target),
            "parameters": self.plan.parameters,
            "bytes_in": self.plan.bytes_in,
            "bytes_out": self.plan.bytes_out,
            "seconds": round(self.seconds, 3),
            "resumed": self.resumed,
        }


@dataclass(frozen=True)
class Conversion:
    """A prepared conversion: everything is known, nothing has been written."""

    plan: ConversionPlan
    source: TensorSource
    target_format: Format
    registry: Registry

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
    ) -> Result:
        """Convert into the folder ``target``, which appears whole or not at all.

        Args:
            target: the folder to make.
            workers: groups (layers or shards) written side by side; None picks.
            max_memory: bound of the bytes in flight.
            overwrite: whether a non-empty target may be replaced.
            progress: called with the bytes of output just finished, from any thread.

        Raises:
            ConvertError: see its subclasses for the exit codes.

        """
        started = time.monotonic()
        staging = Staging(Path(target), self._key(), overwrite=overwrite)
        self._check(staging)
        sink = self.sink(staging.folder)
        budget = make_budget(sink, workers or default_workers(), max_memory)
        check_memory(budget.in_flight + RESIDENT)
        staging.check_space(sink.nbytes)
        resumed = staging.open()
        if resumed:
            log.info("going on with the unfinished %s", staging.folder)
        try:
            validators = self.registry.validators().values()
            Executor(self.plan, self.source, sink, validators, progress).run(budget)
            sink.finish()
            self._validate("checkpoint", staging.folder)
            staging.publish()
        except BaseException as error:
            _stopped(error, staging, sink)
        return Result(self.plan, staging.target, time.monotonic() - started, resumed)

    def _key(self) -> str:
        """Stands for all that decides the bytes of the result."""
        facts = (
            self.plan.digest(),
            self.source.fingerprint(),
            self.target_format.name,
            gptoss_convert.__version__,
        )
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def _check(self, staging: Staging) -> None:
        """All that can be refused before the first byte."""
        target, source = staging.target.resolve(), self.source.path.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise ConvertError(
                f"{target}: contains the source or lies in it ({source}); choose another target"
            )
        staging.check_target()
        self.source.check()
        self._validate("plan", None)
        for wide, narrow in self.plan.casts:
            log.warning("rounding %s to %s (to nearest, ties to even)", wide, narrow)

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


def _stopped(error: BaseException, staging: Staging, sink: TensorSink) -> None:
    """Keep finished work if going on makes sense, else remove it; then raise what the user needs."""
    done = sum(sink.done(group) for group in sink.groups)
    resumable = isinstance(error, OSError) or not isinstance(error, Exception)  # Ctrl-C
    if not resumable or not done:
        staging.discard()
    else:
        staging.release()
    if not isinstance(error, OSError):
        raise error
    where = error.filename or staging.target
    again = f"; {done} of {len(sink.groups)} parts are done, run the same command again to go on"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"{where}: the disk is full; make room and run the same command again"
        raise ResourceError(text) from error
    raise IncompleteError(f"{where}: {error.strerror or error}{again}") from error


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


def open_source(
    path: str | Path,
    side: Side | None = None,
    *,
    registry: Registry | None = None,
    choice: Choice | None = None,
    revision: str | None = None,
    headers_only: bool = False,
) -> TensorSource:
    """Open a checkpoint for reading.

    Args:
        path: a folder, or a name that a format of that side can resolve (a hub id).
        side: ``hf`` or ``megatron``; None takes whichever format recognises it.
        registry: the plugins; the installed ones by default.
        choice: decides where several formats would do.
        revision: of a hub id.
        headers_only: tensors will not be read, so a hub id need not be fetched whole.

    Raises:
        CheckpointError: if there is no such checkpoint, or nothing can read it.

    """
    registry = registry or default_registry()
    folder = _locate(str(path), side, registry, revision, headers_only)
    name = (choice or Choice()).format
    found = registry.format_of(folder, side, name if name in registry.formats(side) else None)
    if found is None:
        kinds = " or ".join(sorted(registry.formats(side)))
        raise CheckpointError(
            f"{folder}: holds no checkpoint in the format {kinds}; check the path"
        )
    return found.open(folder)


def _locate(
    name: str, side: Side | None, registry: Registry, revision: str | None, headers_only: bool
) -> Path:
    folder = Path(name).expanduser()
    if not folder.exists():
        for candidate in registry.formats(side).values():
            if candidate.resolve and looks_like_an_id(name):
                return candidate.resolve(name, revision, headers_only)
    require_checkpoint(folder)
    return folder


def looks_like_an_id(name: str) -> bool:
    """``org/model``, and not a path."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/")


def prepare_import(
    hf_model: str | Path,
    *,
    torch_dtype: str | None = None,
    registry: Registry | None = None,
    choice: Choice | None = None,
    revision: str | None = None,
    headers_only: bool = False,
) -> Conversion:
    """Plan Hugging Face -> Megatron.

    Args:
        hf_model: folder or hub id.
        torch_dtype: element type to write (``bfloat16``, ``float16``, ``float32``); None keeps
            the source's.
        registry: the plugins; the installed ones by default.
        choice: decides where several plugins would do.
        revision: of a hub id.
        headers_only: only look at the plan; shards may hold no data yet.

    Raises:
        ConvertError: everything that does not fit, at once.

    """
    registry, choice = registry or default_registry(), choice or Choice()
    source = open_source(
        hf_model,
        "hf",
        registry=registry,
        choice=choice,
        revision=revision,
        headers_only=headers_only,
    )
    name = str(hf_model)
    hub_id = name if looks_like_an_id(name) and not Path(name).exists() else None
    return _prepare("import", source, _own_config(source), torch_dtype, registry, choice, hub_id)


def prepare_export(
    megatron_path: str | Path,
    *,
    hf_model: str | Path | None = None,
    export_dtype: str | None = None,
    registry: Registry | None = None,
    choice: Choice | None = None,
    revision: str | None = None,
) -> Conversion:
    """Plan Megatron -> Hugging Face.

    Args:
        megatron_path: root or ``iter_*`` folder.
        hf_model: a reference; its config and tokenizer serve where the checkpoint has none, and
            it must be the same model where the checkpoint has its own.
        export_dtype: element type to write; None keeps the checkpoint's.
        registry: the plugins; the installed ones by default.
        choice: decides where several plugins would do.
        revision: of a hub id.

    Raises:
        ConvertError: everything that does not fit, at once.

    """
    registry, choice = registry or default_registry(), choice or Choice()
    source = open_source(megatron_path, "megatron", registry=registry, choice=choice)
    reference = _reference(hf_model, source, registry, revision)
    if source.config is None and reference is not None:
        config, files = _own_config(reference), reference.files
    else:
        config, files = config_of(source, registry, choice), source.files
        if reference is not None:
            _require_same_model(config, _own_config(reference), registry, choice, hf_model)
    return _prepare("export", source, config, export_dtype, registry, choice, None, files)


def _reference(
    hf_model: str | Path | None, source: TensorSource, registry: Registry, revision: str | None
) -> TensorSource | None:
    """The reference model, if one is named; a hub id that is not needed is not fetched."""
    if hf_model is None:
        return None
    elsewhere = looks_like_an_id(str(hf_model)) and not Path(hf_model).expanduser().exists()
    if source.config is not None and elsewhere:
        log.info("%s is not needed: the checkpoint carries its own config", hf_model)
        return None
    return open_source(hf_model, "hf", registry=registry, revision=revision, headers_only=True)


def _require_same_model(
    own: Config, other: Config, registry: Registry, choice: Choice, where: str | Path | None
) -> None:
    families = [registry.model_for(c, choice.model) for c in (own, other)]
    mine, theirs = (
        _megatron_config(f, c, "config.json") for f, c in zip(families, (own, other), strict=False)
    )
    differ = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    if differ:
        raise CheckpointError(
            f"{where}: is another model than the Megatron checkpoint ({', '.join(differ)} differ); "
            f"name the right one, or leave --hf-model out"
        )


def config_of(source: TensorSource, registry: Registry, choice: Choice) -> Config:
    """Hugging Face's config of a checkpoint; made from Megatron's fields if that is all it has.

    Raises:
        CheckpointError: it carries neither, or not enough.

    """
    if source.config is not None:
        return source.config
    fields = source.megatron_config
    families = registry.models()
    name = choice.model or (next(iter(families)) if len(families) == 1 else None)
    if fields is None or name not in families:
        raise CheckpointError(
            f"{source.path}: carries no config of its model; name one with --hf-model"
            + ("" if fields is None else f" or --model ({' or '.join(sorted(families))})")
        )
    try:
        return families[name].hf_config(fields)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{source.path}: its Megatron config does not describe a {name} model whole ({error} is "
            f"missing); name the model with --hf-model"
        ) from None


def _own_config(source: TensorSource) -> Config:
    if source.config is None:
        raise ConfigError(f"{source.path}: has no config.json; fetch the whole checkpoint")
    return source.config


def _prepare(
    direction: Direction,
    source: TensorSource,
    config: Config,
    dtype: str | None,
    registry: Registry,
    choice: Choice,
    hub_id: str | None,
    files: Mapping[str, Path] | None = None,
) -> Conversion:
    where = str(source.path)
    family = registry.model_for(config, choice.model)
    _megatron_config(family, config, where)
    importing = direction == "import"
    plan = make_plan(
        direction,
        source.specs(),
        family,
        config,
        where=where,
        codec=registry.codec_for(config, choice.codec) if importing else None,
        known_codecs=registry.codecs().values(),
        dtype=from_torch_name(dtype) if dtype else None,
        files=source.files if files is None else files,
        name_or_path=hub_id,
    )
    side: Side = "megatron" if importing else "hf"
    return Conversion(plan, source, _target_format(side, registry, choice), registry)


def _megatron_config(family: ModelFamily, config: Config, where: str) -> dict[str, Any]:
    """The config in Megatron's fields; every absent or mistyped field is named at once."""
    wrong = [
        f"{name} is missing" if name not in config else f"{name} is {config[name]!r}"
        for name, kind in family.fields.items()
        if not isinstance(config.get(name), kind)
        or isinstance(config.get(name), bool) != (kind is bool)
    ]
    if wrong:
        raise ConfigError(
            f"{where}: config.json: {'; '.join(wrong)}; restore the model's own config.json"
        )
    with blame(f"model family {family.name}"):
        return family.megatron_config(config)


def _target_format(side: Side, registry: Registry, choice: Choice) -> Format:
    formats = registry.formats(side)
    only = next(iter(formats)) if len(formats) == 1 else None
    name = choice.format if choice.format in formats else only
    if name is None:
        raise ConvertError(
            f"choose the format to write with --format {' or '.join(sorted(formats))}"
        )
    return formats[name]


def import_checkpoint(
    hf_model: str | Path,
    megatron_path: str | Path,
    *,
    torch_dtype: str | None = None,
    registry: Registry | None = None,
    choice: Choice | None = None,
    revision: str | None = None,
    **options: Any,
) -> Result:
    """Hugging Face -> Megatron; arguments as for prepare_import and Conversion.run."""
    conversion = prepare_import(
        hf_model, torch_dtype=torch_dtype, registry=registry, choice=choice, revision=revision
    )
    return conversion.run(megatron_path, **options)


def export_checkpoint(
    megatron_path: str | Path,
    hf_path: str | Path,
    *,
    hf_model: str | Path | None = None,
    export_dtype: str | None = None,
    registry: Registry | None = None,
    choice: Choice | None = None,
    revision: str | None = None,
    **options: Any,
) -> Result:
    """Megatron -> Hugging Face; arguments as for prepare_export and Conversion.run."""
    conversion = prepare_export(
        megatron_path,
        hf_model=hf_model,
        export_dtype=export_dtype,
        registry=registry,
        choice=choice,
        revision=revision,
    )
    return conversion.run(hf_path, **options)
