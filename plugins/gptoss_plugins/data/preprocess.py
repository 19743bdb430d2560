"""Documents -> megatron-core's indexed dataset, ``PREFIX.bin`` and ``PREFIX.idx``.

Every unit becomes an indexed dataset of its own in ``PREFIX.parts``, on any process, and counts once its
index is there. In the end they are put together in order. So the bytes do not depend on how many
processes there were, nor on how often they were killed.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

from gptoss_convert.blockio import sync_folder
from gptoss_convert.errors import CheckpointError, UsageError
from gptoss_plugins.data.parts import claim, make_parts, part_file
from gptoss_plugins.data.records import documents
from gptoss_plugins.data.units import find_files, units_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gptoss_plugins.data.units import Unit

SCHEMA = "gptoss-convert.preprocess/1"
LAST = ".idx"


@dataclass(frozen=True)
class Job:
    """What is made of documents.

    Attributes:
        key: field or column with the text.
        append_eod: end every document with the tokenizer's end-of-text token.
        files: of the tokenizer: name -> file.
        where: the tokenizer's checkpoint, for messages.

    """

    key: str
    append_eod: bool
    files: Mapping[str, Path]
    where: str


def preprocess(
    inputs: Sequence[Path],
    prefix: Path,
    job: Job,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Tokenize documents into an indexed dataset.

    Args:
        inputs: files and folders of JSONL, zstd JSONL or Parquet.
        prefix: of the two files that are made.
        job: how.
        workers: processes.
        overwrite: replace a dataset that is there.
        progress: is told bytes of input as they are done.

    Returns:
        ``documents``, ``tokens``, ``bytes`` of the ``.bin`` file, ``files``, ``units``.

    Raises:
        UsageError: the inputs or the target make no sense.
        CheckpointError: a document is damaged (what was finished is kept), or there is none.

    """
    target = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if not overwrite and any(path.exists() for path in target):
        raise UsageError(f"{prefix}: is there already; say --overwrite, or name another prefix")
    files = find_files(inputs)
    units = [unit for path in files for unit in units_of(path)]
    parts = Path(f"{prefix}.parts")
    claim(parts, _plan(units, job), LAST)
    make_parts(make_part, parts, units, job, LAST, workers=workers, progress=progress)
    if not any(part_file(parts, n, ".bin").stat().st_size for n in range(len(units))):
        shutil.rmtree(parts)
        raise CheckpointError(
            f"{', '.join(map(str, inputs))}: no document in it has any text; name files that have some"
        )
    found = _join(parts, len(units), target)
    shutil.rmtree(parts)
    return {
        "schema": SCHEMA,
        "prefix": str(prefix),
        **found,
        "files": len(files),
        "units": len(units),
    }


def _plan(units: Sequence[Unit], job: Job) -> str:
    digest = xxh3_128()
    for name in sorted(job.files):
        digest.update(name.encode() + job.files[name].read_bytes())
    facts = [[str(u.path), u.start, u.stop, u.path.stat().st_mtime_ns] for u in units]
    return json.dumps([job.key, job.append_eod, digest.hexdigest(), facts])


def make_part(parts: Path, number: int, unit: Unit, job: Job) -> None:
    """One unit's own dataset; its index appears last."""
    import torch

    tokenizer = _tokenizer(job)
    data, index = part_file(parts, number, ".bin"), part_file(parts, number, LAST)
    megatron = _indexed_dataset()
    dtype = megatron.DType.optimal_dtype(len(tokenizer))
    builder = megatron.IndexedDatasetBuilder(str(data), dtype=dtype)
    end = [_end(tokenizer)] if job.append_eod else []
    with builder.data_file:
        for text in documents(unit, job.key):
            if ids := tokenizer.encode(text):
                builder.add_item(torch.tensor([*ids, *end], dtype=torch.int64))
                builder.end_document()
    half = index.with_suffix(".half")
    builder.finalize(str(half))
    half.rename(index)


_tokenizers: dict[str, Any] = {}  # one per process


def _tokenizer(job: Job) -> Any:
    if job.where not in _tokenizers:
        from gptoss_plugins.infer.tokenizer import load_tokenizer

        _tokenizers[job.where] = load_tokenizer(job.files, job.where)
    return _tokenizers[job.where]


def _end(tokenizer: Any) -> int:
    if (found := tokenizer.end_of_text) is None:
        raise UsageError(
            f"{tokenizer.where}: its tokenizer has no token that ends a text; say --no-append-eod"
        )
    return int(found)


def _indexed_dataset() -> Any:
    """megatron-core's module, without its warnings that Transformer Engine and Apex are missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def _join(parts: Path, count: int, target: tuple[Path, Path]) -> dict[str, Any]:
    """The parts one behind the other; both files by a rename, the index last."""
    megatron = _indexed_dataset()
    first = megatron._IndexReader(str(part_file(parts, 0, LAST)), multimodal=False)
    half = [path.with_name(path.name + ".part") for path in target]
    builder = megatron.IndexedDatasetBuilder(str(half[0]), dtype=first.dtype)
    for number in range(count):
        builder.add_index(str(part_file(parts, number, "")))
    builder.data_file.flush()
    os.fsync(builder.data_file.fileno())
    builder.finalize(str(half[1]))
    for path, made in zip(target, half, strict=True):
        made.rename(path)
    sync_folder(target[0].parent)
    return {
        "documents": len(builder.document_indices) - 1,
        "tokens": sum(map(int, builder.sequence_lengths)),
        "bytes": target[0].stat().st_size,
    }
