"""How a model is spread over ranks: which part of which parameter is whose.

Everything here is arithmetic on shapes, read off one table (``Rule.shard``); the resharders that
plugins offer say how each kind of parallelism cuts. The same pieces make the files of a per-rank
checkpoint and the parameters of a live model, and put them together again.

Letters: P pipeline stages, V chunks per stage (a virtual pipeline), L layers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from gptoss_convert.errors import PluginError
from gptoss_convert.ops import PadVocab
from gptoss_convert.scratch import round_up
from gptoss_convert.stages import Chunk, chunk_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from gptoss_convert.ops import Op
    from gptoss_convert.types import Resharder, Rule, Shard

AXES = ("tp", "pp", "ep", "etp")
EXPERT_AXIS = "{E}"
Ranges = tuple[
    tuple[int, int], ...
]  # [start, stop) along a dim, in the order they are put together


@dataclass(frozen=True)
class Layout:
    """Sizes of a parallel layout, as megatron-core's ``parallel_state`` has them.

    Attributes:
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        vpp: model chunks per stage (``virtual_pipeline_model_parallel_size``); 1 for none.
        ep: expert-parallel ranks.
        etp: tensor-parallel ranks of the experts.
        first, last: layers of the first and the last stage, where they differ from the others'
            (``num_layers_in_first_pipeline_stage``).
        stages: layers of every chunk in the order of the layers, pp * vpp of them; () for what the
            other fields say.
        vocab_multiple: the vocabulary is padded to a multiple of this times tp
            (``make_vocab_size_divisible_by``).

    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    first: int | None = None
    last: int | None = None
    stages: tuple[int, ...] = ()
    vocab_multiple: int = 1

    def __str__(self) -> str:
        sizes = (f"{f.name} {getattr(self, f.name)}" for f in fields(self)[:5])
        return ", ".join(size for size in sizes if not size.endswith(" 1")) or "one rank"

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of the smallest world that has this layout, by pipeline stage."""
        return math.lcm(self.tp, self.ep * self.etp)

    @property
    def world(self) -> int:
        """Ranks of the smallest world that has this layout."""
        return self.pp * self.ranks_per_stage

    def coordinates(self) -> Iterator[Rank]:
        """Every rank's place, in megatron-core's order: tensor parallel first, pipeline last."""
        for pp, rank in itertools.product(range(self.pp), range(self.ranks_per_stage)):
            yield Rank(rank % self.tp, pp, rank // self.etp % self.ep, rank % self.etp)

    def chunks(self, layers: int) -> list[Chunk]:
        """The model's chunks in the order of their layers.

        Raises:
            UsageError: the layers do not spread over the stages.

        """
        sizes, count = chunk_sizes(self, layers), self.pp * self.vpp
        starts = itertools.accumulate(sizes, initial=0)
        return [
            Chunk(index % self.pp, index // self.pp, start, size, index == count - 1)
            for index, (start, size) in enumerate(zip(starts, sizes, strict=False))
        ]

    def padded(self, rows: int) -> int:
        """Rows of a vocabulary table that every tensor-parallel rank can have an equal part of."""
        return round_up(rows, self.tp * self.vocab_multiple)


@dataclass(frozen=True)
class Rank:
    """A rank's coordinates."""

    tp: int
    pp: int
    ep: int
    etp: int


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter in its canonical form: whole, all experts of a layer in one tensor.

    Attributes:
        name: Megatron's, ``{E}`` at its end if dim 0 is the expert axis.
        shape: of the whole.
        shard: how tensor parallelism cuts it, below the expert axis.
        layer: which layer it is of, or None.
        layers: how many the model has.
        grain: its rows (dim 0, or dim 1 of experts) come in so many equal blocks that must not be
            cut, such as the key-value groups of ``linear_qkv``.
        padded: whether it is a vocabulary table, whose rows may be padded.
        is_before_layers: for those of no layer, whether they come before all of them.

    """

    name: str
    shape: tuple[int, ...]
    shard: Shard
    layer: int | None = None
    layers: int = 0
    grain: int = 1
    padded: bool = False
    is_before_layers: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether dim 0 is the expert axis."""
        return self.name.endswith(EXPERT_AXIS)

    @classmethod
    def of(
        cls, rule: Rule, name: str, shape: tuple[int, ...], layer: int | None, layers: int
    ) -> Parameter:
        """What a line of the table makes, of a layer or of none."""
        experts = name.endswith(EXPERT_AXIS)
        return cls(
            name,
            shape,
            rule.shard,
            layer,
            layers,
            1 if experts or not shape else grain(rule.op, shape),
            isinstance(rule.op, PadVocab),
            name.startswith("embedding."),
        )


