"""Command line options of what runs a model on a prompt to compare its logits."""

from __future__ import annotations

import math
from typing import Any

import click

from gptoss_convert.options import computing_options, together


class Tolerance(click.FloatRange):
    """A number from 0 on; NaN, which nothing is less or more than, is none."""

    def __init__(self) -> None:
        super().__init__(0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As its base does."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number.", param, ctx)
        return number


logits_options = together(
    click.option(
        "--prompt-length",
        type=click.IntRange(2),
        default=300,
        show_default=True,
        help="Tokens; the sliding window has 128, YaRN's original length is 4096.",
    ),
    computing_options,
    click.option(
        "--logits-tolerance",
        type=Tolerance(),
        help="Relative error of the logits; 1e-4 in float32, 0.1 in bfloat16 if left out.",
    ),
)
