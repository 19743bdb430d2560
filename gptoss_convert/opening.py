"""Finding and opening a checkpoint: a folder, or a name that a format can resolve."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_convert.errors import CheckpointError, ConfigError, NoCheckpointError
from gptoss_convert.registry import Registry, default_registry
from gptoss_convert.staging import require_checkpoint, unfinished

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptoss_convert.types import Codec, Config, Side, TensorSource

log = logging.getLogger("gptoss_convert")


@dataclass(frozen=True)
class Choice:
    """What a user decides about plugins.

    Attributes:
        model, codec, format: names, where several would do (``--model`` and so on).
        options: of the codec, such as ``{"backend": "table"}``.

    """

    model: str | None = None
    codec: str | None = None
    format: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


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
        NoCheckpointError: if there is no such checkpoint.
        CheckpointError: if nothing can read it.

    """
    registry = registry or default_registry()
    folder = _locate(str(path), side, registry, revision, headers_only)
    found = registry.format_of(folder, side, (choice or Choice()).format)
    if found is None:
        kinds = " or ".join(sorted(registry.formats(side)))
        raise NoCheckpointError(
            f"{folder}: holds no checkpoint in the format {kinds}; check the path"
        )
    if not found.detect(folder):
        raise CheckpointError(
            f"{folder}: is no {found.name} checkpoint, which --format asks for; leave --format out"
        )
    return found.open(folder)


def _locate(
    name: str, side: Side | None, registry: Registry, revision: str | None, headers_only: bool
) -> Path:
    folder = Path(name).expanduser()
    if not folder.exists() and not unfinished(folder):
        for candidate in registry.formats(side).values():
            if candidate.resolve and looks_like_an_id(name):
                return candidate.resolve(name, revision, headers_only)
    require_checkpoint(folder)
    return folder


def hub_id(name: str | Path) -> str | None:
    """The name, if it is a hub id and no folder."""
    there = Path(name).expanduser().exists()
    return str(name) if looks_like_an_id(str(name)) and not there else None


def looks_like_an_id(name: str) -> bool:
    """``org/model``, and not a path."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/")


def config_of(source: TensorSource, registry: Registry, choice: Choice) -> Config:
    """Hugging Face's config of a checkpoint; made from Megatron's fields if that is all it has.

    Raises:
        CheckpointError: it carries neither, or not enough.

    """
    if source.config is not None:
        return source.config
    if isinstance(why := getattr(source, "without_config", None), str):
        raise ConfigError(why)
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


def own_config(source: TensorSource) -> Config:
    """The config.json of a Hugging Face checkpoint; ConfigError if there is none.

    A source that never has one says why, as ``without_config``.
    """
    if source.config is None:
        why = f"{source.path}: has no config.json; fetch the whole checkpoint"
        raise ConfigError(getattr(source, "without_config", why))
    return source.config


def find_hints(
    codec: Codec, source: TensorSource, scales_from: str | Path | None, registry: Registry
) -> TensorSource | None:
    """Where the parts are that let a codec give a source's own bytes back; None if nowhere.

    Args:
        codec: the one that will encode.
        source: the checkpoint to be encoded; an import may have kept them beside it.
        scales_from: a checkpoint to take them from instead.
        registry: the plugins.

    Raises:
        CheckpointError: ``scales_from`` holds none.

    """
    origin = source if scales_from is None else open_source(scales_from, registry=registry)
    found = origin.hints(codec.name) if hasattr(origin, "hints") else None
    if found is origin and not codec.matches(origin.config or {}):
        found = None
    if found and codec.hints and any(name.endswith(codec.hints) for name in found.specs()):
        return found
    if scales_from is None:
        return None
    what = " or ".join(codec.hints) or "scales"
    raise CheckpointError(
        f"{scales_from}: holds no {what} of {codec.name}; name the {codec.name} checkpoint that the "
        f"weights came from, or a Megatron checkpoint imported from it"
    )
