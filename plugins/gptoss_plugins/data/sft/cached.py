"""Packs of a config's records, made by the first process that asks for them, and kept."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from typing import TYPE_CHECKING

from xxhash import xxh3_64

from gptoss_convert.progress import reporting
from gptoss_plugins.data.sft.form import Form
from gptoss_plugins.data.sft.locking import alone_in
from gptoss_plugins.data.sft.making import Shape, facts_of, pack, tokenize
from gptoss_plugins.data.sft.packed_file import SCHEMA
from gptoss_plugins.data.sft.presets import PRESETS
from gptoss_plugins.data.sft.splitting import split
from gptoss_plugins.data.sft.tokenizing import Job

if TYPE_CHECKING:
    from pathlib import Path

    from gptoss_plugins.infer.tokenizer import Tokenizer
    from gptoss_plugins.train.config import SftDataset

log = logging.getLogger("gptoss_convert")
_PER_PROCESS = (
    256 << 20
)  # bytes of input that are worth another one, which has to load the tokenizer


def cached_packs(
    path: Path,
    folder: Path,
    config: SftDataset,
    tokenizer: Tokenizer,
    *,
    share: float,
    show: bool,
) -> tuple[Path, Path | None]:
    """Files of packs for training and, of a share of the records, for validation.

    Their names stand for all that they depend on: the input as it is now, the form of its records,
    the tokenizer, the shape of rows.

    Args:
        path: the records.
        folder: for the files.
        config: how they are read and packed.
        tokenizer: the run's.
        share: part of the records that is kept for validation.
        show: progress on stderr.

    """
    job = Job(form_of(config), tokenizer)
    multiple = config.pad_seq_to_mult if config.packing else 1
    shape = Shape(config.sequence_length, multiple, config.packing)
    status = path.stat()
    facts = [
        [SCHEMA, str(path.absolute()), status.st_size, status.st_mtime_ns],
        [share, config.random_seed, config.max_train_samples],
        facts_of(shape, job.form, tokenizer),
    ]
    key = xxh3_64(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    stem = f"{path.name.partition('.')[0]}-{key}"
    training, validation = folder / f"{stem}.parquet", folder / f"{stem}-validation.parquet"
    if not training.is_file():  # it is written last
        with alone_in(folder):
            if not training.is_file():
                targets, parts = (training, validation), folder / f"{stem}.parts"
                _make(path, parts, targets, config, job, shape, share, show=show)
    return training, validation if validation.is_file() else None


def form_of(config: SftDataset) -> Form:
    """How a config's records are read."""
    names = [field.name for field in dataclasses.fields(Form) if field.name != "preset"]
    is_named = config.dataset_root is None and config.dataset_name in PRESETS
    preset = config.dataset_name if is_named else None
    return Form(**{name: getattr(config, name) for name in names}, preset=preset)


def _make(
    path: Path,
    parts: Path,
    targets: tuple[Path, Path],
    config: SftDataset,
    job: Job,
    shape: Shape,
    share: float,
    *,
    show: bool,
) -> None:
    """Both files, the one for training last."""
    size = path.stat().st_size
    workers = min(len(os.sched_getaffinity(0)), 1 + size // _PER_PROCESS)
    log.info("%s: making samples of it, in %s", path, parts.parent)
    try:
        with reporting("tokenize", size, show=show) as progress:
            samples = tokenize([path], parts, job, workers=workers, progress=progress)
        chosen, held = split(samples.owners, samples.records, config, share)
        if len(held) and samples.lengths[held].min() > shape.sequence_length + 1:
            log.warning("%s: all samples kept for validation are too long; there is none", path)
        elif len(held):
            pack(samples, held, targets[1], shape, job, f"{path}, validation part")
        pack(samples, chosen, targets[0], shape, job, str(path))
    finally:  # only a run that is killed leaves it, for the next one to go on from
        shutil.rmtree(parts, ignore_errors=True)
