"""Which tokenizer, on the command line of ``gptoss-convert data``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.options import (
    Folder,
    hf_model_option,
    megatron_option,
    revision_option,
    together,
)
from gptoss_convert.program import choice_of, registry_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

tokenizer_options = together(
    hf_model_option,
    revision_option,
    megatron_option,
    click.option("--tokenizer", type=Folder(), help="Folder with tokenizer.json."),
    click.option("--byte-level", is_flag=True, help="A token per byte, as the tiny recipes have."),
)


@contextlib.contextmanager
def named_tokenizer(
    ctx: click.Context, options: dict[str, Any]
) -> Iterator[tuple[Mapping[str, Path], str]]:
    """Files of the tokenizer that a command's options name, while it runs; and where they are."""
    from gptoss_plugins.data.byte_level import byte_level_files
    from gptoss_plugins.infer.options import wanted_of
    from gptoss_plugins.infer.session import tokenizer_files

    with contextlib.ExitStack() as stack:
        if options["byte_level"]:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="gptoss-convert-bytes-")))
            for name, data in byte_level_files().items():
                (folder / name).write_bytes(data)
            options = {**options, "tokenizer": folder}
        yield tokenizer_files(wanted_of(options), registry_of(ctx), choice_of(**options))
