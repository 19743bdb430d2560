"""``gptoss-convert reshard``: a Megatron checkpoint for another layout, format or dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gptoss_convert import hookimpl
from gptoss_convert.options import (
    common_options,
    hf_model_option,
    layout_options,
    megatron_option,
    output_option,
    run_options,
    torch_dtype_option,
)
from gptoss_convert.program import choice_of, layout_of, registry_of, required, run_conversion

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@click.command("reshard")
@megatron_option
@output_option
@hf_model_option
@layout_options
@torch_dtype_option
@click.option(
    "--optimizer/--no-optimizer",
    default=True,
    show_default=True,
    help="Carry what training left besides the weights (torch_dist to torch_dist only).",
)
@run_options
@common_options
@click.pass_context
def reshard(
    ctx: click.Context,
    /,
    megatron_path: Path | None,
    output: Path | None,
    hf_model: str | None,
    torch_dtype: str | None,
    dialect: str | None,
    optimizer: bool,
    **rest: Any,
) -> None:
    """Megatron checkpoint -> the same for another parallel layout, format or dialect.

    --format torch_dist (default) is one checkpoint for every layout; torch is a file per rank of
    the layout, as Megatron-LM calls it. Bit for bit, unless --torch-dtype rounds. --hf-model names a
    reference for a checkpoint that carries no config of its model.
    """
    from gptoss_convert.reshard import prepare_reshard

    target = required(output, "--output")
    conversion = prepare_reshard(
        required(megatron_path, "--megatron-path"),
        hf_model=hf_model,
        layout=layout_of(**rest),
        torch_dtype=torch_dtype,
        dialect=dialect,
        optimizer=optimizer,
        registry=registry_of(ctx),
        choice=choice_of(**rest),
    )
    run_conversion(conversion, target, **rest)


@hookimpl
def gptoss_convert_commands() -> Iterator[click.Command]:
    """One."""
    yield reshard
