"""Writing a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gptoss_convert.blockio import WRITER_BYTES, BlockWriter, write_file
from gptoss_convert.checksums import Span
from gptoss_convert.dtypes import from_torch_name, torch_name
from gptoss_convert.errors import UsageError
from gptoss_convert.plan import ConversionPlan, Group, Step
from gptoss_plugins.huggingface.headers import INDEX, SINGLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.types import TensorSpec

SHARD_BYTES = 5_000_000_000  # transformers' habit
_DTYPE_FIELDS = ("torch_dtype", "dtype")
_QUANTIZATION = "quantization_config"


class HuggingFaceSink:
    """Safetensors shards, their index, config and companions.

    A step's tensors stay in one shard; a shard is the unit of parallel work and of resuming.
    """

    buffer_bytes = WRITER_BYTES

    def __init__(self, folder: Path, plan: ConversionPlan) -> None:
        self._folder, self._plan = folder, plan
        self.groups: Sequence[Group] = list(_shards(plan.steps))
        self._headers = {group.name: shard_header(group) for group in self.groups}

    @property
    def nbytes(self) -> int:
        """Shards to the byte; a little more for the rest."""
        shards = sum(g.nbytes + len(self._headers[g.name]) for g in self.groups)
        companions = sum(path.stat().st_size for path in self._plan.files.values())
        return shards + companions + len(self._index()) + (1 << 16)

    def done(self, group: Group) -> bool:
        """A shard under its final name is whole: it gets that name last."""
        return (self._folder / group.name).exists()

    def open(self, group: Group) -> ShardWriter:
        """Start a shard with its header."""
        return open_shard(self._folder / group.name, group, self._headers[group.name])

    def finish(self) -> None:
        """Companions, then the config, then what tells a loader where the tensors are."""
        for name, path in self._plan.files.items():
            if name != "config.json":
                write_file(self._folder / name, path.read_bytes())
        write_file(self._folder / "config.json", self._config())
        if len(self.groups) > 1:
            write_file(self._folder / INDEX, self._index())

    def _index(self) -> bytes:
        places = {name: g.name for g in self.groups for name, _ in _tensors(g.steps)}
        index = {
            "metadata": {"total_size": self._plan.bytes_out},
            "weight_map": dict(sorted(places.items())),
        }
        return (json.dumps(index, indent=2) + "\n").encode()

    def _config(self) -> bytes:
        """The source's own bytes if nothing in it changes."""
        config = export_config(self._plan)
        original = self._plan.files.get("config.json")
        if original and json.loads(original.read_bytes()) == config:
            return original.read_bytes()
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def export_config(plan: ConversionPlan) -> dict[str, Any]:
    """The model's config with quantization and dtype as they are written, else unchanged.

    A dtype field is added where there is none, but not to the config of a checkpoint that was
    quantized in the same way, which did without.
    """
    config = dict(plan.config)
    as_before = plan.quantization is not None and plan.quantization == config.get(_QUANTIZATION)
    config.pop(_QUANTIZATION, None)
    if plan.quantization is not None:
        config[_QUANTIZATION] = dict(plan.quantization)
    present = [name for name in _DTYPE_FIELDS if name in config]
    for name in present or (() if as_before else _DTYPE_FIELDS):
        if not _same_dtype(config.get(name), plan.dtype):
            config[name] = torch_name(plan.dtype)
    return config


def _same_dtype(value: Any, dtype: str) -> bool:
    try:
        return isinstance(value, str) and from_torch_name(value) == dtype
    except UsageError:  # "auto", or a type of somebody else's
        return False


class ShardWriter:
    """Tensors must arrive in the header's order; then their bytes only have to be appended."""

    def __init__(self, path: Path, header: bytes, specs: Mapping[str, TensorSpec]) -> None:
        self._rows = {n: s.nbytes // s.shape[0] if s.shape else 0 for n, s in specs.items()}
        self._places: dict[str, Span] = {}
        self._nbytes = len(header)
        for name, spec in specs.items():
            self._places[name] = Span(name, self._nbytes, spec.nbytes)
            self._nbytes += spec.nbytes
        self._writer = BlockWriter(path, self._nbytes, self._places.values())
        self._writer.append_bytes(header)

    def write(self, name: str, rows: slice, tensor: Tensor) -> None:
        """Append the elements."""
        place = self._places[name].offset + rows.start * self._rows[name]
        self._writer.require(place, name)
        self._writer.append(tensor)

    def close(self) -> None:
        """Put the shard in place."""
        self._writer.require(self._nbytes, "the end")
        self._writer.close()

    def abort(self) -> None:
        """Leave nothing behind."""
        self._writer.abort()


def open_shard(path: Path, group: Group, header: bytes) -> ShardWriter:
    """Start a safetensors file with its header."""
    return ShardWriter(path, header, dict(_tensors(group.steps)))


def _shards(steps: Sequence[Step]) -> Iterator[Group]:
    """Steps in order, a new shard before one would pass SHARD_BYTES."""
    bins: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        if bins[-1] and size + step.nbytes > SHARD_BYTES:
            bins.append([])
            size = 0
        bins[-1].append(step)
        size += step.nbytes
    for number, shard in enumerate(bins, 1):
        name = SINGLE if len(bins) == 1 else f"model-{number:05d}-of-{len(bins):05d}.safetensors"
        yield Group(name, tuple(shard))


def shard_header(group: Group) -> bytes:
    """What a shard begins with: the header's length and the header."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, spec in _tensors(group.steps):
        table[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.nbytes],
        }
        start += spec.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensors(steps: Iterable[Step]) -> Iterator[tuple[str, TensorSpec]]:
    return (stored for step in steps for o in step.outputs for stored in o.stored)
