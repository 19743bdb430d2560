"""What training left beside the weights (optimizer, scheduler, random numbers), carried unchanged.

Its tensors have places of their own in a ``torch_dist`` checkpoint that no parallel layout changes,
so their items are copied byte for byte; nothing in them is understood, or needs to be. But a trainer
will unpickle them, so one that asks for what no checkpoint needs is not handed on.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from gptoss_convert.blockio import BlockReader
from gptoss_convert.checksums import Span
from gptoss_convert.filecopy import FileCopy
from gptoss_convert.untrusted import read_small
from gptoss_plugins.megatron import metadata
from gptoss_plugins.megatron.keys import is_weight
from gptoss_plugins.megatron.pickle_limits import LONGEST
from gptoss_plugins.megatron.torchzip import read_object

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gptoss_plugins.megatron.metadata import Stored


class CarriedState:
    """The training state in an iteration's folder.

    Args:
        folder: where it comes from.

    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        contents = metadata.load(folder)
        self._tensors = {k: t for k, t in contents.tensors.items() if not is_weight(k)}
        self._objects = {
            name: at
            for name, at in contents.objects.items()
            if not is_weight(name) and "._extra_state" not in name
        }
        self._stretches: dict[str, list[tuple[int, int]]] = {}
        for at in sorted(set(self._places()), key=lambda at: (at.file, at.offset)):
            self._stretches.setdefault(at.file, []).append((at.offset, at.length))
        self._names = {
            file: f"__state_{n}.distcp" for n, file in enumerate(sorted(self._stretches))
        }

    def _places(self) -> Iterable[Stored]:
        yield from (chunk.at for tensor in self._tensors.values() for chunk in tensor.chunks)
        yield from self._objects.values()

    @property
    def files(self) -> dict[str, Path]:
        """Name of each data file to write -> the file it is copied from."""
        return {name: self._folder / file for file, name in self._names.items()}

    @property
    def nbytes(self) -> int:
        """Of those files."""
        return sum(length for found in self._stretches.values() for _, length in found)

    def open(self, name: str, path: Path) -> FileCopy:
        """Start a data file."""
        source = self.files[name]
        reader = BlockReader(source)
        for offset, length in self._stretches[source.name]:
            read_object(reader, offset, length, f"{source} at byte {offset}")
        return FileCopy(source, path, self._stretches[source.name], self._spans(name))

    def _spans(self, name: str) -> list[Span]:
        """The items of a data file to write, framing and all, by what they are called first."""
        named: dict[Stored, str] = {}
        for key, tensor in self.contents.tensors.items():
            for chunk in tensor.chunks:
                named.setdefault(chunk.at, f"{key}{list(chunk.offsets)}")
        for key, at in self.contents.objects.items():
            named.setdefault(at, key)
        return [Span(what, at.offset, at.length) for at, what in named.items() if at.file == name]

    @cached_property
    def contents(self) -> metadata.Contents:
        """Tensors and objects at their new places."""
        moved: dict[Stored, Stored] = {}
        for file, stretches in self._stretches.items():
            position = 0
            for offset, length in stretches:
                at = metadata.Stored(file, offset, length)
                moved[at] = metadata.Stored(self._names[file], position, length)
                position += length
        tensors = {
            key: replace(tensor, chunks=tuple(replace(c, at=moved[c.at]) for c in tensor.chunks))
            for key, tensor in self._tensors.items()
        }
        return metadata.Contents(tensors, {n: moved[at] for n, at in self._objects.items()})

    def sidecar(self, name: str) -> bytes | None:
        """A small file that the trainer reads back, as it is; None if it wrote none."""
        path = self._folder / name
        if not path.is_file():
            return None
        if path.suffix == ".pt":
            read_object(BlockReader(path), 0, path.stat().st_size, str(path))
        return read_small(path, LONGEST)
