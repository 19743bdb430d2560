"""The model that an adapter is for, as a command line names it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import UsageError
from gptoss_convert.opening import config_of, hub_id, open_source

if TYPE_CHECKING:
    from pathlib import Path

    from gptoss_convert.opening import Choice
    from gptoss_convert.registry import Registry
    from gptoss_convert.types import Config, ModelFamily, TensorSource


@dataclass(frozen=True)
class Model:
    """A model of which only the config counts.

    Attributes:
        name: for messages.
        family: of the model.
        config: Hugging Face's.
        config_file: where that stands, if it does.
        hub_id: of the model, if it was named by that.

    """

    name: str
    family: ModelFamily
    config: Config
    config_file: Path | None
    hub_id: str | None


def require_one(*, hf_model: str | None, megatron_path: Path | None, **_: Any) -> str:
    """The one checkpoint that is named; takes all of a command's options.

    Raises:
        UsageError: none is, or two.

    """
    if (hf_model is None) == (megatron_path is None):
        raise UsageError("name the model, with --hf-model or with --megatron-path")
    return hf_model or str(megatron_path)


def model_of(registry: Registry, choice: Choice, **options: Any) -> Model:
    """The model that a command's options name; its weights need not be there."""
    name = require_one(**options)
    source = open_source(
        name, registry=registry, choice=choice, revision=options["hf_revision"], headers_only=True
    )
    return _model(name, source, registry, choice)


def own_model(path: str, registry: Registry, choice: Choice) -> Model:
    """The model whose config an adapter's checkpoint carries."""
    return _model(path, open_source(path, registry=registry), registry, choice)


def _model(name: str, source: TensorSource, registry: Registry, choice: Choice) -> Model:
    config = config_of(source, registry, choice)
    family = registry.model_for(config, choice.model)
    return Model(name, family, config, source.files.get("config.json"), hub_id(name))