def grain(op: Op, shape: tuple[int, ...]) -> int:
    """Into how many blocks of rows a parameter may be cut; every row by itself unless the op says."""
    count = getattr(op, "units", None)
    return int(count(shape)) if count else shape[0]


@dataclass(frozen=True)
class Share:
    """What one rank along one axis of a layout has of a parameter.

    Attributes:
        rank: its number on that axis; None if all ranks have the same.
        ranges: dim -> the ranges it has; dims that are left out are whole.

    """

    rank: int | None = None
    ranges: Mapping[int, Ranges] = field(default_factory=dict)


EVERYWHERE = (Share(),)


@dataclass(frozen=True)
class Piece:
    """A part of a parameter, and which ranks have it.

    Attributes:
        owner: axis -> rank on it; an axis is left out if all its ranks have this piece.
        box: by dim the ranges that are put together; past the end of a padded vocabulary are zeros.

    """

    owner: Mapping[str, int]
    box: tuple[Ranges, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the piece."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.box)

    def is_on(self, rank: Rank) -> bool:
        """Whether a rank has it."""
        return all(getattr(rank, axis) == at for axis, at in self.owner.items())


def pieces(
    parameter: Parameter, layout: Layout, resharders: Mapping[str, Resharder]
) -> tuple[Piece, ...]:
    """All different pieces of a parameter, in the order of tp, pp, ep, etp.

    Raises:
        UsageError: the layout does not divide it; one sentence.

    """
    by_axis = {axis: resharders[axis].cut(parameter, layout) for axis in AXES if axis in resharders}
    found = []
    for shares in itertools.product(*by_axis.values()):
        box: list[Ranges] = [((0, size),) for size in parameter.shape]
        owner = {}
        for axis, share in zip(by_axis, shares, strict=True):
            if share.rank is not None:
                owner[axis] = share.rank
            for dim, ranges in share.ranges.items():
                if box[dim] != ((0, parameter.shape[dim]),):
                    raise PluginError(f"two resharders cut dim {dim} of {parameter.name}")
                box[dim] = ranges
        found.append(Piece(owner, tuple(box)))
    return tuple(found)


def split(
    tensor: Tensor, parameter: Parameter, layout: Layout, resharders: Mapping[str, Resharder]
) -> list[tuple[Piece, Tensor]]:
    """A whole parameter -> its pieces; views where they are in one run."""
    return [(piece, take(tensor, piece.box)) for piece in pieces(parameter, layout, resharders)]


def join(cut: Sequence[tuple[Piece, Tensor]], parameter: Parameter) -> Tensor:
    """The inverse of :func:`split`; pieces in any order, padding left out.

    Raises:
        ValueError: a piece has another shape than its box.

    """
    first = cut[0][1]
    whole = first.new_empty(parameter.shape)
    for piece, tensor in cut:
        if tuple(tensor.shape) != piece.shape:
            raise ValueError(
                f"{parameter.name}: a piece of {list(tensor.shape)}, not {piece.shape}"
            )
        put(whole, piece.box, tensor)
    return whole


def take(tensor: Tensor, box: Sequence[Ranges]) -> Tensor:
    """The part of a tensor in a box, zeros past the end of dim 0."""
    import torch

    for dim, ranges in enumerate(box):
        runs = [(start, min(stop, tensor.shape[dim])) for start, stop in ranges]
        parts = [tensor.narrow(dim, start, stop - start) for start, stop in runs if stop > start]
        missing = sum(b - a for a, b in ranges) - sum(p.shape[dim] for p in parts)
        if missing:
            shape = (*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :])
            parts.append(tensor.new_zeros(shape))
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return tensor


def put(whole: Tensor, box: Sequence[Ranges], part: Tensor) -> None:
    """Copy a piece to its place in the whole, run by run; what lies past an end is left out."""
    for runs in itertools.product(*(_placed(r, n) for r, n in zip(box, whole.shape, strict=True))):
        to, of = whole, part
        for dim, (start, size, at) in enumerate(runs):
            to, of = to.narrow(dim, start, size), of.narrow(dim, at, size)
        to.copy_(of)


def _placed(ranges: Ranges, size: int) -> Iterator[tuple[int, int, int]]:
    """(start in the whole, length, start in the piece) of what lies inside a dim."""
    at = 0
    for start, stop in ranges:
        if (length := min(stop, size) - start) > 0:
            yield start, length, at
        at += stop - start
