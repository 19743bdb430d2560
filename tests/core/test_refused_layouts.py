"""Layouts that do not fit: one sentence with the number, and the nearest that works."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_convert import Shard
from gptoss_convert.errors import UsageError
from gptoss_convert.layout import Layout, Parameter, pieces
from gptoss_convert.registry import default_registry

if TYPE_CHECKING:
    from collections.abc import Callable

RESHARDERS = default_registry().resharders()
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
few, whole = st.integers(1, 4), st.integers(1, 40)


def refusal(layout: Layout, parameter: Parameter) -> str:
    """The one sentence; empty if the layout divides the parameter."""
    try:
        pieces(parameter, layout, RESHARDERS)
    except UsageError as error:
        sentence = str(error)
        assert "\n" not in sentence
        return sentence
    return ""


def advised(sentence: str) -> int:
    """The number that a refusal ends with."""
    found = re.fullmatch(r".*; the nearest that works is (?:--\S+ )?(\d+)", sentence)
    assert found, sentence
    return int(found[1])


def check_advice(
    make: Callable[[int], Layout], value: int, parameter: Parameter, limit: int
) -> None:
    """The refusal names the value; what it advises works, and nothing nearer does."""
    if not (sentence := refusal(make(value), parameter)):
        return
    works = [n for n in range(1, limit + 1) if not refusal(make(n), parameter)]
    assert str(value) in re.findall(r"\d+", sentence)
    assert advised(sentence) == min(works, key=lambda n: (abs(n - value), n))


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 50), whole, few, few)
def test_refused_tensor_parallel(tp: int, grain: int, each: int, inputs: int) -> None:
    for parameter in (
        Parameter("linear_qkv.weight", (grain * each, inputs), Shard.COLUMN, grain=grain),
        Parameter("rows", (grain,), Shard.COLUMN, grain=grain),
        Parameter("inputs", (inputs, grain), Shard.ROW),
        Parameter("gated", (2 * grain, inputs), Shard.GATED),
    ):
        assert bool(refusal(Layout(tp=tp), parameter)) == (grain % tp != 0)
        check_advice(lambda n: Layout(tp=n), tp, parameter, 50)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 50), whole, few, few)
def test_refused_expert_parallel(ranks: int, size: int, other: int, inputs: int) -> None:
    by_ep = Parameter("router{E}", (size, other), Shard.REPLICATED)
    assert bool(refusal(Layout(ep=ranks), by_ep)) == (size % ranks != 0)
    check_advice(lambda n: Layout(ep=n), ranks, by_ep, 50)
    for parameter in (
        Parameter("fc1{E}", (other, 2 * size, inputs), Shard.GATED),
        Parameter("fc1{E}", (other, size, inputs), Shard.COLUMN),
        Parameter("fc2{E}", (other, inputs, size), Shard.ROW),
    ):
        assert bool(refusal(Layout(etp=ranks), parameter)) == (size % ranks != 0)
        check_advice(lambda n: Layout(etp=n), ranks, parameter, 50)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 50), st.integers(1, 4), st.integers(1, 48))
def test_refused_stages(pp: int, vpp: int, layers: int) -> None:
    parameter = Parameter("norm", (3,), Shard.REPLICATED, 0, layers)
    sentence = refusal(Layout(pp=pp, vpp=vpp), parameter)
    assert bool(sentence) == (layers % (pp * vpp) != 0)
    if not sentence:
        return
    if layers % vpp:  # no number of stages would help
        assert sentence.startswith(f"--vpp {vpp} does not divide the {layers} layers; ")
        nearest = advised(sentence)
        fits = [n for n in range(1, layers + 1) if layers % n == 0]
        assert nearest == min(fits, key=lambda n: (abs(n - vpp), n))
    else:
        fits = [n for n in range(2 if vpp > 1 else 1, layers + 1) if layers % (n * vpp) == 0]
        assert f"--pp {pp}" in sentence
        if fits:
            assert advised(sentence) == min(fits, key=lambda n: (abs(n - pp), n))
        else:
            assert sentence.endswith("; leave --vpp out")


@settings(max_examples=300, deadline=None)
@given(few, few, st.none() | st.integers(0, 14), st.none() | st.integers(0, 14), st.integers(1, 30))
def test_refused_ends(pp: int, vpp: int, first: int | None, last: int | None, layers: int) -> None:
    if (pp == 1 and vpp > 1) or first is last is None:
        return
    layout = Layout(pp=pp, vpp=vpp, first=first, last=last)
    parameter = Parameter("norm", (3,), Shard.REPLICATED, 0, layers)
    sentence = refusal(layout, parameter)
    assert bool(sentence) != spreads(layers, pp, vpp, first, last)
    if not sentence or sentence.startswith("--vpp"):
        return
    by_first = [n for n in range(1, 60) if spreads(layers, pp, vpp, n, last)]
    by_last = [n for n in range(1, 60) if spreads(layers, pp, vpp, first, n)]
    for value, fits, option in ((first, by_first, FIRST), (last, by_last, LAST)):
        if value is not None and fits:
            assert f"{option} {value}" in sentence
            best = min(fits, key=lambda n: (abs(n - value), n))
            assert sentence.endswith(f"the nearest that works is {option} {best}")
            return
    assert sentence.endswith("; leave them out")


def spreads(layers: int, pp: int, vpp: int, first: int | None, last: int | None) -> bool:
    """Whether some equal size of the other stages makes up the layers; by trying all."""
    for between in range(1, layers + 1):
        sizes = [between] * pp
        if first is not None:
            sizes[0] = first
        if last is not None:
            sizes[-1] = last
        contradicts = pp == 1 and None not in (first, last)
        if sum(sizes) == layers and 0 not in sizes and not contradicts:
            return all(size % vpp == 0 for size in sizes)
    return False


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (
            Layout(tp=3),
            "--tp 3 does not divide the 8 key-value groups; the nearest that works is 2",
        ),
        (
            Layout(tp=16),
            "--tp 16 does not divide the 8 key-value groups; the nearest that works is 8",
        ),
        (Layout(pp=5), "--pp 5 does not divide the 24 layers; the nearest that works is 4"),
        (
            Layout(pp=5, vpp=3),
            "--pp 5 with --vpp 3 does not divide the 24 layers; the nearest that works is --pp 4",
        ),
        (
            Layout(pp=2, vpp=5),
            "--vpp 5 does not divide the 24 layers; the nearest that works is 4",
        ),
        (Layout(vpp=2), "--vpp 2 needs several pipeline stages; leave it out"),
        (
            Layout(pp=4, first=5),
            (
                f"{FIRST} 5: 19 of 24 layers are left to 3 other stages, which does not divide; "
                f"the nearest that works is {FIRST} 6"
            ),
        ),
        (
            Layout(pp=2, first=9, last=9),
            (
                f"{FIRST} 9 and {LAST} 9: no stage of --pp 2 is left for the other 6 of 24 layers; the "
                f"nearest that works is {FIRST} 15"
            ),
        ),
        (
            Layout(pp=3, first=0),
            f"{FIRST} 0: this stage would be empty; the nearest that works is {FIRST} 2",
        ),
        (
            Layout(pp=3, stages=(6, 7, 12)),
            (
                "6+7+12 layers do not fill 3 pipeline stages with the model's 24; give 3 numbers with "
                "that sum"
            ),
        ),
        (
            Layout(stages=(20,)),
            (
                "20 layers do not fill 1 pipeline stages with the model's 24; give 1 numbers with that "
                "sum"
            ),
        ),
        (
            Layout(pp=2, vpp=2, stages=(12, 12)),
            (
                "12+12 layers do not fill 4 pipeline stages with the model's 24; give 4 numbers with "
                "that sum"
            ),
        ),
        (
            Layout(pp=2, stages=(12, 12), last=12),
            f"--pipeline-layers says it all; leave {FIRST} and {LAST} out",
        ),
    ],
    ids=str,
)
def test_sentences(layout: Layout, sentence: str) -> None:
    qkv = Parameter("linear_qkv.weight", (8 * 6, 7), Shard.COLUMN, 3, 24, grain=8)
    assert refusal(layout, qkv) == sentence


def test_experts_say_what_they_are() -> None:
    fc1 = Parameter("fc1.weight{E}", (32, 2 * 45, 7), Shard.GATED, 0, 24)
    assert refusal(Layout(ep=5), fc1) == (
        "--ep 5 does not divide the 32 experts; the nearest that works is 4"
    )
    assert refusal(Layout(etp=4), fc1) == (
        "--etp 4 does not divide the 45 rows of gate and of up in fc1.weight{E}; "
        "the nearest that works is 3"
    )
