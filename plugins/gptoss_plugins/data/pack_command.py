"""The command line of ``gptoss-convert data pack``."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.options import common_options
from gptoss_convert.program import echo_json
from gptoss_plugins.data.tokenizer_options import named_tokenizer, tokenizer_options
from gptoss_plugins.gpt_model.installed import require_installed

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHANNELS = ("analysis", "commentary", "final")


@click.command("pack")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE|DIR",
    help="JSONL, zstd JSONL or Parquet of records; a folder is searched (repeatable).",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The Parquet file that is made; .parquet is added, if it is not there.",
)
@click.option("--sequence-length", required=True, type=click.IntRange(1), help="Tokens of a pack.")
@click.option(
    "--pad-to-multiple",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Pad each sample to a multiple of so many tokens.",
)
@click.option(
    "--form",
    type=click.Choice(["prompt_completion", "chat"]),
    default="prompt_completion",
    show_default=True,
    help="What a record is.",
)
@click.option("--prompt-key", default="prompt", show_default=True, help="Field with the prompt.")
@click.option(
    "--completion-key", default="completion", show_default=True, help="Field with the completion."
)
@click.option(
    "--messages-key", default="messages", show_default=True, help="Field with the messages."
)
@click.option(
    "--preset",
    type=click.Choice(["squad", "openmathinstruct2_thinking"]),
    help="The records are of this data set, which has fields of its own.",
)
@click.option(
    "--loss-channel",
    "loss_channels",
    multiple=True,
    type=click.Choice(_CHANNELS),
    help="Of chats: a channel that is learned (repeatable).  [default: all three]",
)
@click.option(
    "--other-channels",
    type=click.Choice(["read", "drop"]),
    default="read",
    show_default=True,
    help="Of chats: what becomes of channels that are not learned.",
)
@click.option(
    "--reasoning-effort",
    type=click.Choice(["low", "medium", "high"]),
    default="medium",
    show_default=True,
    help="Of chats: as the system message says.",
)
@click.option(
    "--conversation-date",
    metavar="DATE",
    help="Of chats: as the system message says; none, if left out.",
)
@tokenizer_options
@click.option(
    "--workers", type=click.IntRange(1), default=None, help="Processes; one per core if left out."
)
@click.option("--overwrite", is_flag=True, help="Replace the file that is there.")
@click.option("--no-progress", is_flag=True, help="No progress on stderr.")
@common_options
@click.pass_context
def pack_(
    ctx: click.Context,
    /,
    inputs: Sequence[Path],
    output: Path,
    sequence_length: int,
    pad_to_multiple: int,
    loss_channels: Sequence[str],
    workers: int | None,
    overwrite: bool,
    no_progress: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    """Make samples of questions and answers, and put whole ones together in packs.

    First-fit decreasing. The file has Megatron-Bridge's columns; training takes it as
    dataset.dataset_root. Killed and run again, it goes on where it was; the bytes are the same, whatever
    the number of processes.
    """
    from gptoss_convert.progress import reporting
    from gptoss_plugins.data.sft.form import CHANNELS, Form
    from gptoss_plugins.data.sft.making import Shape
    from gptoss_plugins.data.sft.offline import pack_files
    from gptoss_plugins.data.sft.tokenizing import Job
    from gptoss_plugins.data.units import find_files
    from gptoss_plugins.infer.tokenizer import load_tokenizer

    require_installed("packing", "pyarrow", extras="data")
    shape = Shape(sequence_length, pad_to_multiple)
    keys = [field.name for field in dataclasses.fields(Form) if field.name != "loss_channels"]
    channels = tuple(channel for channel in CHANNELS if channel in loss_channels) or CHANNELS
    form = Form(loss_channels=channels, **{key: rest.pop(key) for key in keys})
    total = sum(path.stat().st_size for path in find_files(inputs))
    with (
        named_tokenizer(ctx, rest) as (files, where),
        reporting("tokenize", total, show=not no_progress) as progress,
    ):
        found = pack_files(
            inputs,
            output,
            shape,
            Job(form, load_tokenizer(files, where)),
            workers=workers or len(os.sched_getaffinity(0)),
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        echo_json(found)
        return
    click.echo(
        f"{found['samples']:,} samples, {found['tokens']:,} tokens, {found['learned_tokens']:,} of them "
        f"learned, in {found['packs']:,} packs, {found['fill']:.1%} full: {found['path']}"
    )
    if found["dropped"] or found["skipped"]:
        click.echo(
            f"left out: {found['dropped']:,} samples longer than {sequence_length:,}, the longest "
            f"{found['longest']:,}; {found['skipped']:,} records of which nothing is learned"
        )
