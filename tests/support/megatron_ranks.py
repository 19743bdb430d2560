"""What megatron-core puts on each rank, beside what our pieces put there.

A model is built for one rank of a layout, its parameters are filled with the pieces that our
resharders say the rank has, and megatron-core is asked for its ``sharded_state_dict``: the places
it names must be the places of our pieces, and what lies there must be what it finds in the whole
model's tensors. Groups must have been set up, really or for show (rank_models.py).

Where a name stands in a checkpoint is said here once more, without the package's own code.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from rank_models import MODELS, Sizes, pretend
from torch import Tensor

from gptoss_convert.layout import Layout, Parameter, Piece, Rank, split
from gptoss_convert.plan import parameters
from gptoss_convert.registry import default_registry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from megatron.core.models.gpt.gpt_model import GPTModel

    from gptoss_convert.stages import Chunk

REGISTRY = default_registry()
NORM = "linear_qkv.layer_norm_weight"  # in checkpoints; the local spec's module is input_layernorm
SECOND_NORM = "mlp.linear_fc1.layer_norm_weight"  # as the stock spec stores pre_mlp_layernorm
Box = tuple[str, tuple[int, ...], tuple[int, ...]]  # key, global offset, local shape


def layouts(ranks: int, chunks: int) -> list[Layout]:
    """Every layout that so many ranks can have, with up to so many chunks per stage."""
    sizes = range(1, ranks + 1)
    every = (
        Layout(tp, pp, vpp, ep, etp)
        for tp, pp, ep, etp in itertools.product(sizes, repeat=4)
        for vpp in range(1, (chunks if pp > 1 else 1) + 1)
    )
    return [layout for layout in every if layout.world <= ranks]


def sizes_for(layout: Layout) -> Sizes:
    """Of a small model that a layout divides; no two sizes of a tensor are alike."""
    return Sizes(
        layers=layout.pp * layout.vpp * (2 if layout.pp * layout.vpp < 4 else 1),
        groups=layout.tp,
        hidden=58,
        width=layout.etp * 5,
        experts=layout.ep * 2,
    )


@dataclass
class Whole:
    """A model's parameters in canonical form, all values different, cut for a layout."""

    sizes: Sizes
    layout: Layout
    tensors: dict[str, Tensor] = field(init=False)
    cut: dict[str, list[tuple[Piece, Tensor]]] = field(init=False)
    parameters: dict[str, Parameter] = field(init=False)

    def __post_init__(self) -> None:
        every = parameters(REGISTRY.models()["gpt-oss"], self.sizes.config(), "tiny")
        self.parameters = {k: v for k, v in every.items() if not k.endswith(SECOND_NORM)}
        self.tensors, start = {}, 1
        for name, parameter in self.parameters.items():
            count = torch.Size(parameter.shape).numel()
            self.tensors[name] = torch.arange(start, start + count).float().view(parameter.shape)
            start += count
        assert start < 1 << 24  # beyond it float32 has no room for all values
        self.cut = {
            name: split(self.tensors[name], parameter, self.layout, REGISTRY.resharders())
            for name, parameter in self.parameters.items()
        }

    @functools.cached_property
    def stacked(self) -> dict[str, Tensor]:
        """Checkpoint key -> the whole tensor, layers first, the vocabulary padded with zeros."""
        rows: dict[str, list[Tensor]] = {}
        for name, tensor in self.tensors.items():
            key, layer = place(name)
            assert layer is None or layer == len(rows.get(key, []))
            rows.setdefault(key, []).append(tensor)
        more = self.vocabulary - self.sizes.vocabulary
        return {
            key: torch.stack(found)
            if key.startswith("decoder.layers.")
            else F.pad(found[0], (0, 0, 0, more))
            if key in ("embedding.word_embeddings.weight", "output_layer.weight")
            else found[0]
            for key, found in rows.items()
        }

    @property
    def vocabulary(self) -> int:
        """Rows of a vocabulary that all tensor-parallel ranks can share, counted up one by one."""
        unit = self.layout.tp * self.layout.vocab_multiple
        return next(n for n in itertools.count(self.sizes.vocabulary) if n % unit == 0)

    def on(self, rank: Rank, chunk: Chunk) -> dict[str, tuple[Piece, Tensor]]:
        """Our pieces on a chunk of a rank, by name; one of each parameter that the chunk has."""
        found = {}
        for name, parameter in self.parameters.items():
            if chunk.has(parameter):
                (found[name],) = [cut for cut in self.cut[name] if cut[0].is_on(rank)]
        return found

    def rank(self, number: int, world: int) -> Rank:
        """Our coordinates of a rank; a world larger than needed repeats each stage's ranks."""
        stage, within = divmod(number, world // self.layout.pp)
        each = self.layout.ranks_per_stage
        return list(self.layout.coordinates())[stage * each + within % each]


def place(name: str) -> tuple[str, int | None]:
    """A parameter's key in a checkpoint, and its row of the key's layer axis."""
    key = name.removesuffix("{E}").replace(".mlp.experts.", ".mlp.experts.experts.")
    numbered = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key)
    return (f"decoder.layers.{numbered[2]}", int(numbered[1])) if numbered else (key, None)


