"""Megatron to Megatron: the same weights for another parallel layout, format or dialect."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gptoss_convert.convert import describe_model, prepare, target_format
from gptoss_convert.errors import PluginError, UsageError
from gptoss_convert.layout import Layout
from gptoss_convert.opening import Choice, open_source
from gptoss_convert.plan import Target
from gptoss_convert.registry import Registry, default_registry
from gptoss_convert.types import MegatronSource

if TYPE_CHECKING:
    from pathlib import Path

    from gptoss_convert.conversion import Conversion
    from gptoss_convert.types import Format, TrainingState


def prepare_reshard(
    megatron_path: str | Path,
    *,
    hf_model: str | Path | None = None,
    layout: Layout | None = None,
    torch_dtype: str | None = None,
    dialect: str | None = None,
    optimizer: bool = True,
    registry: Registry | None = None,
    choice: Choice | None = None,
) -> Conversion:
    """Plan Megatron -> Megatron.

    Args:
        megatron_path: root or ``iter_*`` folder, of any format.
        hf_model: a reference, whose config and tokenizer serve where the checkpoint has none.
        layout: the parallel layout to write for, of a format that depends on it.
        torch_dtype: element type to write; None keeps each tensor's own.
        dialect: which of the format's ways to name things.
        optimizer: carry along what training left besides the weights, if the formats allow.
        registry: the plugins; the installed ones by default.
        choice: decides where several plugins would do; its format is the one to write.

    Raises:
        ConvertError: everything that does not fit, at once.

    """
    registry, choice = registry or default_registry(), choice or Choice()
    if choice.format is not None and choice.format not in registry.formats("megatron"):
        kinds = " or ".join(sorted(registry.formats("megatron")))
        raise UsageError(f"--format {choice.format}: is no format of Megatron; choose {kinds}")
    source = open_source(megatron_path, "megatron", registry=registry)
    if not isinstance(source, MegatronSource):
        raise PluginError(f"{megatron_path}: its format's source has no arrange(); report it")
    config, files, reference = describe_model(source, hf_model, registry, choice)
    conversion = prepare(
        "reshard",
        source,
        config,
        registry=registry,
        choice=choice,
        dtype=torch_dtype,
        files=files,
        target=Target(
            layout or Layout(),
            dialect or "",
            source.number,
            source.attachments,
            _state(source, target_format("megatron", registry, choice), dialect, optimizer),
        ),
    )
    return replace(conversion, reference=reference.path if reference else None)


def _state(
    source: MegatronSource, target: Format, dialect: str | None, wanted: bool
) -> TrainingState | None:
    """The training state to carry, if there is any and it is wanted.

    Raises:
        UsageError: the target cannot hold it.

    """
    state = source.state if wanted else None
    if state is None:
        return None
    there = target.name, dialect or next(iter(target.dialects), "")
    if there != (state.format, state.dialect):
        raise UsageError(
            f"{source.path}: holds an optimizer's state, which only torch_dist carries, unchanged and "
            f"with keys of the same dialect; say --no-optimizer to write the weights alone"
        )
    return state
