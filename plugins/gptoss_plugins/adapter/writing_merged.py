"""Merging as a conversion: whatever the base's format and the target's, of the model with the adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gptoss_convert.convert import prepare, target_form
from gptoss_convert.dtypes import from_torch_name
from gptoss_convert.errors import PlanError, UsageError
from gptoss_convert.plan import Target
from gptoss_convert.types import MegatronSource
from gptoss_plugins.adapter.merging import MergedSource, merged

if TYPE_CHECKING:
    from gptoss_convert.conversion import Conversion
    from gptoss_convert.fit import Direction
    from gptoss_convert.logical import Logical
    from gptoss_convert.opening import Choice
    from gptoss_convert.registry import Registry
    from gptoss_convert.types import Side
    from gptoss_plugins.adapter.opening import Adapter

_DIRECTIONS: dict[tuple[Side, bool], Direction] = {  # from the base's side, to Hugging Face
    ("hf", True): "dequantize",
    ("hf", False): "import",
    ("megatron", True): "export",
    ("megatron", False): "reshard",
}


def prepare_merge(
    base: Logical,
    adapter: Adapter,
    registry: Registry,
    choice: Choice,
    *,
    to_hf: bool,
    export_dtype: str | None = None,
) -> tuple[Conversion, MergedSource]:
    """Plan writing a model with an adapter in its weights.

    Args:
        base: the model.
        adapter: which fits it.
        registry: the plugins.
        choice: decides where several plugins would do, and sets options of the codec.
        to_hf: write a Hugging Face checkpoint; a Megatron one otherwise.
        export_dtype: element type, or the codec to write in; None keeps the type that the base has
            when it is decoded. Only for Hugging Face checkpoints.

    Returns:
        the conversion, and its source, which counts what rounding costs.

    Raises:
        ConvertError: everything that does not fit, at once.

    """
    if base.problems:
        raise PlanError(str(base.source.path), base.problems)
    codec, dtype = target_form(export_dtype, registry)
    if not to_hf and export_dtype:
        raise UsageError(f"--export-dtype {export_dtype}: goes with --hf-path; leave it out")
    model = merged(base, adapter, lambda rule: codec is not None and rule.quantizable)
    assert isinstance(model.source, MergedSource)
    if dtype:
        _require_one_rounding(model.source, dtype)
    direction: Direction = (
        "quantize" if codec and base.side == "hf" else _DIRECTIONS[base.side, to_hf]
    )
    conversion = prepare(
        direction,
        model.source,
        base.config,
        registry=registry,
        choice=choice,
        dtype=dtype,
        codec=model.codec,
        files=base.source.files,
        encode_as=codec,
        target=None if to_hf else _target(base, adapter),
    )
    return replace(conversion, reference=adapter.logical.source.path), model.source


def _require_one_rounding(source: MergedSource, dtype: str) -> None:
    """Refuse a type that merged weights would have to be rounded to after another one."""
    offered = {spec.dtype for spec in source.merged_specs.values()}
    if not offered <= {"F32", from_torch_name(dtype)}:
        raise UsageError(
            f"--export-dtype {dtype}: the model is {' and '.join(sorted(offered))}, and merged weights "
            f"would be rounded to that first; write the model in float32 and merge into that, or leave "
            f"--export-dtype out"
        )


def _target(base: Logical, adapter: Adapter) -> Target:
    """The base's iteration; scales that were kept of its experts go along if they still are its."""
    if not isinstance(base.source, MegatronSource):
        return Target()
    is_old = any(target.line.rule.quantizable for target in adapter.targets)
    return Target(
        iteration=base.source.number, attachments={} if is_old else base.source.attachments
    )
