"""Reading a ``torch_dist`` checkpoint, without megatron-core, a process group, or whole tensors."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import threading
from typing import TYPE_CHECKING, Any

from gptoss_convert.blockio import BlockReader
from gptoss_convert.dtypes import itemsize, torch_dtype
from gptoss_convert.errors import CheckpointError, PlanError
from gptoss_convert.plan import MOST_LAYERS
from gptoss_convert.scratch import Scratch
from gptoss_convert.transpose import copy
from gptoss_convert.types import Config, TensorSource, TensorSpec, TrainingState
from gptoss_convert.untrusted import require_inside
from gptoss_plugins.huggingface.headers import read_json
from gptoss_plugins.huggingface.source import identity
from gptoss_plugins.megatron import metadata, sidecars
from gptoss_plugins.megatron.beside import kept
from gptoss_plugins.megatron.folder import (
    MARK,
    METADATA,
    QUANTIZATION,
    TRACKER,
    attachments,
    companions,
    iteration_folder,
    number_of,
    require_own_files,
)
from gptoss_plugins.megatron.keys import (
    ADAPTER,
    OPTIMIZER,
    PER_LAYER,
    STACKED,
    is_stacked,
    is_weight,
    parameter,
)
from gptoss_plugins.megatron.torchzip import Item, read_item, view

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.layout import Parameter

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
_COPIED = 2 << 20  # bytes that are read before they are put in place


class TorchDistSource:
    """A distributed checkpoint of megatron-core; root or iteration folder."""

    def __init__(self, folder: Path) -> None:
        iteration = iteration_folder(folder)
        if iteration is None:
            raise CheckpointError(f"{folder}: holds no torch_dist checkpoint; check the path")
        if not iteration.is_dir():
            raise CheckpointError(
                f"{folder}: {TRACKER} names {iteration.name}, which is not there; copy it again, "
                f"or give the iter_* folder you mean"
            )
        for name in (METADATA, MARK):
            if not (iteration / name).is_file():
                raise CheckpointError(
                    f"{iteration}: has no {name}, so it was not written to the end; write it again"
                )
        self.path = folder
        self.iteration = iteration
        require_own_files(folder, iteration)
        self.contents = metadata.load(iteration)
        require_inside(folder, (iteration / file for file in metadata.files(self.contents)))
        self._specs, self._places = _parameters(self.contents)
        self._readers: dict[str, BlockReader] = {}
        self._opening = threading.Lock()
        self._indexes: dict[str, _Index] = {}

    @property
    def files(self) -> Mapping[str, Path]:
        """Hugging Face companions that the import carried along."""
        return companions(self.iteration)

    @property
    def number(self) -> int:
        """From the folder's name."""
        return number_of(self.iteration)

    @property
    def attachments(self) -> Mapping[str, Path]:
        """What the import kept of a quantized source."""
        return attachments(self.iteration)

    @property
    def state(self) -> TrainingState | None:
        """The optimizer's state and what goes with it, if it is here."""
        if not any(key.startswith(OPTIMIZER) for key in self.contents.tensors):
            return None
        return TrainingState(
            "torch_dist", STACKED if self._is_stacked else PER_LAYER, self.iteration
        )

    @property
    def _is_stacked(self) -> bool:
        return any(is_stacked(key) for key in self.contents.tensors)

    def arrange(self, parameters: Mapping[str, Parameter]) -> None:
        """Nothing to learn: tensors are stored whole.

        Raises:
            CheckpointError: they are an adapter's, and a model's are asked for.

        """
        if _has_adapters(self._specs) and not _has_adapters(parameters):
            raise CheckpointError(
                f"{self.path}: is the checkpoint of an adapter, not of a model; name the model, and it "
                f"with --adapter, or see gptoss-convert adapter --help"
            )

    def hints(self, codec: str) -> TensorSource | None:
        """Parts of the quantized checkpoint this was imported from, if the import kept them."""
        return kept(self.iteration, codec)

    @property
    def config(self) -> Config | None:
        """Hugging Face's config, if the import carried it along."""
        path = self.files.get("config.json")
        return read_json(path) if path else None

    @property
    def megatron_config(self) -> Config | None:
        """From ``run_config.yaml``, or from the ``args`` of plain Megatron-LM."""
        common = sidecars.read_common(self.iteration, self.contents.objects)
        return sidecars.read_megatron_config(self.iteration, common)

    @property
    def megatron_configs(self) -> Mapping[str, Config]:
        """The same from each of these places, by its name."""
        return sidecars.every_config(self.iteration, self.contents.objects)

    def describe(self) -> Mapping[str, Any]:
        """Iteration, how layers are keyed, how many chunks and objects, training state."""
        tensors, objects = self.contents.tensors, self.contents.objects
        return {
            "iteration": self.iteration.name,
            "layers": "stacked keys" if self._is_stacked else "one key per layer",
            "keys": len(tensors),
            "chunks": sum(len(tensor.chunks) for tensor in tensors.values()),
            "files": len(metadata.files(self.contents)),
            "extra_state_objects": sum("._extra_state/" in name for name in objects),
            "optimizer_state": any(not is_weight(name) for name in tensors),
            "common_state": sidecars.common_place(self.iteration, objects),
            "companions": sorted(self.files),
            "kept_for_requantizing": sorted(
                path.stem for path in (self.iteration / QUANTIZATION).glob("*.safetensors")
            ),
        }

    def specs(self) -> Mapping[str, TensorSpec]:
        """Weights by parameter name; optimizer and other training state left out."""
        return self._specs

    def check(self) -> None:
        """Every data file is there and long enough, and every key is covered by its chunks."""
        problems = []
        for file, least in metadata.files(self.contents).items():
            path = self.iteration / file
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                problems.append(f"{file}: is missing; copy the whole checkpoint again")
            elif size < least:
                problems.append(
                    f"{file}: is cut short ({size} bytes, at least {least} are due); copy it again"
                )
        problems += [
            f"{key}: its chunks do not cover it exactly; write the checkpoint again"
            for key, tensor in self.contents.tensors.items()
            if is_weight(key) and not metadata.is_tiled(tensor)
        ]
        if problems:
            raise PlanError(str(self.iteration), problems)

    def fingerprint(self) -> str:
        """From the metadata, sizes and times of change; reads no data."""
        digest = hashlib.sha256((self.iteration / METADATA).read_bytes())
        for file in sorted(metadata.files(self.contents)):
            stat = os.stat(self.iteration / file)
            digest.update(f"{file}:{identity(stat)}:".encode())
        for name, path in self.files.items():
            digest.update(os.fsencode(name) + path.read_bytes())
        return digest.hexdigest()

    def read(self, name: str, rows: slice | None = None, scratch: Scratch | None = None) -> Tensor:
        """The parameter, or ``rows`` of its dim 0, put together from the chunks it is stored in."""
        key, layer = self._places[name]
        shape = self._specs[name].shape
        if rows is not None:
            first, stop, _ = rows.indices(shape[0])
            box = ((first, *(0 for _ in shape[1:])), (stop - first, *shape[1:]))
        else:
            box = (tuple(0 for _ in shape), shape)
        if layer is not None:
            box = ((layer, *box[0]), (1, *box[1]))
        found = self.read_box(key, box, scratch or Scratch())
        return found[0] if layer is not None else found

    def read_box(self, key: str, box: Box, scratch: Scratch) -> Tensor:
        """A box of what is stored under a key, in its dtype.

        Args:
            key: of the tensor.
            box: offsets and sizes along all of its axes.
            scratch: memory for it.

        Raises:
            CheckpointError: what is stored does not cover it, or is damaged.

        """
        tensor = self.contents.tensors[key]
        dtype = torch_dtype(tensor.spec.dtype)
        parts = list(_overlaps(self._index(key).candidates(box), box))
        if sum(math.prod(common[1]) for _, common in parts) != math.prod(box[1]):
            raise CheckpointError(
                f"{self.iteration}: the chunks of {key} do not cover it exactly; write it again"
            )
        if len(parts) == 1:
            ((chunk, common),) = parts
            return _read_common(self._stored(key, chunk), chunk, common, scratch)
        whole = (
            scratch.take(math.prod(box[1]) * itemsize(tensor.spec.dtype)).view(dtype).view(box[1])
        )
        mark = scratch.mark()
        for chunk, part in parts:
            stored = self._stored(key, chunk)
            for common in runs(part, itemsize(tensor.spec.dtype)):
                target = whole
                for axis, (start, size) in enumerate(zip(*common, strict=True)):
                    target = target.narrow(axis, start - box[0][axis], size)
                copy(target, _read_common(stored, chunk, common, scratch))
                scratch.release(mark)
        return whole

    def _index(self, key: str) -> _Index:
        if key not in self._indexes:
            self._indexes[key] = _Index(self.contents.tensors[key].chunks)
        return self._indexes[key]

    def _stored(self, key: str, chunk: metadata.StoredChunk) -> tuple[BlockReader, Item]:
        """The file that a chunk is in, and what is there."""
        reader = self._reader(chunk.at.file)
        item = read_item(reader, chunk.at.offset, chunk.at.length)
        spec = self.contents.tensors[key].spec
        if item.shape != chunk.sizes or item.dtype != spec.dtype:
            raise CheckpointError(
                f"{reader.path}: holds {item.dtype} {list(item.shape)} where {METADATA} places "
                f"{spec.dtype} {list(chunk.sizes)} of {key}; fetch the checkpoint again"
            )
        return reader, item

    def _reader(self, file: str) -> BlockReader:
        with self._opening:
            if file not in self._readers:
                self._readers[file] = BlockReader(self.iteration / file)
            return self._readers[file]