def boxes(name: str, piece: Piece) -> Iterator[Box]:
    """A piece as megatron-core stores it: by layer, by expert, by run of rows."""
    key, layer = place(name)
    lead = () if layer is None else (layer,)
    ranges: list[list[tuple[int, int]]] = [list(dim) for dim in piece.box]
    if name.endswith("{E}"):
        ranges[0] = [(e, e + 1) for start, stop in ranges[0] for e in range(start, stop)]
        if "linear_fc1" in name and len(ranges[1]) == 1:  # uncut, and stored as two halves
            ((_, rows),) = ranges[1]
            ranges[1] = [(0, rows // 2), (rows // 2, rows)]
    for runs in itertools.product(*ranges):
        shape = tuple(stop - start for start, stop in runs)
        offset = (*lead, *(start for start, _ in runs))
        yield key, offset, shape[1:] if name.endswith("{E}") else shape


def fill(model: GPTModel, held: Mapping[str, tuple[Piece, Tensor]], first: int) -> None:
    """Our pieces into a model's parameters; names and shapes must all agree."""
    ours: dict[str, Tensor] = {}
    for name, (_, tensor) in held.items():
        local = name.replace(f"self_attention.{NORM}", "input_layernorm.weight").removesuffix("{E}")
        if numbered := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", local):
            local = f"decoder.layers.{int(numbered[1]) - first}.{numbered[2]}"
        ours[local] = tensor
    theirs = dict(model.named_parameters())
    for name in [name for name in theirs if ".local_experts." in name]:
        expert = re.search(r"local_experts\.(\d+)\.", name)
        assert expert
        stack = ours[name.replace(expert[0], "")]
        ours[name] = stack[int(expert[1])]
        assert len(stack) == len(model.decoder.layers[0].mlp.experts.local_experts)
    ours = {name: t for name, t in ours.items() if name in theirs or not _is_stack(name, theirs)}
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    with torch.no_grad():
        for name, parameter in theirs.items():
            assert parameter.shape == ours[name].shape, name
            parameter.copy_(ours[name])


def _is_stack(name: str, theirs: Mapping[str, Any]) -> bool:
    """Whether the model has these experts one by one."""
    return name.replace(".experts.", ".experts.local_experts.0.") in theirs


# --- the comparison ------------------------------------------------------------------------------


def claims(model: GPTModel) -> Iterator[tuple[Box, ShardedTensor]]:
    """Where megatron-core says that a model's tensors are in the whole."""
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    shards = model.sharded_state_dict(metadata={"dp_cp_group": replicas})
    apply_factories(shards)
    for found in shards.values():
        for shard in found if isinstance(found, list) else [found]:
            if isinstance(shard, ShardedTensor):
                key = shard.key.replace(SECOND_NORM, "pre_mlp_layernorm.weight")
                if key.endswith("layers.input_layernorm.weight"):
                    key = key.replace("input_layernorm.weight", f"self_attention.{NORM}")
                yield (key, tuple(shard.global_offset), tuple(shard.local_shape)), shard


def check_rank(whole: Whole, kind: str) -> dict[Box, bool]:
    """Build and compare this rank's chunks; returns what it holds, and whether as main replica."""
    rank, keys = whole.rank(dist.get_rank(), dist.get_world_size()), whole.stacked
    held: dict[Box, bool] = {}
    for chunk in whole.layout.chunks(whole.sizes.layers):
        if chunk.pp != rank.pp:
            continue
        model = MODELS[kind](
            whole.sizes,
            whole.layout,
            whole.vocabulary,
            chunk.number if whole.layout.vpp > 1 else None,
        )
        ours = whole.on(rank, chunk)
        fill(model, ours, chunk.first)
        theirs = dict(claims(model))
        wanted = {box for name, (piece, _) in ours.items() for box in boxes(name, piece)}
        assert theirs.keys() == wanted, sorted(theirs.keys() ^ wanted)[:5]
        for (key, _, _), shard in theirs.items():
            assert tuple(shard.global_shape) == keys[key].shape, key
            assert torch.equal(shard.data, keys[key][shard.global_slice()]), key
        held |= {box: shard.replica_id == (0, 0, 0) for box, shard in theirs.items()}
    return held


def check_replicas(whole: Whole, by_rank: Sequence[Mapping[Box, bool]]) -> None:
    """Every piece is on the ranks we say, one of them its main replica; together they are all."""
    coordinates = [whole.rank(number, len(by_rank)) for number in range(len(by_rank))]
    wanted: dict[Box, set[int]] = {}
    for name, cut in whole.cut.items():
        for piece, _ in cut:
            on = {number for number, rank in enumerate(coordinates) if piece.is_on(rank)}
            wanted |= dict.fromkeys(boxes(name, piece), on)
    found: dict[Box, set[int]] = {}
    for number, held in enumerate(by_rank):
        for box in held:
            found.setdefault(box, set()).add(number)
    assert found == wanted
    for box, ranks in found.items():
        assert sum(by_rank[number][box] for number in ranks) == 1, box


def kinds(layout: Layout) -> list[str]:
    """Modules that can have a layout: those that compute with experts' biases know no ETP."""
    return ["stock"] if layout.etp > 1 else ["ours", "stock"]


def compare(layout: Layout, sizes: Sizes, copies: int = 1) -> None:
    """All ranks of a pretended world, one after the other, with all modules that can have it."""
    whole, world, held = Whole(sizes, layout), layout.world * copies, []
    for rank in range(world):
        with pretend(rank, layout, world):
            held.append([check_rank(whole, kind) for kind in kinds(layout)])
    for by_rank in zip(*held, strict=True):
        check_replicas(whole, by_rank)
