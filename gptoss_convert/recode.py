"""Hugging Face to Hugging Face: the same tensors, in a codec's form or out of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gptoss_convert.convert import prepare, source_codec, writing_codecs
from gptoss_convert.encoding import bind
from gptoss_convert.errors import CheckpointError, UsageError
from gptoss_convert.opening import Choice, hub_id, open_source, own_config
from gptoss_convert.registry import Registry, default_registry

if TYPE_CHECKING:
    from pathlib import Path

    from gptoss_convert.conversion import Conversion


def prepare_quantize(
    hf_model: str | Path,
    codec: str,
    *,
    scales_from: str | Path | None = None,
    registry: Registry | None = None,
    choice: Choice | None = None,
    revision: str | None = None,
    headers_only: bool = False,
) -> Conversion:
    """Plan writing a checkpoint in a codec's form; tensors that it is not for stay as they are.

    Args:
        hf_model: folder or hub id.
        codec: name of a codec that writes.
        scales_from: checkpoint with the scales that the weights once had.
        registry: the plugins; the installed ones by default.
        choice: decides where several plugins would do, and sets options of the codec.
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
    config = own_config(source)
    writing = writing_codecs(registry)
    target = writing.get(codec)
    if target is None:
        can = " or ".join(writing) or "there is none"
        raise UsageError(f"--codec {codec}: is no codec that can write; choose {can}")
    before = registry.codec_for(config)
    if before and before.name == target.name:
        raise CheckpointError(f"{hf_model}: is {codec} already; there is nothing to quantize")
    # An option of both codecs goes to both; one of neither goes to the target, which refuses it.
    options = choice.options.items()
    reading = {name: value for name, value in options if before and name in before.options}
    rest = {name: v for name, v in options if name in target.options or name not in reading}
    return prepare(
        "quantize",
        source,
        config,
        registry=registry,
        choice=replace(choice, options=rest),
        codec=before and bind(before, reading),
        encode_as=target,
        scales_from=scales_from,
        name_or_path=hub_id(hf_model),
    )


def prepare_dequantize(
    hf_model: str | Path,
    *,
    torch_dtype: str | None = None,
    registry: Registry | None = None,
    choice: Choice | None = None,
    revision: str | None = None,
    headers_only: bool = False,
) -> Conversion:
    """Plan writing a quantized checkpoint in full, by default in the type of its other tensors.

    Args:
        hf_model: folder or hub id.
        torch_dtype: element type to write.
        registry: the plugins; the installed ones by default.
        choice: decides where several plugins would do, and sets options of the codec.
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
    config = own_config(source)
    codec = source_codec(config, registry, choice)
    if codec is None:
        raise CheckpointError(
            f"{hf_model}: is not quantized, as its config.json has it; there is nothing to dequantize"
        )
    return prepare(
        "dequantize",
        source,
        config,
        registry=registry,
        choice=choice,
        dtype=torch_dtype,
        codec=codec,
        name_or_path=hub_id(hf_model),
    )
