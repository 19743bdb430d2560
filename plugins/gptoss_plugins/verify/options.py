"""Command line options of what runs a model on a prompt to compare its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import click

from gptoss_convert.options import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., object]")
_OPTIONS = (
    click.option(
        "--prompt-length",
        type=click.IntRange(2),
        default=300,
        show_default=True,
        help="Tokens; the sliding window has 128, YaRN's original length is 4096.",
    ),
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        help="Of the models; CUDA where there is one.",
    ),
    click.option(
        "--torch-dtype", type=DTYPES, help="Of the models; bfloat16 on a GPU, else float32."
    ),
    click.option(
        "--logits-tolerance",
        type=click.FloatRange(0),
        help="Relative error of the logits; 1e-4 in float32, 0.1 in bfloat16 if left out.",
    ),
)


def logits_options(function: F) -> F:
    """``prompt_length``, ``device``, ``torch_dtype``, ``logits_tolerance``."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
