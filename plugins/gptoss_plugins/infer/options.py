"""Command line options of ``generate`` and ``chat``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gptoss_convert.options import (
    DTYPES,
    Folder,
    common_options,
    decode_options,
    hf_model_option,
    megatron_option,
    revision_option,
    sizes_options,
)
from gptoss_plugins.infer.harmony import EFFORTS
from gptoss_plugins.infer.sampling import Sampling
from gptoss_plugins.infer.session import Wanted

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., object]")
_MODEL = (
    hf_model_option,
    revision_option,
    megatron_option,
    click.option(
        "--tokenizer",
        type=Folder(),
        help="Folder with tokenizer.json, where the checkpoint has none.",
    ),
    sizes_options,
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        help="Where the model runs; CUDA where there is one.",
    ),
    click.option(
        "--torch-dtype", type=DTYPES, help="Of the model; bfloat16 on a GPU, else float32."
    ),
)
_SAMPLING = (
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
_CHAT = (
    click.option(
        "--reasoning",
        type=click.Choice(EFFORTS),
        default="medium",
        show_default=True,
        help="How much the model thinks.",
    ),
    click.option("--system", metavar="TEXT", help="Instructions for the whole conversation."),
)


def _apply(options: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def model_options(function: F) -> F:
    """Which checkpoint, on what, in which layout."""
    return _apply((*_MODEL, decode_options, common_options))(function)


def sampling_options(function: F) -> F:
    """How tokens are chosen, and how many."""
    return _apply(_SAMPLING)(function)


def chat_options(function: F) -> F:
    """What harmony's system message says."""
    return _apply(_CHAT)(function)


def wanted_of(options: dict[str, Any]) -> Wanted:
    """Which checkpoint a command's options name."""
    names = ("hf_model", "hf_revision", "megatron_path", "tokenizer")
    return Wanted(**{name: options[name] for name in names})


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
