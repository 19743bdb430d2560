"""The Python API: prepare a conversion, look at it, run it.

>>> from gptoss_convert.convert import import_checkpoint
>>> import_checkpoint("openai/gpt-oss-20b", "models/gpt-oss-20b")  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from gptoss_convert.conversion import Conversion, Result
from gptoss_convert.dtypes import from_torch_name, torch_name
from gptoss_convert.encoding import Encoding, bind
from gptoss_convert.errors import CheckpointError, ConvertError, UsageError
from gptoss_convert.execute import DEFAULT_MAX_MEMORY, Progress
from gptoss_convert.layout import Layout, Parameter, pieces
from gptoss_convert.opening import (
    Choice,
    config_of,
    find_hints,
    hub_id,
    open_source,
    own_config,
)
from gptoss_convert.plan import Target, make_plan, parameters, to_megatron
from gptoss_convert.registry import Registry, default_registry

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gptoss_convert.fit import Direction
    from gptoss_convert.types import Codec, Config, Format, Side, TensorSource

__all__ = [
    "Choice",
    "Conversion",
    "Result",
    "export_checkpoint",
    "import_checkpoint",
    "open_source",
    "prepare_export",
    "prepare_import",
]
log = logging.getLogger("gptoss_convert")
EXPORTED = ("BF16", "F16", "F32")


def prepare_import(
    hf_model: str | Path,
    *,
    torch_dtype: str | None = None,
    registry: Registry | None = None,
    choice: Choice | None = None,
    revision: str | None = None,
    headers_only: bool = False,
    keep_scales: bool = True,
    layout: Layout | None = None,
    dialect: str | None = None,
) -> Conversion:
    """Plan Hugging Face -> Megatron.

    Args:
        hf_model: folder or hub id.
        torch_dtype: element type to write (``bfloat16``, ``float16``, ``float32``); None keeps
            the source's.
        registry: the plugins; the installed ones by default.
        choice: decides where several plugins would do, and sets options of the codec.
        revision: of a hub id.
        headers_only: only look at the plan; shards may hold no data yet.
        keep_scales: keep the scales of a quantized source beside the Megatron checkpoint, so
            that an export can give its bytes back.
        layout: the parallel layout to write for, of a format that depends on it.
        dialect: which of the format's ways to name things.

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
    config = own_config(source)
    return prepare(
        "import",
        source,
        config,
        registry=registry,
        choice=choice,
        dtype=torch_dtype,
        codec=source_codec(config, registry, choice),
        name_or_path=hub_id(hf_model),
        keep_hints=keep_scales,
        target=Target(layout or Layout(), dialect or ""),
    )


def prepare_export(
    megatron_path: str | Path,
    *,
    hf_model: str | Path | None = None,
    export_dtype: str | None = None,
    scales_from: str | Path | None = None,
    registry: Registry | None = None,
    choice: Choice | None = None,
    revision: str | None = None,
) -> Conversion:
    """Plan Megatron -> Hugging Face.

    Args:
        megatron_path: root or ``iter_*`` folder.
        hf_model: a reference; its config and tokenizer serve where the checkpoint has none, and
            it must be the same model where the checkpoint has its own.
        export_dtype: element type to write, or the codec to write in (``mxfp4``); None keeps the
            checkpoint's type.
        scales_from: checkpoint with the scales that the weights once had, for a codec that can
            use them; None takes those that the import kept.
        registry: the plugins; the installed ones by default.
        choice: decides where several plugins would do, and sets options of the codec.
        revision: of a hub id.

    Raises:
        ConvertError: everything that does not fit, at once.

    """
    registry, choice = registry or default_registry(), choice or Choice()
    if choice.codec:
        raise UsageError(
            f"--codec {choice.codec}: says what a quantized source is in, and a Megatron checkpoint "
            f"is in none; to write in a codec's form say --export-dtype {choice.codec}"
        )
    source = open_source(megatron_path, "megatron", registry=registry, choice=choice)
    config, files, reference = describe_model(source, hf_model, registry, choice, revision)
    if source.config is None and reference is None:
        log.warning(
            "config.json is made from Megatron's fields, and lacks what Megatron does not know, such as "
            "special tokens; name the model with --hf-model to carry that too"
        )
    codec, dtype = target_form(export_dtype, registry)
    conversion = prepare(
        "export",
        source,
        config,
        registry=registry,
        choice=choice,
        dtype=dtype,
        files=files,
        encode_as=codec,
        scales_from=scales_from,
    )
    return replace(conversion, reference=reference.path if reference else None)


