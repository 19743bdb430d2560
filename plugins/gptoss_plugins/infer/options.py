"""Command line options of ``generate`` and ``chat``."""

from __future__ import annotations

import math
from typing import Any

import click

from gptoss_convert.options import (
    Folder,
    common_options,
    computing_options,
    decode_options,
    hf_model_option,
    megatron_option,
    revision_option,
    sizes_options,
    together,
)
from gptoss_plugins.adapter.option import adapter_option
from gptoss_plugins.infer.harmony import EFFORTS
from gptoss_plugins.infer.sampling import Sampling
from gptoss_plugins.infer.session import Wanted

model_options = together(
    hf_model_option,
    revision_option,
    megatron_option,
    click.option(
        "--tokenizer",
        type=Folder(),
        help="Folder with tokenizer.json, where the checkpoint has none.",
    ),
    adapter_option,
    sizes_options,
    computing_options,
    decode_options,
    common_options,
)
sampling_options = together(
    click.option(
        "--max-new-tokens",
        type=click.IntRange(1),
        default=None,
        help="At most, for each prompt.  [default: 20 for generate, 2048 for chat]",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="0 takes the most likely token each time.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Draw from so many of the most likely tokens; 0 from all.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1),
        default=1.0,
        show_default=True,
        help="Draw from the most likely tokens that have this probability together.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**63 - 2**20),
        default=0,
        show_default=True,
        help="Of draws.",
    ),
)
chat_options = together(
    click.option(
        "--reasoning",
        type=click.Choice(EFFORTS),
        default="medium",
        show_default=True,
        help="How much the model thinks.",
    ),
    click.option("--system", metavar="TEXT", help="Instructions for the whole conversation."),
)


def wanted_of(options: dict[str, Any]) -> Wanted:
    """Which checkpoint a command's options name."""
    names = ("hf_model", "hf_revision", "megatron_path", "tokenizer")
    named = {name: options[name] for name in names}
    return Wanted(**named, adapter=options.get("adapter"))  # what wants a tokenizer only has none


def sampling_of(options: dict[str, Any]) -> Sampling:
    """How a command's options say to choose.

    Raises:
        click.UsageError: drawing is asked for, and no temperature.

    """
    for name in ("temperature", "top_p"):
        if not math.isfinite(options[name]):
            raise click.UsageError(f"--{name.replace('_', '-')} {options[name]} is no number")
    if options["temperature"] == 0 and (options["top_k"] > 1 or options["top_p"] < 1):
        raise click.UsageError(
            "--top-k and --top-p draw, and --temperature 0 does not; give a temperature, such as 1"
        )
    if options["top_p"] == 0:
        raise click.UsageError("--top-p 0 leaves no token; say --temperature 0 for the likeliest")
    return Sampling(options["temperature"], options["top_k"], options["top_p"], options["seed"])
