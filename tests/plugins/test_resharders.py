"""Our pieces against what megatron-core puts on each rank, for every layout of up to eight ranks.

tests/support/megatron_ranks.py builds and compares; here are the layouts. Where groups are only
pretended one process stands for each rank in turn, which is quick enough for random shapes; the
same layouts then run in real gloo worlds.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_convert.errors import UsageError
from gptoss_convert.layout import Layout, Share, pieces
from gptoss_convert.plan import parameters
from gptoss_convert.registry import default_registry
from gptoss_convert.types import Resharder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# megatron-core warns at import that Transformer Engine and Apex are missing.
pytestmark = pytest.mark.filterwarnings("ignore")

SUPPORT = Path(__file__).parents[1] / "support"
PUBLISHED = Path(__file__).parent / "published"
few = st.integers(1, 3)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    """The module tests/support/megatron_ranks.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(SUPPORT), *sys.path])
        yield importlib.import_module("megatron_ranks")


# --- every layout --------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", range(1, 9))
def test_every_rank_of_every_layout(ranks: Any, tp: int) -> None:
    found = [layout for layout in ranks.layouts(8, chunks=2) if layout.tp == tp]
    assert found
    for layout in found:
        ranks.compare(layout, ranks.sizes_for(layout))


@pytest.mark.slow
@pytest.mark.distributed
def test_every_layout_over_gloo() -> None:
    command = [sys.executable, str(SUPPORT / "live_ranks.py"), "--ranks=8"]
    quick = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=os.environ | quick, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sizes = range(1, 9)
    shapes = [
        (tp, pp, ep, etp)
        for tp in sizes
        for pp in sizes
        for ep in sizes
        for etp in sizes
        if pp * math.lcm(tp, ep * etp) <= 8
    ]
    interleaved = sum(pp > 1 and etp == 1 for _, pp, _, etp in shapes)
    assert len(set(found["layouts"])) == len(shapes) + interleaved


@st.composite
def pipelines(draw: st.DrawFn, stages: int) -> tuple[dict[str, Any], int]:
    """Fields of a layout that spread layers unevenly or evenly, and the number of layers."""
    pp = draw(st.integers(1, stages))
    vpp = draw(few) if pp > 1 else 1
    fields: dict[str, Any] = {"pp": pp, "vpp": vpp}
    if pp > 1 and draw(st.booleans()):
        count = pp * vpp
        given_ = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count).filter(any))
        return {**fields, "stages": tuple(given_)}, sum(given_)
    per_stage = [draw(few) * vpp] * pp
    if draw(st.booleans()):
        fields["first"] = per_stage[0] = draw(few) * vpp
    breaks = pp == 2 and vpp > 1 and "first" in fields  # megatron-core divides by no middle stages
    if pp > 1 and not breaks and draw(st.booleans()):
        fields["last"] = per_stage[-1] = draw(few) * vpp
    return fields, sum(per_stage)


