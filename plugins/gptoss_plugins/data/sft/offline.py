"""Packing before training, into a file of the user's."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_convert.errors import UsageError
from gptoss_plugins.data.sft.making import pack, tokenize
from gptoss_plugins.data.sft.packed_file import SCHEMA
from gptoss_plugins.data.units import PARQUET, find_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gptoss_plugins.data.sft.making import Shape
    from gptoss_plugins.data.sft.tokenizing import Job


def pack_files(
    inputs: Sequence[Path],
    output: Path,
    shape: Shape,
    job: Job,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Records -> a Parquet file of packs.

    Args:
        inputs: files and folders of JSONL, zstd JSONL or Parquet.
        output: the file; ``.parquet`` is added where it is missing.
        shape: of the packs.
        job: how records are read.
        workers: processes.
        overwrite: replace a file that is there.
        progress: is told bytes of input as they are done.

    Returns:
        What ``data pack --json`` tells (docs/json.md).

    Raises:
        UsageError: the inputs or the target make no sense.
        CheckpointError: a record is bad, or none fits; what was tokenized is kept.

    """
    if output.suffix not in PARQUET:
        output = output.with_name(output.name + PARQUET[0])
    if output.is_dir():
        raise UsageError(f"{output}: is a folder; name a file")
    if output.exists() and not overwrite:
        raise UsageError(f"{output}: is there already; say --overwrite, or name another file")
    files = find_files(inputs)
    if output.resolve() in [path.resolve() for path in files]:
        raise UsageError(f"{output}: is one of the inputs; name another file")
    parts = output.with_name(output.name + ".parts")
    samples = tokenize(files, parts, job, workers=workers, progress=progress)
    everything = np.arange(len(samples.lengths))
    report = pack(samples, everything, output, shape, job, str(files[0]))
    skipped = samples.records - len(np.unique(samples.owners))
    shutil.rmtree(parts)
    return {
        "schema": SCHEMA,
        "path": str(output),
        "sequence_length": shape.sequence_length,
        "files": len(files),
        "records": samples.records,
        "skipped": skipped,
        **report,
    }
