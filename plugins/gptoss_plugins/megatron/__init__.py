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
    from gptoss_plugins.megatron.folder import is_per_rank, iteration_folder

    return iteration_folder(folder) is not None and not is_per_rank(folder)


def open_folder(folder: Path) -> TensorSource:
    """Read the metadata; no tensor yet."""
    from gptoss_plugins.megatron.source import TorchDistSource

    return TorchDistSource(folder)


def create(folder: Path, plan: ConversionPlan) -> TensorSink:
    """A sink that will write ``iter_0000000`` and the files that lead to it."""
    from gptoss_plugins.megatron.sink import TorchDistSink

    return TorchDistSink(folder, plan)


def detect_legacy(folder: Path) -> bool:
    """The root or ``iter_*`` folder of a checkpoint with a file per rank."""
    from gptoss_plugins.megatron.folder import is_per_rank

    return is_per_rank(folder)


def open_legacy(folder: Path) -> TensorSource:
    """Read every rank's pickle; no tensor yet."""
    from gptoss_plugins.megatron.legacy.source import LegacySource

    return LegacySource(folder)


def create_legacy(folder: Path, plan: ConversionPlan) -> TensorSink:
    """A sink that will write ``mp_rank_*/model_optim_rng.pt`` for the plan's layout."""
    from gptoss_plugins.megatron.legacy.sink import LegacySink

    return LegacySink(folder, plan)


@hookimpl
def gptoss_convert_formats() -> Iterator[Format]:
    """Distributed checkpoints of megatron-core (``torch_dist``), and Megatron-LM's file per rank."""
    yield Format(
        "torch_dist",
        "megatron",
        detect,
        open_folder,
        create,
        dialects=("stacked", "per-layer"),
        preferred=True,
    )
    yield Format(
        "torch",
        "megatron",
        detect_legacy,
        open_legacy,
        create_legacy,
        dialects=("te-grouped", "te-sequential", "local-sequential", "local-grouped"),
    )
