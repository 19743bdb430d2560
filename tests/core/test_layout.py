"""Layouts: pieces against plain chunk and cat, and back bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_convert import QKV, PadVocab, Rule, Shard
from gptoss_convert.errors import PluginError
from gptoss_convert.layout import Layout, Parameter, Rank, Share, join, pieces, split
from gptoss_convert.ops import COPY
from gptoss_convert.registry import default_registry
from gptoss_convert.types import Resharder

if TYPE_CHECKING:
    from torch import Tensor

RESHARDERS = default_registry().resharders()
few = st.integers(1, 4)


# --- any parameter on any layout that fits it ----------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A layout, a parameter that it divides, and the stage the parameter is on."""

    layout: Layout
    parameter: Parameter
    stage: int

    @property
    def whole(self) -> Tensor:
        """All elements different, none zero."""
        return 1 + torch.arange(torch.Size(self.parameter.shape).numel()).view(self.parameter.shape)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[dict[str, Any], list[int]]:
    """The fields of a layout that spread layers, and the layers of each chunk in their order."""
    pp = draw(few)
    vpp = draw(st.integers(1, 3)) if pp > 1 else 1
    kinds = ["even", "stages", "first", "last", *(["both"] if pp > 1 else [])]
    kind = draw(st.sampled_from(kinds))
    fields = {"pp": pp, "vpp": vpp}
    if kind == "stages":
        sizes = draw(st.lists(st.integers(0, 4), min_size=pp * vpp, max_size=pp * vpp).filter(any))
        return {**fields, "stages": tuple(sizes)}, sizes
    per_chunk = [draw(few)] * pp
    if kind in ("first", "both"):
        per_chunk[0] = draw(few)
        fields["first"] = per_chunk[0] * vpp
    if kind in ("last", "both"):
        per_chunk[-1] = draw(few)
        fields["last"] = per_chunk[-1] * vpp
    return fields, per_chunk * vpp


@st.composite
def cases(draw: st.DrawFn) -> Case:
    fields, sizes = draw(pipelines())
    layout = Layout(
        tp=draw(few),
        ep=draw(few),
        etp=draw(st.integers(1, 3)),
        vocab_multiple=draw(st.sampled_from([1, 1, 2, 5])),
        **fields,
    )
    stage_of = [chunk % layout.pp for chunk, size in enumerate(sizes) for _ in range(size)]
    layer = draw(st.none() | st.integers(0, len(stage_of) - 1))
    before = draw(st.booleans())
    at = 0 if before else layout.pp - 1
    parameter = Parameter(
        **draw(tensors(layout)), layer=layer, layers=len(stage_of), is_before_layers=before
    )
    return Case(layout, parameter, at if layer is None else stage_of[layer])


@st.composite
def tensors(draw: st.DrawFn, layout: Layout) -> dict[str, Any]:
    """Name, shape and the like of a parameter that a layout divides."""
    kind = draw(st.sampled_from([*Shard, "vocabulary"]))
    if kind == "vocabulary":
        shape = (draw(st.integers(1, 30)), draw(few))
        return {"name": "embedding", "shape": shape, "shard": Shard.COLUMN, "padded": True}
    experts = draw(st.booleans())
    count = layout.etp if experts else layout.tp
    grain = 1 if experts else count * draw(few)
    others = tuple(draw(st.lists(few, max_size=2)))
    if kind is Shard.COLUMN:
        below = ((count if experts else grain) * draw(few), *others)
    elif kind is Shard.GATED:
        below = (2 * count * draw(few), *others)
    elif kind is Shard.ROW:
        below = (draw(few), count * draw(few), *others)
    else:
        below = others
    if not experts:
        return {"name": "dense", "shape": below, "shard": kind, "grain": grain}
    return {"name": "experts{E}", "shape": (layout.ep * draw(few), *below), "shard": kind}


def part(case: Case, rank: Rank) -> Tensor:
    """What a rank of the right stage has of a parameter, by chunks and nothing else."""
    whole, layout = case.whole, case.layout
    if case.parameter.padded:
        blank = torch.zeros_like(whole[:1])
        while len(whole) % (layout.tp * layout.vocab_multiple):
            whole = torch.cat([whole, blank])
        return whole.chunk(layout.tp)[rank.tp]
    dim, count, at = 0, layout.tp, rank.tp
    if case.parameter.name == "experts{E}":
        whole = whole.chunk(layout.ep)[rank.ep]
        dim, count, at = 1, layout.etp, rank.etp
    match case.parameter.shard:
        case Shard.COLUMN:
            return whole.chunk(count, dim)[at]
        case Shard.ROW:
            return whole.chunk(count, dim + 1)[at]
        case Shard.GATED:
            gate, up = whole.chunk(2, dim)
            return torch.cat([gate.chunk(count, dim)[at], up.chunk(count, dim)[at]], dim)
        case _:
            return whole


@settings(max_examples=300, deadline=None)
@given(cases())
def test_each_rank_has_its_part(case: Case) -> None:
    cut = split(case.whole, case.parameter, case.layout, RESHARDERS)
    for rank in case.layout.coordinates():
        mine = [tensor for piece, tensor in cut if piece.is_on(rank)]
        if rank.pp == case.stage:
            assert len(mine) == 1
            assert torch.equal(mine[0], part(case, rank))
        else:
            assert not mine


