"""The format of Hugging Face checkpoints: a folder of safetensors files, or a hub id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert import Format, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptoss_convert.plan import ConversionPlan
    from gptoss_convert.types import TensorSink, TensorSource


_ADAPTER = "adapter_model.safetensors"  # transformers, too, keeps those apart from a model's own


def detect(folder: Path) -> bool:
    """A folder with a ``config.json`` or safetensors files, those of an adapter apart."""
    weights = (path for path in folder.glob("*.safetensors") if path.name != _ADAPTER)
    return (folder / "config.json").is_file() or any(weights)


def open_folder(folder: Path) -> TensorSource:
    """Read headers and config; no tensor yet."""
    from gptoss_plugins.huggingface.source import HuggingFaceSource

    return HuggingFaceSource(folder)


def create(folder: Path, plan: ConversionPlan) -> TensorSink:
    """A sink that will write shards of at most 5 GB."""
    from gptoss_plugins.huggingface.sink import HuggingFaceSink

    return HuggingFaceSink(folder, plan)


def resolve(name: str, revision: str | None, headers_only: bool) -> Path:
    """A hub id -> local folder, through huggingface_hub's cache."""
    from gptoss_plugins.huggingface.hub import fetch

    return fetch(name, revision, headers_only)


@hookimpl
def gptoss_convert_formats() -> Iterator[Format]:
    """Safetensors folders."""
    yield Format("huggingface", "hf", detect, open_folder, create, resolve, preferred=True)