def describe_model(
    source: TensorSource,
    hf_model: str | Path | None,
    registry: Registry,
    choice: Choice,
    revision: str | None = None,
) -> tuple[Config, Mapping[str, Path], TensorSource | None]:
    """Config and companions of a Megatron checkpoint's model, and the reference they come from, if any.

    Raises:
        CheckpointError: the reference is another model, or nothing tells the config.

    """
    reference = _reference(hf_model, source, registry, revision)
    if source.config is None and reference is not None:
        return own_config(reference), reference.files, reference
    config = config_of(source, registry, choice)
    if reference is not None:
        _require_same_model(config, own_config(reference), registry, choice, hf_model)
    return config, source.files, reference


def target_form(name: str | None, registry: Registry) -> tuple[Codec | None, str | None]:
    """What ``--export-dtype`` says: a codec that writes, or an element type (as torch names it).

    Raises:
        UsageError: it is neither.

    """
    if name is None:
        return None, None
    writing = writing_codecs(registry)
    if name in writing:
        return writing[name], None
    with contextlib.suppress(UsageError):
        if (dtype := from_torch_name(name)) in EXPORTED:
            return None, torch_name(dtype)
    raise UsageError(
        f"--export-dtype {name!r} is neither an element type (bfloat16, float16, float32) nor a "
        f"codec that can write ({' or '.join(writing) or 'there is none'})"
    )


def writing_codecs(registry: Registry) -> dict[str, Codec]:
    """The codecs that can encode, by name."""
    return {name: codec for name, codec in sorted(registry.codecs().items()) if codec.writes}


def source_codec(config: Config, registry: Registry, choice: Choice) -> Codec | None:
    """The codec of a source, with the user's options."""
    codec = registry.codec_for(config, choice.codec)
    if codec is None and choice.options:
        log.warning("the source is not quantized, so the options for its codec are not used")
    return codec and bind(codec, choice.options)


def _reference(
    hf_model: str | Path | None, source: TensorSource, registry: Registry, revision: str | None
) -> TensorSource | None:
    """The reference model, if one is named; a hub id that is not needed is not fetched."""
    if hf_model is None:
        return None
    if source.config is not None and hub_id(hf_model):
        log.info("%s is not needed: the checkpoint carries its own config", hf_model)
        return None
    return open_source(hf_model, "hf", registry=registry, revision=revision, headers_only=True)


def _require_same_model(
    own: Config, other: Config, registry: Registry, choice: Choice, where: str | Path | None
) -> None:
    families = [registry.model_for(c, choice.model) for c in (own, other)]
    pairs = zip(families, (own, other), strict=True)
    mine, theirs = (to_megatron(family, config, str(where)) for family, config in pairs)
    differ = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    if differ:
        raise CheckpointError(
            f"{where}: is another model than the Megatron checkpoint ({', '.join(differ)} differ); "
            f"name the right one, or leave --hf-model out"
        )


