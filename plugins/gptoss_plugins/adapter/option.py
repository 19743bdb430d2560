"""``--adapter``, of every command that takes one."""

from __future__ import annotations

import click

from gptoss_convert.options import Checkpoint

adapter_option = click.option(
    "--adapter",
    type=Checkpoint(),
    metavar="DIR|ID",
    help="LoRA adapter: a folder of PEFT's, or a checkpoint as Megatron-Bridge and train save one.",
)
