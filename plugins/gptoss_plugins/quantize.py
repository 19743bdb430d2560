"""``gptoss-convert quantize`` and ``dequantize``: Hugging Face to Hugging Face, streaming."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gptoss_convert import hookimpl
from gptoss_convert.options import (
    common_options,
    decode_options,
    encode_options,
    hf_model_option,
    hf_path_option,
    revision_option,
    run_options,
    scales_option,
    torch_dtype_option,
)
from gptoss_convert.program import choice_of, registry_of, required, run_conversion

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@click.command("quantize")
@hf_model_option
@revision_option
@hf_path_option
@scales_option
@decode_options
@encode_options
@run_options
@common_options
@click.pass_context
def quantize(
    ctx: click.Context,
    /,
    hf_model: str | None,
    hf_revision: str | None,
    hf_path: Path | None,
    scales_from: str | None,
    **rest: Any,
) -> None:
    """Hugging Face checkpoint -> the same, quantized (--codec, mxfp4 by default).

    Experts are encoded, all other tensors stay as they are. Values that the codec can hold are
    kept; --scales-from the checkpoint they came from gives its very bytes back.
    """
    from gptoss_convert.recode import prepare_quantize

    target = required(hf_path, "--hf-path")
    conversion = prepare_quantize(
        required(hf_model, "--hf-model"),
        rest.pop("codec") or "mxfp4",
        scales_from=scales_from,
        registry=registry_of(ctx),
        choice=choice_of(**rest),
        revision=hf_revision,
    )
    run_conversion(conversion, target, **rest)


@click.command("dequantize")
@hf_model_option
@revision_option
@hf_path_option
@torch_dtype_option
@decode_options
@run_options
@common_options
@click.pass_context
def dequantize(
    ctx: click.Context,
    /,
    hf_model: str | None,
    hf_revision: str | None,
    hf_path: Path | None,
    torch_dtype: str | None,
    **rest: Any,
) -> None:
    """Quantized Hugging Face checkpoint -> the same in full, exactly."""
    from gptoss_convert.recode import prepare_dequantize

    target = required(hf_path, "--hf-path")
    conversion = prepare_dequantize(
        required(hf_model, "--hf-model"),
        torch_dtype=torch_dtype,
        registry=registry_of(ctx),
        choice=choice_of(**rest),
        revision=hf_revision,
    )
    run_conversion(conversion, target, **rest)


@hookimpl
def gptoss_convert_commands() -> Iterator[click.Command]:
    """Both."""
    yield quantize
    yield dequantize