def prepare(
    direction: Direction,
    source: TensorSource,
    config: Config,
    *,
    registry: Registry,
    choice: Choice,
    dtype: str | None = None,
    codec: Codec | None = None,
    files: Mapping[str, Path] | None = None,
    name_or_path: str | None = None,
    keep_hints: bool = False,
    encode_as: Codec | None = None,
    scales_from: str | Path | None = None,
    target: Target | None = None,
) -> Conversion:
    """Plan any direction; arguments as for ``make_plan`` and the functions above."""
    family = registry.model_for(config, choice.model)
    known = parameters(family, config, str(source.path))
    if hasattr(source, "arrange"):
        source.arrange(known)
    encoding = hints = None
    if encode_as:
        hints = find_hints(encode_as, source, scales_from, registry)
        known_hints = (hints.specs(), str(scales_from or hints.path)) if hints else ()
        encoding = Encoding(bind(encode_as, choice.options), choice.options, *known_hints)
    elif scales_from is not None or (choice.options and codec is None and direction == "export"):
        raise UsageError(
            "scales and a codec's options serve to encode, and nothing is to be encoded; say what "
            "to encode to, as in --export-dtype mxfp4"
        )
    plan = make_plan(
        direction,
        source.specs(),
        family,
        config,
        where=str(source.path),
        codec=codec,
        known_codecs=registry.codecs().values(),
        dtype=from_torch_name(dtype) if dtype else None,
        files=source.files if files is None else files,
        name_or_path=name_or_path,
        encoding=encoding,
        keep_hints=keep_hints,
        target=target,
    )
    side: Side = "megatron" if direction in ("import", "reshard") else "hf"
    format_ = target_format(side, registry, choice)
    if target:
        _check_target(target, known, format_, registry)
    return Conversion(plan, source, format_, registry, hints=hints)


def _check_target(
    target: Target, known: Mapping[str, Parameter], format_: Format, registry: Registry
) -> None:
    """Raise UsageError unless the format has the dialect and the layout divides the model."""
    if target.dialect and target.dialect not in format_.dialects:
        choices = " or ".join(format_.dialects) or "leave --dialect out"
        raise UsageError(
            f"--dialect {target.dialect}: format {format_.name} has none of that name; {choices}"
        )
    # what is padded to the layout, and never refused, comes last: it would first be cut a million times
    for parameter in sorted(known.values(), key=lambda one: one.padded):
        pieces(parameter, target.layout, registry.resharders())


def target_format(side: Side, registry: Registry, choice: Choice) -> Format:
    """The format to write: the one chosen, or its side's usual one."""
    formats = registry.formats(side)
    if choice.format is not None and choice.format not in registry.formats():
        raise UsageError(
            f"--format {choice.format}: there is none; to write there is {' or '.join(formats)}"
        )
    default = [name for name, f in formats.items() if f.preferred or len(formats) == 1]
    name = choice.format if choice.format in formats else next(iter(default), None)
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
    keep_scales: bool = True,
    layout: Layout | None = None,
    dialect: str | None = None,
    registry: Registry | None = None,
    choice: Choice | None = None,
    revision: str | None = None,
    workers: int | None = None,
    max_memory: int = DEFAULT_MAX_MEMORY,
    overwrite: bool = False,
    progress: Progress = lambda nbytes: None,
    device: str = "cpu",
) -> Result:
    """Hugging Face -> Megatron; arguments as for prepare_import and Conversion.run."""
    conversion = prepare_import(
        hf_model,
        torch_dtype=torch_dtype,
        registry=registry,
        choice=choice,
        revision=revision,
        keep_scales=keep_scales,
        layout=layout,
        dialect=dialect,
    )
    return conversion.run(
        megatron_path,
        workers=workers,
        max_memory=max_memory,
        overwrite=overwrite,
        progress=progress,
        device=device,
    )


def export_checkpoint(
    megatron_path: str | Path,
    hf_path: str | Path,
    *,
    hf_model: str | Path | None = None,
    export_dtype: str | None = None,
    scales_from: str | Path | None = None,
    registry: Registry | None = None,
    choice: Choice | None = None,
    revision: str | None = None,
    workers: int | None = None,
    max_memory: int = DEFAULT_MAX_MEMORY,
    overwrite: bool = False,
    progress: Progress = lambda nbytes: None,
    device: str = "cpu",
) -> Result:
    """Megatron -> Hugging Face; arguments as for prepare_export and Conversion.run."""
    conversion = prepare_export(
        megatron_path,
        hf_model=hf_model,
        export_dtype=export_dtype,
        scales_from=scales_from,
        registry=registry,
        choice=choice,
        revision=revision,
    )
    return conversion.run(
        hf_path,
        workers=workers,
        max_memory=max_memory,
        overwrite=overwrite,
        progress=progress,
        device=device,
    )
