"""The ``.metadata`` of a distributed checkpoint: which chunk of which key is where.

Its format is torch.distributed.checkpoint's ``Metadata``, pickled.
"""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_convert.dtypes import known, torch_dtype
from gptoss_convert.errors import CheckpointError
from gptoss_convert.types import TensorSpec
from gptoss_convert.untrusted import read_small
from gptoss_plugins.megatron import dcp, safe_pickle
from gptoss_plugins.megatron.folder import METADATA
from gptoss_plugins.megatron.pickle_limits import LONGEST

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


_MOST_PAIRED = 2048  # boxes that are compared each with each other


@dataclass(frozen=True)
class Stored:
    """A stretch of a file, in bytes."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredChunk:
    """A box of a global tensor, and where its item is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    at: Stored


@dataclass(frozen=True)
class Tensor:
    """A key: its global shape and dtype, and its chunks."""

    spec: TensorSpec
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class Contents:
    """All of a checkpoint: tensors by key, objects by name."""

    tensors: Mapping[str, Tensor]
    objects: Mapping[str, Stored]


def dump(contents: Contents) -> bytes:
    """Pickle as torch.distributed.checkpoint does."""
    with dcp.classes() as classes:
        return pickle.dumps(_metadata(contents, *classes), protocol=4)


def _metadata(contents: Contents, dcp: Any, storage_info: Any) -> Any:
    import torch

    states: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for key, tensor in contents.tensors.items():
        boxes = [(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
        states[key] = dcp.TensorStorageMetadata(
            properties=dcp.TensorProperties(dtype=torch_dtype(tensor.spec.dtype)),
            size=torch.Size(tensor.spec.shape),
            chunks=[dcp.ChunkStorageMetadata(offsets=o, sizes=s) for o, s in boxes],
        )
        for (offsets, _), chunk in zip(boxes, tensor.chunks, strict=True):
            at = chunk.at
            places[dcp.MetadataIndex(key, offsets)] = storage_info(at.file, at.offset, at.length)
    for name, at in contents.objects.items():
        states[name] = dcp.BytesStorageMetadata()
        places[dcp.MetadataIndex(name)] = storage_info(at.file, at.offset, at.length)
    optional = {"version": "1.0.0"} if "version" in {f.name for f in fields(dcp.Metadata)} else {}
    return dcp.Metadata(
        state_dict_metadata=states, storage_data=places, storage_meta=dcp.StorageMeta(), **optional
    )


def load(folder: Path) -> Contents:
    """Read a checkpoint's ``.metadata`` without executing anything.

    Raises:
        CheckpointError: it is missing, damaged, or asks for what no checkpoint needs.

    """
    path = folder / METADATA
    try:
        data = read_small(path, LONGEST)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; the checkpoint is incomplete") from None
    raw = safe_pickle.load(data, str(path))
    try:
        places = {
            (_key(index.fqn), _box(getattr(index, "offset", None))): _stored(info)
            for index, info in raw.storage_data.items()
        }
        return _contents(raw.state_dict_metadata, places)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is no checkpoint metadata ({error}); fetch it again"
        ) from None


def _contents(states: Any, places: Mapping[tuple[str, Any], Stored]) -> Contents:
    tensors, objects = {}, {}
    for key, state in states.items():
        key = _key(key)
        if hasattr(state, "chunks"):
            chunks = tuple(_chunk(key, chunk, places) for chunk in state.chunks)
            spec = TensorSpec(_box(state.size) or (), _dtype(state.properties))
            tensors[key] = Tensor(spec, chunks)
        elif (key, None) in places:
            objects[key] = places[key, None]
    return Contents(tensors, objects)


def _chunk(key: str, raw: Any, places: Mapping[tuple[str, Any], Stored]) -> StoredChunk:
    offsets, sizes = _box(raw.offsets) or (), _box(raw.sizes) or ()
    at = places.get((key, offsets))
    if at is None and not offsets:
        at = places[key, None]
    if at is None:
        raise ValueError(f"the chunk of {key} at {list(offsets)} is in no file")
    return StoredChunk(offsets, sizes, at)


def _key(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError("a key that is no text")
    return raw


def _dtype(properties: Any) -> str:
    """The element type: the first of TensorProperties' state."""
    found = properties.state[0] if isinstance(properties.state, tuple) else properties.dtype
    if not isinstance(found, str) or not known(found):
        raise ValueError("a tensor without an element type")
    return found


def _box(raw: Any) -> tuple[int, ...] | None:
    if raw is None:
        return None
    if not isinstance(raw, tuple) or not all(type(n) is int and 0 <= n < 1 << 63 for n in raw):
        raise ValueError("a shape that is none")
    return raw


def _stored(info: Any) -> Stored:
    file, offset, length = info.relative_path, info.offset, info.length
    if not isinstance(file, str) or Path(file).name != file or not file.isprintable():
        raise ValueError(f"a chunk in {_shown(file)}, which is no file name")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, length)):
        raise ValueError(f"a chunk at {_shown(offset)}, {_shown(length)} bytes long")
    return Stored(file, offset, length)


def _shown(value: Any) -> str:
    """A value for a message; one that may have no end by its type."""
    return repr(value) if isinstance(value, str | int) else f"a {type(value).__name__}"


def is_tiled(tensor: Tensor) -> bool:
    """Whether the chunks cover the tensor exactly: no hole, no overlap, nothing outside."""
    shape = tensor.spec.shape
    boxes = [(c.offsets, c.sizes) for c in tensor.chunks]
    inside = all(
        len(offsets) == len(sizes) == len(shape)
        and all(o + n <= whole for o, n, whole in zip(offsets, sizes, shape, strict=True))
        for offsets, sizes in boxes
    )
    volume = sum(math.prod(sizes) for _, sizes in boxes)
    return inside and volume == math.prod(shape) and not _overlap(boxes)


def _overlap(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Sweep along the first axis on which the boxes begin at different places."""
    if len(boxes) < 2:
        return False
    starts = zip(*(offsets for offsets, _ in boxes), strict=True)
    axis = next((i for i, along in enumerate(starts) if len(set(along)) > 1), None)
    if axis is None:
        return True
    groups: dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for box in boxes:
        groups.setdefault(box[0][axis], []).append(box)
    edges = sorted(groups)
    for start, after in itertools.pairwise(edges):
        if any(start + sizes[axis] > after for _, sizes in groups[start]):
            return _overlap_pairwise(boxes)
    return any(_overlap(group) for group in groups.values())


def _overlap_pairwise(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """For grids that are no product of cuts; those are small, and a large one is taken for wrong."""
    return len(boxes) > _MOST_PAIRED or any(
        all(
            max(a, b) < min(a + n, b + m)
            for a, n, b, m in zip(one[0], one[1], two[0], two[1], strict=True)
        )
        for one, two in itertools.combinations(boxes, 2)
    )


def files(contents: Contents) -> dict[str, int]:
    """Every data file -> how long it must be at least."""
    ends: dict[str, int] = {}
    for at in _places(contents):
        ends[at.file] = max(ends.get(at.file, 0), at.offset + at.length)
    return ends


def _places(contents: Contents) -> Iterable[Stored]:
    yield from (chunk.at for tensor in contents.tensors.values() for chunk in tensor.chunks)
    yield from contents.objects.values()
