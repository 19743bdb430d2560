"""A config's rows: files of packs, made first where they are not there."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
from xxhash import xxh3_128

from gptoss_convert.errors import CheckpointError, UsageError
from gptoss_plugins.data.sft.dataset import SftRows
from gptoss_plugins.data.sft.form import Form
from gptoss_plugins.data.sft.locking import alone_in
from gptoss_plugins.data.sft.making import Shape, facts_of, pack, padding_of, tokenize
from gptoss_plugins.data.sft.packed_file import SCHEMA
from gptoss_plugins.data.sft.presets import PRESETS
from gptoss_plugins.data.sft.reading import PackedFile, is_packed
from gptoss_plugins.data.sft.sources import source_of
from gptoss_plugins.data.sft.splitting import split
from gptoss_plugins.data.sft.tokenizing import Job
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
    file = _opened(training, config, tokenizer)
    everything = np.arange(len(file))
    rows, held = everything, everything[:0]
    if validation is not None:
        held_file = _opened(validation, config, tokenizer)
        held = np.arange(len(held_file))
    else:
        held_file = file
        if source_of(config).training == training:  # packed by its owner, so packs are kept
            rows, held = split(everything, len(file), config)

    def made(file: PackedFile, numbers: NDArray[np.int64]) -> SftRows:
        padding = padding_of(tokenizer)
        return SftRows(file, numbers, config.sequence_length, padding, config.random_seed)

    return made(file, rows), made(held_file, held) if len(held) else None


def prepared(config: SftDataset, tokenizer: Tokenizer) -> tuple[Path, Path | None]:
    """The files of packs for training and validation; None for a part of the other, or nothing."""
    source = source_of(config)
    share = config.val_proportion if source.validation is None else 0.0
    if _has_packs(source.training, config):
        training, validation = source.training, None
    else:
        training, validation = _made(config, tokenizer, source.training, source.folder, share)
    if source.validation is not None:
        whole = dataclasses.replace(config, max_train_samples=None)
        validation = source.validation
        if not _has_packs(validation, config):
            validation, _ = _made(whole, tokenizer, validation, source.folder, 0.0)
    return training, validation


def form_of(config: SftDataset) -> Form:
    """How a config's records are read."""
    names = [field.name for field in dataclasses.fields(Form) if field.name != "preset"]
    is_named = config.dataset_root is None and config.dataset_name in PRESETS
    preset = config.dataset_name if is_named else None
    return Form(**{name: getattr(config, name) for name in names}, preset=preset)


def _has_packs(path: Path, config: SftDataset) -> bool:
    if path.suffix not in PARQUET or not is_packed(path):
        return False
    if not config.packing:
        raise UsageError(
            f"{path}: is packed, and dataset.packing is off; turn it on, or name the records"
        )
    return True


def _made(
    config: SftDataset, tokenizer: Tokenizer, path: Path, folder: Path, share: float
) -> tuple[Path, Path | None]:
    """Packs of a file of records and, of a share of them, for validation; made by the first to ask."""
    job = Job(form_of(config), tokenizer)
    shape = Shape(
        config.sequence_length, config.pad_seq_to_mult if config.packing else 1, config.packing
    )
    status = path.stat()
    facts = [
        [str(path.absolute()), status.st_size, status.st_mtime_ns],
        [share, config.random_seed, config.max_train_samples],
        facts_of(shape, job.form, tokenizer),
    ]
    key = xxh3_128(json.dumps([SCHEMA, *facts], sort_keys=True).encode()).hexdigest()[:16]
    stem = path.name.partition(".")[0]
    training = folder / f"{stem}-{key}.parquet"
    validation = folder / f"{stem}-{key}-validation.parquet"
    if not training.is_file():  # written last
        with alone_in(folder):
            if not training.is_file():
                parts = folder / f"{stem}-{key}.parts"
                log.info("%s: making samples of it, in %s", path, folder)
                try:
                    samples = tokenize([path], parts, job, workers=_workers(path))
                    chosen, held = split(samples.owners, samples.records, config, share)
                    if len(held):
                        pack(samples, held, validation, shape, job, f"{path}, validation part")
                    pack(samples, chosen, training, shape, job, str(path))
                finally:  # only a run that is killed leaves it, for the next one to go on from
                    shutil.rmtree(parts, ignore_errors=True)
    return training, validation if validation.is_file() else None


def _workers(path: Path) -> int:
    """Processes that are worth starting: one tokenizer takes a second or two to load in each."""
    return min(len(os.sched_getaffinity(0)), 1 + path.stat().st_size // (256 << 20))


def _opened(path: Path, config: SftDataset, tokenizer: Tokenizer) -> PackedFile:
    """A file that fits the run.

    Raises:
        CheckpointError: it was made for another tokenizer or another length, or has nothing.

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
    return file
