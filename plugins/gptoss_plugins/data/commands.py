"""The command line of ``gptoss-convert data``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.options import (
    Folder,
    common_options,
    hf_model_option,
    megatron_option,
    revision_option,
)
from gptoss_convert.program import choice_of, echo_json, registry_of
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
@hf_model_option
@revision_option
@megatron_option
@click.option("--tokenizer", type=Folder(), help="Folder with tokenizer.json.")
@click.option("--byte-level", is_flag=True, help="A token per byte, as the tiny recipes have.")
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
    byte_level: bool,
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
    from gptoss_plugins.data.byte_level import byte_level_files
    from gptoss_plugins.data.preprocess import Job, preprocess
    from gptoss_plugins.data.units import find_files
    from gptoss_plugins.infer.options import wanted_of
    from gptoss_plugins.infer.session import tokenizer_files

    require_installed("writing an indexed dataset", "megatron", extras="megatron,data")
    total = sum(path.stat().st_size for path in find_files(inputs))
    with contextlib.ExitStack() as stack:
        if byte_level:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="gptoss-convert-bytes-")))
            for name, data_ in byte_level_files().items():
                (folder / name).write_bytes(data_)
            rest["tokenizer"] = folder
        files, where = tokenizer_files(wanted_of(rest), registry_of(ctx), choice_of(**rest))
        progress = stack.enter_context(reporting("tokenize", total, show=not no_progress))
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
