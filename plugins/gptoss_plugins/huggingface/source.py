"""Reading a Hugging Face checkpoint folder."""

from __future__ import annotations

import hashlib
import os
import threading
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gptoss_convert.blockio import BlockReader
from gptoss_convert.dtypes import itemsize, torch_dtype
from gptoss_convert.errors import PlanError
from gptoss_convert.scratch import Scratch
from gptoss_convert.staging import human
from gptoss_convert.untrusted import require_inside, require_small
from gptoss_plugins.huggingface.headers import INDEX, read_json, read_shards

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.types import Config, TensorSource, TensorSpec
    from gptoss_plugins.huggingface.headers import Shard

# What makes a checkpoint usable beside its weights.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)


def identity(stat: os.stat_result) -> tuple[int, ...]:
    """Changes with the file, even if its size and time of change were kept up."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


class SafetensorsSource:
    """Tensors in safetensors files of one folder. Only headers are read until one is asked for.

    Attributes:
        remedy: what to do if a file is damaged, for the message.

    """

    remedy = "fetch it again"
    config: Config | None = None
    megatron_config: Config | None = None
    files: Mapping[str, Path] = MappingProxyType({})

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.path = folder
        self._shards = shards
        self._entries = {n: e for shard in shards for n, e in shard.entries.items()}
        self._readers: dict[str, BlockReader] = {}
        self._opening = threading.Lock()

    def hints(self, codec: str) -> TensorSource | None:
        """Its own parts: the config says which codec they are of."""
        return self

    def describe(self) -> Mapping[str, Any]:
        """The files."""
        return {"shards": [shard.file for shard in self._shards]}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Stored tensors, parts of quantized ones included."""
        return {name: entry.spec for name, entry in self._entries.items()}

    def check(self) -> None:
        """Every shard is as long as its header promises."""
        problems = []
        for shard in self._shards:
            size = (self.path / shard.file).stat().st_size
            if size != shard.nbytes:
                what = "is cut short" if size < shard.nbytes else "has bytes its header omits"
                problems.append(
                    f"{shard.file}: {what} ({human(size)}, {size} bytes, where its header promises "
                    f"{shard.nbytes}); {self.remedy}"
                )
        if problems:
            raise PlanError(str(self.path), problems)

    def fingerprint(self) -> str:
        """From headers, sizes and times of change; reads no data."""
        digest = hashlib.sha256()
        for shard in self._shards:
            stat = os.stat(self.path / shard.file)
            digest.update(f"{shard.file}:{identity(stat)}:".encode())
            digest.update(shard.header)
        for name, path in self.files.items():
            digest.update(os.fsencode(name) + path.read_bytes())
        return digest.hexdigest()

    def read(self, name: str, rows: slice | None = None, scratch: Scratch | None = None) -> Tensor:
        """The tensor, or ``rows`` of its dim 0, in memory of ``scratch``."""
        entry = self._entries[name]
        shape, start, nbytes = entry.spec.shape, entry.start, entry.spec.nbytes
        if rows is not None:
            first, stop, _ = rows.indices(shape[0])
            row = nbytes // max(shape[0], 1)
            shape, start, nbytes = (
                (stop - first, *shape[1:]),
                start + first * row,
                (stop - first) * row,
            )
        scratch = scratch or Scratch()
        data = self._reader(entry.file).read(start, nbytes, scratch)
        if data.storage_offset() % itemsize(entry.spec.dtype):
            data = scratch.copy(data)
        return data.view(torch_dtype(entry.spec.dtype)).view(shape)

    def original(self, name: str, spec: TensorSpec, rows: slice) -> Tensor | None:
        """``rows`` of dim 0 of a part, if it is here."""
        return self.read(name, rows) if self.specs().get(name) == spec else None

    def _reader(self, file: str) -> BlockReader:
        with self._opening:
            if file not in self._readers:
                self._readers[file] = BlockReader(self.path / file)
            return self._readers[file]


class HuggingFaceSource(SafetensorsSource):
    """A Hugging Face checkpoint: safetensors files, their config and companions."""

    def __init__(self, folder: Path) -> None:
        path = folder / "config.json"
        require_inside(folder, (folder / name for name in (path.name, INDEX)))
        self.config = read_json(path) if path.exists() else None
        super().__init__(folder, read_shards(folder))
        require_inside(folder, self.files.values())
        require_small(self.files.values())

    @property
    def files(self) -> Mapping[str, Path]:  # type: ignore[override]
        """Config, tokenizer and chat template files by their names in the folder."""
        found = (p for pattern in COMPANIONS for p in self.path.glob(pattern) if p.is_file())
        return {p.relative_to(self.path).as_posix(): p for p in sorted(found)}

    def describe(self) -> Mapping[str, Any]:
        """Shards, the declared quantization, companions."""
        declared = (self.config or {}).get("quantization_config")
        method = declared.get("quant_method") if isinstance(declared, dict) else declared
        return {**super().describe(), "quantization": method, "companions": sorted(self.files)}