def _has_adapters(names: Iterable[str]) -> bool:
    return any(ADAPTER in name for name in names)


class _Index:
    """Chunks by their place along the leading axes that are cut one by one (layer, expert).

    A checkpoint has tens of thousands of chunks, and every read needs a few.
    """

    def __init__(self, chunks: Sequence[metadata.StoredChunk]) -> None:
        lead = 0
        while lead < 2 and all(len(c.sizes) > lead and c.sizes[lead] == 1 for c in chunks):
            lead += 1
        self._lead = lead
        self._buckets: dict[tuple[int, ...], list[metadata.StoredChunk]] = {}
        for chunk in chunks:
            self._buckets.setdefault(chunk.offsets[:lead], []).append(chunk)

    def candidates(self, box: Box) -> Iterator[metadata.StoredChunk]:
        """Chunks that may share elements with a box."""
        ranges = (range(o, o + n) for o, n in list(zip(*box, strict=True))[: self._lead])
        for place in itertools.product(*ranges):
            yield from self._buckets.get(place, ())


def _overlaps(
    chunks: Iterable[metadata.StoredChunk], box: Box
) -> Iterator[tuple[metadata.StoredChunk, Box]]:
    """Chunks that share elements with a box, and what they share."""
    for chunk in chunks:
        low = [max(a, b) for a, b in zip(chunk.offsets, box[0], strict=True)]
        high = [
            min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, *box, strict=True)
        ]
        if all(h > lo for h, lo in zip(high, low, strict=True)):
            yield chunk, (tuple(low), tuple(h - lo for h, lo in zip(high, low, strict=True)))


