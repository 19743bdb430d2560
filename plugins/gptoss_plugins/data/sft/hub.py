"""Data of Hugging Face's ``datasets``, as Parquet files that are read like any others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_64

from gptoss_convert.errors import ConfigError
from gptoss_plugins.data.sft.locking import alone_in
from gptoss_plugins.gpt_model.installed import require_installed

if TYPE_CHECKING:
    from collections.abc import Callable


def exported(
    name: str, subset: str | None, split: str, validation: str | None, folder: Path, *, sure: bool
) -> tuple[Path, Path | None]:
    """Files of two splits; those that an earlier call made are taken as they are, without a network.

    Args:
        name: at the hub, or a local folder, as ``datasets.load_dataset`` and ``load_from_disk`` take.
        subset: of the data, where it has several.
        split: for training.
        validation: for validation, if any.
        folder: for the files.
        sure: whether there has to be that one.

    Raises:
        ConfigError: there is no such data, or ``datasets`` is not installed.

    """
    stem = re.sub(r"[^\w.-]+", "_", "-".join([name, *([subset] if subset else []), *_state(name)]))
    training = folder / f"{stem}-{split}.parquet"
    held_out = folder / f"{stem}-{validation}.parquet" if validation else None
    if training.is_file():  # written last
        return training, held_out if held_out and held_out.is_file() else None
    require_installed(f"dataset.dataset_name {name}", "datasets", extras="sft")
    with alone_in(folder):
        if not training.is_file():
            if held_out and validation:
                _write_if_there(name, subset, validation, held_out, sure=sure)
            _write(_load(name, subset, split), training)
    return training, held_out if held_out and held_out.is_file() else None


def _state(name: str) -> list[str]:
    """Of a local folder: a checksum of what files it has, so that other data are read anew."""
    files = [*Path(name).rglob("*")] if Path(name).is_dir() else []
    facts = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return [xxh3_64(repr(sorted(facts)).encode()).hexdigest()] if facts else []


def _write_if_there(name: str, subset: str | None, split: str, path: Path, *, sure: bool) -> None:
    try:
        _write(_load(name, subset, split), path)
    except ConfigError:
        if sure:
            raise


def _load(name: str, subset: str | None, split: str) -> Any:
    import datasets

    def from_disk() -> Any:
        found = datasets.load_from_disk(name)
        return found[split] if isinstance(found, dict) else found

    is_saved = any((Path(name) / f).is_file() for f in ("state.json", "dataset_dict.json"))
    load: Callable[[], Any] = (
        from_disk if is_saved else lambda: datasets.load_dataset(name, subset, split=split)
    )
    try:
        return load()
    except Exception as error:  # it raises all sorts
        raise ConfigError(
            f"{name}: datasets cannot read its split {split!r} ({type(error).__name__}: {error}); check "
            f"dataset.dataset_name, dataset.dataset_subset and dataset.dataset_split"
        ) from None


def _write(data: Any, path: Path) -> None:
    half = path.with_name(path.name + ".part")
    data.to_parquet(str(half))
    half.rename(path)
