"""The command line of ``gptoss-convert data``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.options import common_options
from gptoss_convert.program import echo_json
from gptoss_plugins.data.pack_command import pack_
from gptoss_plugins.data.tokenizer_options import named_tokenizer, tokenizer_options
from gptoss_plugins.gpt_model.installed import require_installed

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.group()
def data() -> None:
    """Text into what training reads."""


@data.command("preprocess")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE|DIR",
    help="JSONL, zstd JSONL or Parquet; a folder is searched (repeatable).",
)
@click.option(
    "--output-prefix",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PREFIX",
    help="PREFIX.bin and PREFIX.idx are made.",
)
@click.option(
    "--json-key", default="text", show_default=True, help="Field or column that has the text."
)
@click.option(
    "--append-eod/--no-append-eod",
    default=True,
    show_default=True,
    help="End every document with <|endoftext|>.",
)
@tokenizer_options
@click.option(
    "--workers", type=click.IntRange(1), default=None, help="Processes; one per core if left out."
)
@click.option("--overwrite", is_flag=True, help="Replace the dataset that is there.")
@click.option("--no-progress", is_flag=True, help="No progress on stderr.")
@common_options
@click.pass_context
def preprocess_(
    ctx: click.Context,
    /,
    inputs: Sequence[Path],
    output_prefix: Path,
    json_key: str,
    append_eod: bool,
    workers: int | None,
    overwrite: bool,
    no_progress: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    """Tokenize documents into megatron-core's indexed dataset.

    The tokenizer is that of --hf-model, --megatron-path or --tokenizer, or has a token per byte. Killed and run again, it goes on
    where it was; the bytes are the same, whatever the number of processes.
    """
    from gptoss_convert.progress import reporting
    from gptoss_plugins.data.preprocess import Job, preprocess
    from gptoss_plugins.data.units import find_files

    require_installed("writing an indexed dataset", "megatron", extras="megatron,data")
    total = sum(path.stat().st_size for path in find_files(inputs))
    with (
        named_tokenizer(ctx, rest) as (files, where),
        reporting("tokenize", total, show=not no_progress) as progress,
    ):
        found = preprocess(
            inputs,
            output_prefix,
            Job(json_key, append_eod, files, where),
            workers=workers or len(os.sched_getaffinity(0)),
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        echo_json(found)
    else:
        click.echo(
            f"{found['documents']:,} documents, {found['tokens']:,} tokens: {output_prefix}.bin, "
            f"{output_prefix}.idx"
        )


data.add_command(pack_)