def _read_common(
    stored: tuple[BlockReader, Item], chunk: metadata.StoredChunk, common: Box, scratch: Scratch
) -> Tensor:
    """The part ``common`` of a chunk: from the first to the last byte it needs, then a view."""
    inner = [c - o for c, o in zip(common[0], chunk.offsets, strict=True)]
    return view(*stored, inner, common[1], scratch)


def runs(box: Box, width: int, most: int = _COPIED) -> Iterator[Box]:
    """The box cut along its first axis that has a length, into runs of about ``most`` bytes.

    Args:
        box: offsets and sizes.
        width: bytes of an element.
        most: bytes of a run; one step along the axis at least.

    """
    offsets, sizes = box
    axis = next((a for a, size in enumerate(sizes) if size > 1), None)
    if axis is None:
        yield box
        return
    before, after = slice(0, axis), slice(axis + 1, None)
    step = max(1, most // (width * math.prod(sizes[after])))
    for start in range(0, sizes[axis], step):
        count = min(step, sizes[axis] - start)
        yield (
            (*offsets[before], offsets[axis] + start, *offsets[after]),
            (*sizes[before], count, *sizes[after]),
        )


def _parameters(
    contents: metadata.Contents,
) -> tuple[dict[str, TensorSpec], dict[str, tuple[str, int | None]]]:
    """Specs by parameter name, and the (key, row of its layer axis) where each stands."""
    specs: dict[str, TensorSpec] = {}
    places: dict[str, tuple[str, int | None]] = {}
    for key, tensor in contents.tensors.items():
        if not is_weight(key):
            continue
        shape, dtype = tensor.spec.shape, tensor.spec.dtype
        if is_stacked(key) and (not shape or shape[0] > MOST_LAYERS):
            raise CheckpointError(
                f"{key}: has {dtype} {list(shape)}, which is no stack of layers; fetch the checkpoint "
                f"again"
            )
        for layer in range(shape[0]) if is_stacked(key) else (None,):
            name = parameter(key, layer, len(shape) - (layer is not None))
            if name in specs:
                raise CheckpointError(
                    f"{name}: is stored under {places[name][0]} and under {key}; remove the stale one"
                )
            specs[name] = TensorSpec(shape[1:] if layer is not None else shape, dtype)
            places[name] = (key, layer)
    return specs, places
