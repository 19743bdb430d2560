"""Where a config's records are: files for training, and perhaps some for validation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_convert.errors import UsageError
from gptoss_plugins.data.sft.hub import exported
from gptoss_plugins.data.sft.presets import PRESETS
from gptoss_plugins.data.units import PARQUET, PLAIN, ZSTD

if TYPE_CHECKING:
    from gptoss_plugins.train.config import SftDataset

TRAINING, VALIDATION = "training", "validation"
_ENDINGS = (*PARQUET, *PLAIN, *(f".jsonl{ending}" for ending in ZSTD))


@dataclass(frozen=True)
class Source:
    """Files of records, or of packs.

    Attributes:
        training: the file to train on.
        validation: the one to validate on; None for a part of the other.
        folder: for what is made of them.

    """

    training: Path
    validation: Path | None
    folder: Path


def source_of(config: SftDataset) -> Source:
    """The files of a config; those of ``datasets`` are fetched first, if they are not here.

    Raises:
        UsageError: they are not there.
        ConfigError: ``datasets`` is not installed, or has no such data.

    """
    if config.dataset_root is None:
        return _named(config)
    root = Path(config.dataset_root)
    if root.is_dir():
        training, validation = _beside(root, TRAINING), _beside(root, VALIDATION)
        if training is None:
            names = ", ".join(sorted(path.name for path in root.iterdir())[:10]) or "nothing"
            raise UsageError(
                f"{root}: has no training.jsonl or training.parquet, only {names}; name a file of it "
                f"by dataset.dataset_root, or rename it"
            )
    elif root.is_file():
        training, validation = root, None
    else:
        raise UsageError(
            f"{root}: is not there; dataset.dataset_root names a folder with training.jsonl, or a file"
        )
    if not training.name.endswith(_ENDINGS):
        raise UsageError(f"{training}: ends in none of {', '.join(_ENDINGS)}; rename or convert it")
    return Source(training, validation, _cache(config) or training.parent / "packed")


def _beside(root: Path, stem: str) -> Path | None:
    paths = (root / f"{stem}{ending}" for ending in _ENDINGS)
    return next((path for path in paths if path.is_file()), None)


def _named(config: SftDataset) -> Source:
    name = config.dataset_name
    if name is None:
        raise UsageError("dataset has neither dataset.dataset_root nor dataset.dataset_name")
    folder = _cache(config) or _home() / "gptoss-convert" / "sft"
    preset = PRESETS.get(name)
    if preset:
        split = config.dataset_split or preset.split
        validation = preset.validation if config.dataset_split is None else None
        name = preset.repository
    else:
        split, validation = config.dataset_split or "train", None
        if config.dataset_split is None:
            validation = VALIDATION
    found = exported(name, config.dataset_subset, split, validation, folder, sure=bool(preset))
    return Source(*found, folder)


def _cache(config: SftDataset) -> Path | None:
    return Path(config.path_to_cache) if config.path_to_cache else None


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