@st.composite
def models(draw: st.DrawFn) -> tuple[Layout, dict[str, int]]:
    """A layout of up to eight ranks, and the sizes of a model that it divides."""
    inner = draw(
        st.tuples(*[st.integers(1, 8)] * 3).filter(lambda n: math.lcm(n[0], n[1] * n[2]) <= 8)
    )
    tp, ep, etp = inner
    fields, layers = draw(pipelines(8 // math.lcm(tp, ep * etp)))
    layout = Layout(tp=tp, ep=ep, etp=etp, vocab_multiple=draw(st.integers(1, 9)), **fields)
    sizes = {
        "layers": layers,
        "groups": tp * draw(few),
        "heads_per_group": draw(few),
        "head_dim": 2 * draw(few),
        "hidden": draw(st.integers(1, 20)),
        "width": etp * draw(few),
        "experts": ep * draw(few) + (ep == 1),
        "vocabulary": draw(st.integers(1, 60)),
    }
    return layout, sizes


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(1, 2))
def test_random_shapes_and_layouts(
    ranks: Any, model: tuple[Layout, dict[str, int]], copies: int
) -> None:
    layout, sizes = model
    ranks.compare(layout, ranks.Sizes(**sizes), copies)


def test_other_cuts_are_told_apart(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: experts dealt out in turn, and gate and up cut as one."""
    usual = ranks.REGISTRY.resharders()

    def dealt(parameter: Any, layout: Layout) -> list[Share]:
        if not parameter.has_experts:
            return [Share()]
        count = parameter.shape[0]
        return [Share(r, {0: tuple((e, e + 1) for e in range(r, count, 2))}) for r in range(2)]

    def plain(parameter: Any, layout: Layout) -> Any:
        shard = type(parameter.shard).COLUMN if "linear_fc1" in parameter.name else parameter.shard
        return usual["etp"].cut(replace(parameter, shard=shard), layout)

    for layout, wrong in (
        (Layout(ep=2), Resharder("ep", dealt)),
        (Layout(etp=2), Resharder("etp", plain)),
    ):
        ranks.compare(layout, ranks.sizes_for(layout))
        with monkeypatch.context() as patch:
            patch.setattr(ranks.REGISTRY, "resharders", lambda w=wrong: {**usual, w.name: w})
            with pytest.raises(AssertionError):
                ranks.compare(layout, ranks.sizes_for(layout))


# --- stages --------------------------------------------------------------------------------------


def stages_of_megatron(
    pp: int, vpp: int, layers: int, **fields: Any
) -> list[tuple[int, int, int, int]] | None:
    """(first layer, layers, stage, chunk) by megatron-core's own functions; None if it refuses."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    try:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_dtype=torch.float32,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            **fields,
        )
        places = [(chunk, stage) for chunk in range(vpp) for stage in range(pp)]
        first = [get_transformer_layer_offset(config, *place) for place in places]
        count = [get_num_layers_to_build(config, *place) for place in places]
    except (AssertionError, ValueError):
        return None
    if min(count) < 0:  # taken by the config, for nobody to build
        return None
    return [(f, n, stage, chunk) for f, n, (chunk, stage) in zip(first, count, places, strict=True)]


def stages_of_ours(layout: Layout, layers: int) -> list[tuple[int, int, int, int]] | None:
    try:
        return [(c.first, c.layers, c.pp, c.number) for c in layout.chunks(layers)]
    except UsageError:
        return None


@settings(max_examples=400, deadline=None)
@given(pipelines(7), st.sampled_from([0, 0, 0, 1, -1]))
def test_stages_are_megatrons(pipeline: tuple[dict[str, Any], int], more: int) -> None:
    fields, layers = pipeline
    layers += more
    layout = Layout(**{**fields, "stages": ()})
    theirs = stages_of_megatron(
        layout.pp,
        layout.vpp,
        max(layers, 1),
        num_layers_in_first_pipeline_stage=layout.first,
        num_layers_in_last_pipeline_stage=layout.last,
    )
    assert stages_of_ours(layout, max(layers, 1)) == theirs


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), *[st.none() | st.integers(0, 9)] * 2, few)
def test_ends_are_megatrons(
    pp: int, vpp: int, first: int | None, last: int | None, each: int
) -> None:
    layers = each * pp * vpp
    layout = Layout(pp=pp, vpp=vpp if pp > 1 else 1, first=first, last=last)
    if None not in (first, last) and (pp == 1 or (pp == 2 and layout.vpp > 1)):
        return  # megatron-core counts one stage twice, and divides by no middle stages
    theirs = stages_of_megatron(
        pp,
        layout.vpp,
        layers,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    assert stages_of_ours(layout, layers) == theirs


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 5), few)
def test_counted_stages_are_megatrons(data: st.DataObject, pp: int, vpp: int) -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    vpp = vpp if pp > 1 else 1
    counts = data.draw(st.lists(st.integers(0, 3), min_size=pp * vpp, max_size=pp * vpp))
    rows = [["decoder"] * count for count in counts]
    rows[0], rows[-1] = ["embedding", *rows[0]], [*rows[-1], "loss"]
    theirs = PipelineParallelLayerLayout(rows, pp)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp if vpp > 1 else None)
    try:
        wanted = [
            (
                theirs.get_layer_offset(vp_stage=chunk, pp_rank=stage),
                theirs.get_num_layers_to_build(vp_stage=chunk, pp_rank=stage),
                stage,
                chunk,
            )
            for chunk in range(vpp)
            for stage in range(pp)
        ]
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    layout = Layout(pp=pp, vpp=vpp, stages=tuple(counts))
    assert stages_of_ours(layout, sum(counts)) == wanted
    assert stages_of_ours(layout, sum(counts) + 1) is None


# --- the released models -------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_advice_works_for_the_whole_model(size: str) -> None:
    registry = default_registry()
    config = json.loads((PUBLISHED / f"config_{size}.json").read_text())
    every = parameters(registry.models()["gpt-oss"], config, size).values()

    def refusal(layout: Layout) -> str:
        try:
            for parameter in every:
                pieces(parameter, layout, registry.resharders())
        except UsageError as error:
            return str(error)
        return ""

    limits: dict[str, tuple[int, Callable[[int], Layout]]] = {
        "tp": (24, lambda n: Layout(tp=n)),
        "pp": (config["num_hidden_layers"] + 3, lambda n: Layout(pp=n)),
        "ep": (config["num_local_experts"] + 3, lambda n: Layout(ep=n)),
        "etp": (20, lambda n: Layout(etp=n)),
    }
    for axis, (limit, make) in limits.items():
        sentences = {n: refusal(make(n)) for n in range(1, limit)}
        works = [n for n, sentence in sentences.items() if not sentence]
        assert len(works) > 3
        for n, sentence in sentences.items():
            if sentence:
                assert sentence.startswith(f"--{axis} {n} does not divide the ")
                nearest = min(works, key=lambda w: (abs(w - n), w))
                assert sentence.endswith(f"; the nearest that works is {nearest}")