@settings(max_examples=200, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_join_undoes_split(case: Case, shuffler: Any) -> None:
    bits = case.whole.to(torch.int16) * 12345  # every pattern bfloat16 has, NaN among them
    whole = bits.view(torch.bfloat16)
    cut = split(whole, case.parameter, case.layout, RESHARDERS)
    shuffler.shuffle(cut)
    back = join(cut, case.parameter)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.int16), bits)
    copied = join([(piece, tensor.contiguous()) for piece, tensor in cut], case.parameter)
    assert torch.equal(copied.view(torch.int16), bits)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_pieces_are_disjoint_and_cover(case: Case) -> None:
    cut = split(case.whole, case.parameter, case.layout, RESHARDERS)
    assert all(tensor.shape == piece.shape for piece, tensor in cut)
    elements = torch.cat([tensor.reshape(-1) for _, tensor in cut])
    assert sorted(elements[elements != 0].tolist()) == case.whole.reshape(-1).tolist()
    if not case.parameter.padded:
        assert elements.all()


@settings(max_examples=200, deadline=None)
@given(cases())
def test_each_piece_has_equally_many_owners(case: Case) -> None:
    found = pieces(case.parameter, case.layout, RESHARDERS)
    ranks = list(case.layout.coordinates())
    owners = [[rank for rank in ranks if piece.is_on(rank)] for piece in found]
    assert {len(held) for held in owners} == {case.layout.ranks_per_stage // len(found)}
    assert len({rank for held in owners for rank in held}) == case.layout.ranks_per_stage


@settings(max_examples=100, deadline=None)
@given(pipelines())
def test_chunks_are_in_the_order_of_the_layers(pipeline: tuple[dict[str, Any], list[int]]) -> None:
    fields, sizes = pipeline
    layout, layers = Layout(**fields), sum(sizes)
    chunks = layout.chunks(layers)
    assert [chunk.layers for chunk in chunks] == sizes
    assert [(c.number, c.pp) for c in chunks] == [
        (number, pp) for number in range(layout.vpp) for pp in range(layout.pp)
    ]
    assert [n for c in chunks for n in range(c.first, c.first + c.layers)] == list(range(layers))
    assert [c.is_first for c in chunks] == [True, *[False] * (len(chunks) - 1)]
    assert [c.is_last for c in chunks] == [*[False] * (len(chunks) - 1), True]


def test_coordinates_by_hand() -> None:
    """World 12: tensor parallel fastest, experts across it, stages last."""
    layout = Layout(tp=2, pp=2, ep=3, etp=1)
    assert layout.world == 12
    assert list(layout.coordinates()) == [
        *(Rank(0, 0, 0, 0), Rank(1, 0, 1, 0), Rank(0, 0, 2, 0)),
        *(Rank(1, 0, 0, 0), Rank(0, 0, 1, 0), Rank(1, 0, 2, 0)),
        *(Rank(0, 1, 0, 0), Rank(1, 1, 1, 0), Rank(0, 1, 2, 0)),
        *(Rank(1, 1, 0, 0), Rank(0, 1, 1, 0), Rank(1, 1, 2, 0)),
    ]
    experts_cut_twice = Layout(tp=4, ep=2, etp=2)
    assert [(r.tp, r.ep, r.etp) for r in experts_cut_twice.coordinates()] == [
        *((0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1))
    ]


def test_what_a_line_of_the_table_makes() -> None:
    def of(rule: Rule, shape: tuple[int, ...], layer: int | None = None) -> Parameter:
        return Parameter.of(rule, rule.megatron, shape, layer, 6)

    qkv = of(Rule({}, "qkv", QKV(6, 3, 2), Shard.COLUMN), (24, 5), 4)
    assert (qkv.grain, qkv.layer, qkv.layers, qkv.has_experts, qkv.padded) == (
        3,
        4,
        6,
        False,
        False,
    )
    one = of(Rule({}, "qkv", QKV(6, 1, 2), Shard.COLUMN), (16, 5), 4)
    assert one.grain == 1  # and not one row by itself
    assert of(Rule({}, "rows", COPY, Shard.COLUMN), (7, 5)).grain == 7
    embedding = of(Rule({}, "embedding.weight", PadVocab(7), Shard.COLUMN), (7, 5))
    assert (embedding.padded, embedding.is_before_layers) == (True, True)
    assert of(Rule({}, "fc1{E}", COPY, Shard.GATED), (3, 8, 5)).has_experts


def test_a_piece_of_another_shape_is_no_piece() -> None:
    parameter = Parameter("rows", (4, 3), Shard.COLUMN, grain=4)
    (piece, tensor), other = split(torch.ones(4, 3), parameter, Layout(tp=2), RESHARDERS)
    with pytest.raises(ValueError, match=r"rows: a piece of \[1, 3\], not \(2, 3\)"):
        join([(piece, tensor[1:]), other], parameter)


def test_two_resharders_at_one_dim() -> None:
    both = {axis: Resharder(axis, lambda *_: [Share(0, {0: ((0, 2),)})]) for axis in ("tp", "ep")}
    with pytest.raises(PluginError, match="two resharders cut dim 0 of rows"):
        pieces(Parameter("rows", (4, 3), Shard.COLUMN), Layout(), both)


def test_without_resharders_there_is_one_piece() -> None:
    parameter = Parameter("norm", (3,), Shard.REPLICATED, 0, 2)
    ((piece, tensor),) = split(torch.arange(3), parameter, Layout(tp=2, pp=2), {})
    assert (piece.owner, piece.shape) == ({}, (3,))
    assert torch.equal(tensor, torch.arange(3))
