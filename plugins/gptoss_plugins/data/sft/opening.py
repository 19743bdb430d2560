"""A config's rows: files of packs, made first where they are not there."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_convert.errors import CheckpointError, UsageError
from gptoss_plugins.data.sft.cached import cached_packs
from gptoss_plugins.data.sft.dataset import SftRows
from gptoss_plugins.data.sft.form import Form
from gptoss_plugins.data.sft.making import padding_of
from gptoss_plugins.data.sft.reading import PackedFile, is_packed
from gptoss_plugins.data.sft.sources import source_of
from gptoss_plugins.data.sft.splitting import split
from gptoss_plugins.data.units import PARQUET

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from gptoss_plugins.infer.tokenizer import Tokenizer
    from gptoss_plugins.train.config import SftDataset

log = logging.getLogger("gptoss_convert")


def open_rows(config: SftDataset, tokenizer: Tokenizer) -> tuple[SftRows, SftRows | None]:
    """See :func:`gptoss_plugins.data.sft.sft_datasets`."""
    training, validation = prepared(config, tokenizer)
    file = held_file = _opened(training, config, tokenizer)
    rows, held = np.arange(len(file)), np.empty(0, np.int64)
    if source_of(config).training == training:  # packed by its owner: packs are what is split
        rows, held = split(rows, len(file), config, None if validation is None else 0.0)
    if validation is not None:
        held_file = _opened(validation, config, tokenizer)
        held = np.arange(len(held_file))

    def made(file: PackedFile, numbers: NDArray[np.int64]) -> SftRows:
        padding = padding_of(tokenizer)
        return SftRows(file, numbers, config.sequence_length, padding, config.random_seed)

    return made(file, rows), made(held_file, held) if len(held) else None


def prepared(
    config: SftDataset, tokenizer: Tokenizer, *, show: bool = False
) -> tuple[Path, Path | None]:
    """The files of packs for training and validation; None for a part of the other, or nothing."""
    source = source_of(config)
    share = config.val_proportion if source.validation is None else 0.0
    if _has_packs(source.training, config):
        training, validation = source.training, None
    else:
        training, validation = cached_packs(
            source.training, source.folder, config, tokenizer, share=share, show=show
        )
    if source.validation is not None:
        whole = dataclasses.replace(config, max_train_samples=None)
        validation = source.validation
        if not _has_packs(validation, config):
            validation, _ = cached_packs(
                validation, source.folder, whole, tokenizer, share=0.0, show=show
            )
    return training, validation


def _has_packs(path: Path, config: SftDataset) -> bool:
    if path.suffix not in PARQUET or not is_packed(path):
        return False
    if not config.packing:
        raise UsageError(
            f"{path}: is packed, and dataset.packing is off; turn it on, or name the records"
        )
    return True


def _opened(path: Path, config: SftDataset, tokenizer: Tokenizer) -> PackedFile:
    """A file that fits the run.

    Raises:
        CheckpointError: it was made for another tokenizer, length or form, or has nothing.

    """
    file = PackedFile(path, len(tokenizer))
    if not len(file):
        raise CheckpointError(f"{path}: has no row; pack the data again")
    if not file.facts:
        log.warning("%s: does not say which tokenizer its tokens are of; taken as they are", path)
        return file
    length, multiple = file.facts.get("sequence_length"), file.facts.get("pad_to_multiple")
    if file.facts.get("tokenizer") != tokenizer.digest:
        raise CheckpointError(
            f"{path}: was packed with another tokenizer than {tokenizer.where}; pack the data again "
            f"with this one"
        )
    if length != config.sequence_length:
        raise CheckpointError(
            f"{path}: was packed for a sequence length of {length}; pack the data again, or say "
            f"dataset.sequence_length={length} and model.seq_length={length}"
        )
    if config.packing and (not isinstance(multiple, int) or multiple % config.pad_seq_to_mult):
        raise CheckpointError(
            f"{path}: its samples are padded to multiples of {multiple}, where "
            f"dataset.pad_seq_to_mult is {config.pad_seq_to_mult}; pack the data again"
        )
    _require_form(file, config)
    return file


def _require_form(file: PackedFile, config: SftDataset) -> None:
    """Refuse a form that is asked for and is not the file's; what is left at its default asks for none."""
    packed = file.facts.get("form")
    if not isinstance(packed, dict):
        return
    for field in dataclasses.fields(Form):
        if field.name == "preset" or field.name not in packed:
            continue
        asked, found = _word(getattr(config, field.name)), _word(packed[field.name])
        if asked not in (found, _word(field.default)):
            name = f"dataset.{field.name}"
            raise CheckpointError(
                f"{file.path}: was packed with {field.name} {found}, where {name} is {asked}; pack the "
                f"data again, or say {name}={found}"
            )


def _word(value: Any) -> str:
    """A value as an override has it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value)
