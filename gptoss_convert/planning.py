"""Which conversion ``plan`` means, by the checkpoints it is given, and what does not go with that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert.convert import prepare_export, prepare_import, target_form
from gptoss_convert.errors import UsageError
from gptoss_convert.recode import prepare_dequantize, prepare_quantize
from gptoss_convert.reshard import prepare_reshard

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from gptoss_convert.conversion import Conversion
    from gptoss_convert.layout import Layout
    from gptoss_convert.opening import Choice
    from gptoss_convert.registry import Registry

_LAYOUT = ("tp", "pp", "vpp", "ep", "etp", "first", "last", "stages", "vocab_multiple", "dialect")
_ENCODING = ("export_dtype", "scales_from", "scale_rule", "on_nonfinite")
_MEANT = {  # by direction: what says that it is meant, and options it has no use for
    "import": ("--hf-model without --hf-path", _ENCODING),
    "reshard": ("--output", ("keep_scales", "hf_path", *_ENCODING)),
    "export": (
        "--megatron-path without --hf-model, or with --hf-path",
        ("torch_dtype", "keep_scales", *_LAYOUT),
    ),
    "quantize": (
        "--hf-model with --hf-path and a codec for --export-dtype",
        ("torch_dtype", "keep_scales", "codec", *_LAYOUT),
    ),
    "dequantize": (
        "--hf-model with --hf-path and no codec for --export-dtype",
        ("keep_scales", *_ENCODING, *_LAYOUT),
    ),
}  # fmt: skip
_FLAGS = {
    "keep_scales": "--[no-]keep-scales",
    "first": "--decoder-first-pipeline-num-layers",
    "last": "--decoder-last-pipeline-num-layers",
    "stages": "--pipeline-layers",
    "vocab_multiple": "--make-vocab-size-divisible-by",
}


def prepare_plan(
    hf_model: str | None,
    megatron_path: Path | None,
    hf_path: Path | None,
    output: Path | None,
    *,
    torch_dtype: str | None,
    export_dtype: str | None,
    scales_from: str | None,
    keep_scales: bool,
    layout: Layout,
    dialect: str | None,
    given: Collection[str],
    registry: Registry,
    choice: Choice,
    revision: str | None,
) -> tuple[Conversion, Path | None]:
    """The conversion, and where to; tensors need not be there yet.

    Args:
        hf_model: as in the other commands; so are all that are not explained.
        megatron_path: likewise.
        hf_path: likewise.
        output: likewise.
        torch_dtype: likewise.
        export_dtype: likewise.
        scales_from: likewise.
        keep_scales: likewise.
        layout: likewise.
        dialect: likewise.
        given: names of the options that the user gave.
        registry: the plugins.
        choice: decides where several plugins would do, and sets options of the codec.
        revision: of a hub id.

    Raises:
        UsageError: the options do not go together.
        ConvertError: everything that does not fit, at once.

    """
    recoding = hf_model and hf_path and not megatron_path and not output
    codec = target_form(export_dtype, registry)[0] if recoding else None
    if output:
        direction = "reshard"
    elif hf_model is None or (hf_path and megatron_path):
        direction = "export"
    elif recoding:
        direction = "quantize" if codec else "dequantize"
    else:
        direction = "import"
    meant, useless = _MEANT[direction]
    if stray := [name for name in useless if name in given]:
        text = ", ".join(_FLAGS.get(name, f"--{name.replace('_', '-')}") for name in stray)
        raise UsageError(
            f"{text}: does not go with {direction}, which is what {meant} means; leave it out, or name "
            f"what you mean"
        )
    if direction == "import":
        assert hf_model
        importing = prepare_import(
            hf_model,
            torch_dtype=torch_dtype,
            registry=registry,
            choice=choice,
            revision=revision,
            headers_only=True,
            keep_scales=keep_scales,
            layout=layout,
            dialect=dialect,
        )
        return importing, megatron_path
    if direction == "reshard":
        if megatron_path is None:
            raise UsageError("--output: what is to be written there? name it with --megatron-path")
        resharding = prepare_reshard(
            megatron_path,
            hf_model=hf_model,
            layout=layout,
            torch_dtype=torch_dtype,
            dialect=dialect,
            registry=registry,
            choice=choice,
        )
        return resharding, output
    if codec:
        assert hf_model
        quantizing = prepare_quantize(
            hf_model,
            codec.name,
            scales_from=scales_from,
            registry=registry,
            choice=choice,
            revision=revision,
            headers_only=True,
        )
        return quantizing, hf_path
    if direction == "dequantize":
        assert hf_model
        dequantizing = prepare_dequantize(
            hf_model,
            torch_dtype=torch_dtype,
            registry=registry,
            choice=choice,
            revision=revision,
            headers_only=True,
        )
        return dequantizing, hf_path
    assert megatron_path
    exporting = prepare_export(
        megatron_path,
        hf_model=hf_model,
        export_dtype=export_dtype,
        scales_from=scales_from,
        registry=registry,
        choice=choice,
        revision=revision,
    )
    return exporting, hf_path
