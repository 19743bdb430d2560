"""LoRA adapters: PEFT's format, and ``gptoss-convert adapter``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import Format, hookimpl
from gptoss_convert.errors import ConvertError
from gptoss_plugins.adapter.commands import adapter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import click

    from gptoss_convert.plan import ConversionPlan
    from gptoss_convert.types import TensorSink, TensorSource


def detect(folder: Path) -> bool:
    """A folder with an ``adapter_config.json``, or one whose only weights want one."""
    if (folder / "adapter_config.json").is_file():
        return True
    is_model = (folder / "config.json").exists()
    return (folder / "adapter_model.safetensors").is_file() and not is_model


def open_folder(folder: Path) -> TensorSource:
    """Read config and header; no tensor yet."""
    from gptoss_plugins.adapter.peft import PeftSource

    return PeftSource(folder)


def create(folder: Path, plan: ConversionPlan) -> TensorSink:
    """An adapter is no model to convert to."""
    raise ConvertError("peft is the format of adapters; see gptoss-convert adapter --help")


@hookimpl
def gptoss_convert_formats() -> Iterator[Format]:
    """PEFT's folders."""
    yield Format("peft", "hf", detect, open_folder, create)


@hookimpl
def gptoss_convert_commands() -> Iterator[click.Command]:
    """One, with commands below it."""
    yield adapter
