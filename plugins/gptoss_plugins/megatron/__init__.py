"""Megatron's checkpoint formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import Format, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptoss_convert.plan import ConversionPlan
    from gptoss_convert.types import TensorSink, TensorSource


def detect(folder: Path) -> bool:
    """A ``torch_dist`` checkpoint's root or ``iter_*`` folder."""
    from gptoss_plugins.megatron.folder import iteration_folder

    return iteration_folder(folder) is not None


def open_folder(folder: Path) -> TensorSource:
    """Read the metadata; no tensor yet."""
    from gptoss_plugins.megatron.source import TorchDistSource

    return TorchDistSource(folder)


def create(folder: Path, plan: ConversionPlan) -> TensorSink:
    """A sink that will write ``iter_0000000`` and the files that lead to it."""
    from gptoss_plugins.megatron.sink import TorchDistSink

    return TorchDistSink(folder, plan)


@hookimpl
def gptoss_convert_formats() -> Iterator[Format]:
    """Distributed checkpoints of megatron-core (``torch_dist``)."""
    yield Format(
        "torch_dist",
        "megatron",
        detect,
        open_folder,
        create,
        dialects=("stacked", "per-layer"),
        preferred=True,
    )
