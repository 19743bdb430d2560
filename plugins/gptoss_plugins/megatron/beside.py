"""What stands in an iteration's folder beside the weights, whatever their format."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

from gptoss_convert.blockio import write_file
from gptoss_convert.checksums import Span
from gptoss_convert.errors import CheckpointError
from gptoss_convert.filecopy import FileCopy
from gptoss_convert.plan import Group
from gptoss_plugins.huggingface.headers import read_header
from gptoss_plugins.huggingface.sink import open_shard, shard_header
from gptoss_plugins.huggingface.source import SafetensorsSource
from gptoss_plugins.megatron.folder import QUANTIZATION, companion_place

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.plan import ConversionPlan
    from gptoss_convert.spoiled import Residue
    from gptoss_convert.types import GroupWriter, TensorSpec

_AT, _ROWS = ":at", ":rows"  # what a residue is stored as, behind its part's name


class Beside:
    """Companions, attachments, and what is kept of the source's codec.

    Args:
        folder: of the iteration.
        plan: says what there is.

    Attributes:
        groups: those that are too large for ``finish``, by name.

    """

    def __init__(self, folder: Path, plan: ConversionPlan) -> None:
        self._folder, self._plan = folder, plan
        kept = [f"{QUANTIZATION}/{codec}.safetensors" for codec in plan.codecs if plan.kept]
        self.groups = {name: Group(name, plan.kept) for name in kept}
        self.groups |= {name: Group(name, ()) for name in plan.target.attachments}

    @property
    def nbytes(self) -> int:
        """Of all of it, to the byte."""
        written = [group for group in self.groups.values() if group.steps]
        copied = (*self._plan.files.values(), *self._plan.target.attachments.values())
        return sum(len(shard_header(group)) + group.nbytes for group in written) + sum(
            path.stat().st_size for path in copied
        )

    def open(self, group: Group) -> GroupWriter:
        """Start one of the groups; its folder is there."""
        path = self._folder / group.name
        if group.steps:
            return open_shard(path, group, shard_header(group))
        source = self._plan.target.attachments[group.name]
        return FileCopy(source, path, tensors=_spans_in(source))

    def keep(self, residues: Mapping[str, Residue]) -> None:
        """Write a residue beside the parts that are kept."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for name, residue in residues.items():
            tensors |= {name + _AT: residue.at, name + _ROWS: residue.rows}
        (codec,) = self._plan.codecs
        data = save(tensors, {"format": "pt"})
        write_file(self._folder / _residue_file(codec), data, _spans(data))

    def finish(self) -> None:
        """The small files."""
        for name, path in self._plan.files.items():
            write_file(self._folder / companion_place(name), path.read_bytes())


def _spans(data: bytes) -> list[Span]:
    """The tensors of a safetensors file of our own."""
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    places = {n: facts["data_offsets"] for n, facts in table.items() if n != "__metadata__"}
    return [Span(name, start + first, end - first) for name, (first, end) in places.items()]


def _spans_in(path: Path) -> list[Span]:
    """The tensors of an attachment; a damaged one is copied as it is, for an export does without."""
    with contextlib.suppress(CheckpointError):
        shard = read_header(path)
        if shard.nbytes == path.stat().st_size:
            return [Span(n, e.start, e.spec.nbytes) for n, e in shard.entries.items()]
    return []


class Kept(SafetensorsSource):
    """What an import kept of a quantized source; an export does without, if it must."""

    remedy = "name the checkpoint it came from with --scales-from, or remove it for new scales"

    @property
    def spoiled(self) -> frozenset[str]:
        """Parts that decode to NaN or infinity somewhere, by their stored names."""
        return frozenset(n.removesuffix(_AT) for n in self._entries if n.endswith(_AT))

    def original(self, name: str, spec: TensorSpec, rows: slice) -> Tensor | None:
        """``rows`` of dim 0 of a part, right in the rows (of its last dim) that were kept."""
        import torch

        if name + _AT not in self._entries:
            return None
        at, kept = self.read(name + _AT), self.read(name + _ROWS)
        each = spec.numel // spec.shape[0] // spec.shape[-1]
        first, last = torch.searchsorted(at, torch.tensor([rows.start * each, rows.stop * each]))
        part = kept.new_zeros((rows.stop - rows.start, *spec.shape[1:]))
        part.view(-1, spec.shape[-1])[at[first:last] - rows.start * each] = kept[first:last]
        return part


def kept(iteration: Path, codec: str) -> Kept | None:
    """The parts kept for a codec, if there are any.

    Raises:
        CheckpointError: the file is damaged.

    """
    files = [iteration / QUANTIZATION / f"{codec}.safetensors", iteration / _residue_file(codec)]
    there = [read_header(file, Kept.remedy) for file in files if file.is_file()]
    return Kept(files[0].parent, there) if files[0].is_file() else None


def _residue_file(codec: str) -> str:
    """Where a residue is; only there if there is any."""
    return f"{QUANTIZATION}/{codec}-nonfinite.safetensors"
