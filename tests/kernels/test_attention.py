"""Attention of every backend against the definition: float64, one query at a time.

The Triton kernels run in Triton's interpreter on a CPU, with small tiles; on a GPU also as they
are used, at real sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():  # read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from gptoss_kernels import attention
from gptoss_kernels.attention import reference
from gptoss_kernels.attention import triton as kernels
from gptoss_kernels.attention.triton import Tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
NAN = float("nan")
# Results are averages of numbers around 1, so an error counts against 1 where they cancel out.
# bfloat16 keeps 8 bits: weights and the result are rounded once each, 2**-9 of their size.
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Work is so little here that threads, on a busy machine, mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Case:
    """Sizes, all different, and where sequences are in a cache of ``t`` keys.

    Without ``offset`` they end at the last key, a key before that, and so on.
    """

    s: int
    t: int
    b: int = 2
    g: int = 2
    r: int = 4
    d: int = 16
    window: int | None = None
    offset: tuple[int, ...] | None = None
    begin: tuple[int, ...] | None = None
    sinks: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def n(self) -> int:
        return self.g * self.r

    @property
    def scale(self) -> float:
        """So that a few keys stand out."""
        return 2.4 * self.d**-0.5


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    offset: Tensor
    begin: Tensor | None


def made(case: Case) -> Inputs:
    """Slices of larger tensors: a fused projection, and a cache with NaN wherever it is unused."""
    b, s, t, g, n, d = case.b, case.s, case.t, case.g, case.n, case.d
    fused = torch.randn(b, s, n + 2 * g, d, generator=noise(case.seed)).to(case.dtype)
    places = case.offset or tuple(t - s - j for j in range(b))
    offset = torch.tensor(places)
    begin = torch.tensor(case.begin) if case.begin else None
    memory = torch.full((2, b + 1, t + 3, g + 1, d), NAN, dtype=case.dtype)
    for j in range(b):
        first, end = (case.begin or (0,) * b)[j], places[j] + s
        rows = torch.randn(2, max(0, end - first), g, d, generator=noise(case.seed + 1 + j))
        memory[:, j + 1, 2 + first : 2 + end, :g] = rows.to(case.dtype)
    key, value = memory.to(DEVICE)[:, 1:, 2 : 2 + t, :g]
    # from far below the logits to far above
    sinks = torch.linspace(-3, 9, n)[torch.randperm(n, generator=noise(7))] if case.sinks else None
    return Inputs(
        fused.to(DEVICE)[:, :, g : g + n],
        key,
        value,
        None if sinks is None else sinks.to(case.dtype).to(DEVICE),
        offset.to(DEVICE),
        None if begin is None else begin.to(DEVICE),
    )


def naive(x: Inputs, scale: float, window: int | None) -> Tensor:
    """float64, by the words of the contract; on the CPU."""
    query, key, value = (part.cpu().double() for part in (x.query, x.key, x.value))
    b, s, n, _ = query.shape
    out = torch.zeros_like(query)
    for j in range(b):
        for i in range(s):
            at = int(x.offset[j]) + i
            first = 0 if x.begin is None else int(x.begin[j])
            if window is not None:
                first = max(first, at - window + 1)
            if first > at:
                continue
            r = n // key.shape[2]
            keys = key[j, first : at + 1].repeat_interleave(r, 1)
            values = value[j, first : at + 1].repeat_interleave(r, 1)
            logits = scale * (query[j, i] * keys).sum(-1)  # [keys, n]
            if x.sinks is not None:
                logits = torch.cat([logits, x.sinks.cpu().double()[None]])
            share = logits.softmax(0)[: len(keys)]
            out[j, i] = (share[..., None] * values).sum(0)
    return out


@cache
def wanted(case: Case) -> Tensor:
    return naive(made(case), case.scale, case.window)


def check(
    case: Case, backend: str = "triton", tiles: Tiles | None = None, splits: int | None = None
) -> None:
    x = made(case)
    how = {"scale": case.scale, "offset": x.offset, "begin": x.begin, "window": case.window}
    tensors = x.query, x.key, x.value, x.sinks
    if tiles is None:
        got = attention.attend(*tensors, **how, backend=backend)
    else:
        got = kernels.attend(*tensors, **how, tiles=tiles, splits=splits)
    assert got.shape == x.query.shape
    assert got.dtype == case.dtype
    assert got.is_contiguous()
    torch.testing.assert_close(got.cpu().double(), wanted(case), **CLOSE[case.dtype])


# Names say what is special.
PREFILL = {
    "full": Case(s=21, t=38),
    "r=1": Case(s=21, t=38, g=3, r=1),
    "r=8": Case(s=5, t=38, g=1, r=8),
    "r=3": Case(s=11, t=23, r=3),
    "no sinks": Case(s=21, t=38, sinks=False),
    "from the first key": Case(s=21, t=38, b=3, offset=(0, 0, 0)),
    "offsets": Case(s=21, t=70, b=3, offset=(3, 49, 17)),
    "begins": Case(s=21, t=70, b=3, offset=(3, 49, 17), begin=(1, 40, 17)),
    "begins after queries": Case(s=21, t=38, b=3, offset=(0, 3, 6), begin=(9, 0, 22)),
    "nothing to see": Case(s=21, t=38, b=3, offset=(0, 3, 6), begin=(9, 0, 37), sinks=False),
    "window": Case(s=37, t=70, window=11),
    "window of one": Case(s=21, t=38, window=1),
    "window no tile divides": Case(s=21, t=70, window=33),
    "window and begins": Case(s=21, t=70, b=3, window=19, offset=(3, 49, 17), begin=(1, 60, 14)),
    "window past the cache": Case(s=21, t=38, window=100),
    "window of the cache": Case(s=21, t=38, window=37),
    "channels no power of two": Case(s=9, t=23, d=24),
    "few channels": Case(s=9, t=23, d=5),
    "d=64": Case(s=9, t=38, b=2, d=64),
    "d=128": Case(s=9, t=38, b=1, g=1, r=8, d=128),
    "bfloat16": Case(s=21, t=38, window=19, dtype=torch.bfloat16),
    "float16": Case(s=21, t=38, dtype=torch.float16),
}
DECODE = {
    "full": Case(s=1, t=90),
    "r=1": Case(s=1, t=90, g=3, r=1),
    "r=8": Case(s=1, t=90, r=8),
    "r=17": Case(s=1, t=38, g=1, r=17),
    "no sinks": Case(s=1, t=90, sinks=False),
    "first key": Case(s=1, t=38, b=3, offset=(0, 0, 0)),
    "offsets": Case(s=1, t=90, b=3, offset=(3, 89, 31)),
    "begins": Case(s=1, t=90, b=3, offset=(3, 89, 31), begin=(1, 80, 31)),
    "nothing to see": Case(s=1, t=90, b=3, offset=(3, 80, 31), begin=(4, 0, 80)),
    "nothing, no sinks": Case(s=1, t=90, b=3, offset=(3, 80, 31), begin=(4, 0, 80), sinks=False),
    "window": Case(s=1, t=90, window=41),
    "window and begins": Case(s=1, t=90, b=3, window=41, offset=(3, 89, 60), begin=(1, 80, 14)),
    "window past the cache": Case(s=1, t=38, window=100),
    "channels no power of two": Case(s=1, t=38, d=24),
    "d=64": Case(s=1, t=90, d=64),
    "bfloat16": Case(s=1, t=90, window=41, dtype=torch.bfloat16),
    "float16": Case(s=1, t=90, dtype=torch.float16),
}


@pytest.mark.parametrize("name", PREFILL)
def test_prefill(name: str) -> None:
    check(PREFILL[name], tiles=Tiles(32, 16, 4, 2))


@pytest.mark.parametrize("rows", [16, 64])
def test_prefill_tiles_of_keys_larger_than_of_rows(rows: int) -> None:
    check(PREFILL["window and begins"], tiles=Tiles(rows, 32, 4, 2))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", DECODE)
def test_decode(name: str, splits: int) -> None:
    check(DECODE[name], tiles=Tiles(16, 16, 4, 2), splits=splits)


def test_decode_more_splits_than_keys() -> None:
    check(DECODE["offsets"], tiles=Tiles(16, 16, 4, 2), splits=9)


@pytest.mark.parametrize("case", [Case(s=21, t=133, window=70), Case(s=1, t=700)])
def test_triton_as_it_chooses_to_cut(case: Case) -> None:
    check(replace(case, b=1, dtype=torch.bfloat16))


@pytest.mark.parametrize("scores", [3000, 1 << 24])
@pytest.mark.parametrize("name", PREFILL)
def test_reference(name: str, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a few queries, and all together."""
    monkeypatch.setattr(reference, "_SCORES", scores)
    check(PREFILL[name], "reference")


@pytest.mark.parametrize("name", DECODE)
def test_reference_of_one_query(name: str) -> None:
    check(DECODE[name], "reference")


def test_reference_of_more_than_a_block() -> None:
    check(Case(s=1101, t=1203, b=1, g=1, r=2, d=8), "reference")
    check(Case(s=203, t=330, b=2, g=1, r=2, d=8, window=31), "reference")


@pytest.mark.parametrize("backend", attention.BACKENDS)
@pytest.mark.parametrize("case", [Case(s=9, t=23, window=7), Case(s=1, t=23)])
def test_a_sink_far_off(case: Case, backend: str) -> None:
    """Minus infinity is no sink; one far above everything leaves nothing."""
    x = made(case)
    how = {"scale": case.scale, "offset": x.offset, "window": case.window, "backend": backend}
    tensors = x.query, x.key, x.value
    off = torch.full((case.n,), float("-inf"), device=DEVICE)
    got = attention.attend(*tensors, off, **how)
    torch.testing.assert_close(got, attention.attend(*tensors, None, **how))
    assert not attention.attend(*tensors, torch.full_like(off, 1e4), **how).any()


@pytest.mark.parametrize("backend", attention.BACKENDS)
@pytest.mark.parametrize("case", [Case(s=9, t=40, window=7), Case(s=9, t=40), Case(s=1, t=40)])
def test_strides(case: Case, backend: str) -> None:
    """Heads before positions, one cache for all sequences, arguments that are views."""
    x = made(replace(case, b=3, offset=(5, 31, 11)))
    query = torch.randn(3, case.n, case.s, case.d, generator=noise(3)).to(DEVICE)
    rows = torch.randn(2, 1, case.g, case.t, case.d, generator=noise(4)).to(DEVICE)
    key, value = rows.expand(2, 3, -1, -1, -1).transpose(2, 3)
    sinks = torch.stack([x.sinks, x.sinks + NAN], 1)[:, 0]
    offset = torch.stack([x.offset, x.offset + 1000], 1)[:, 0]
    y = Inputs(query.transpose(1, 2), key, value, sinks, offset, offset[:1].expand(3) - 4)
    how = {"scale": case.scale, "offset": offset, "begin": y.begin, "window": case.window}
    got = attention.attend(y.query, key, value, sinks, **how, backend=backend)
    want = naive(y, case.scale, case.window)
    torch.testing.assert_close(got.cpu().double(), want, **CLOSE[torch.float32])


@pytest.mark.parametrize("backend", attention.BACKENDS)
@pytest.mark.parametrize("place", [-5, 20, 25, 1000])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("s", [1, 6])
def test_a_wrong_offset_does_no_harm(backend: str, place: int, window: int | None, s: int) -> None:
    """Values are not checked: queries see what there is of their keys, and nothing is read beyond."""
    case = Case(s=s, t=23, b=1, d=8)
    x = replace(made(case), offset=torch.tensor([place], device=DEVICE))
    how = {"scale": case.scale, "offset": x.offset, "window": window, "backend": backend}
    got = attention.attend(x.query, x.key, x.value, x.sinks, **how)
    want = naive(x, case.scale, window)
    torch.testing.assert_close(got.cpu().double(), want, **CLOSE[torch.float32])


def test_the_backend_is_chosen_by_the_device() -> None:
    assert attention.chosen(torch.device("cpu")) == "reference"
    assert attention.chosen(torch.device("cuda")) == "triton"
    assert attention.chosen(torch.device("cuda"), "reference") == "reference"


def test_triton_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        attention.chosen(torch.device("cpu"), "triton")


def test_no_queries() -> None:
    x = made(Case(s=4, t=9))
    for rows in (x.query[:, :0], x.query[:0]):
        b = len(rows)
        got = attention.attend(
            rows, x.key[:b], x.value[:b], x.sinks, scale=0.3, offset=x.offset[:b]
        )
        assert got.shape == rows.shape


def test_no_gradient_is_kept() -> None:
    x = made(Case(s=4, t=9))
    query = x.query.clone().requires_grad_()
    got = attention.attend(query, x.key, x.value, x.sinks, scale=0.3, offset=x.offset)
    assert not got.requires_grad


# name -> what is changed, as a function of the inputs, and a word of the message
WRONG = {
    "no head dim": (lambda x: {"query": x.query[..., 0]}, "are not"),
    "value differs": (lambda x: {"value": x.value[:, 1:]}, "are not"),
    "b differs": (lambda x: {"query": x.query[1:]}, "differ"),
    "d differs": (lambda x: {"query": x.query[..., 1:]}, "differ"),
    "g does not divide n": (lambda x: {"query": x.query[:, :, 1:]}, "divide"),
    "more queries than keys": (
        lambda x: {"key": x.key[:, :3], "value": x.value[:, :3]},
        "only 3",
    ),
    "dtypes differ": (lambda x: {"key": x.key.half()}, "share"),
    "float64": (
        lambda x: {name: getattr(x, name).double() for name in ("query", "key", "value")},
        "share",
    ),
    "channels apart": (lambda x: {"key": x.key.mT.contiguous().mT}, "next to each other"),
    "a sink too few": (lambda x: {"sinks": x.sinks[1:]}, "sinks"),
    "whole sinks": (lambda x: {"sinks": x.sinks.int()}, "sinks"),
    "offset of one": (lambda x: {"offset": x.offset[:1]}, "offset"),
    "offset of 32 bits": (lambda x: {"offset": x.offset.int()}, "offset"),
    "begin of one": (lambda x: {"begin": x.offset[:1]}, "begin"),
    "another device": (lambda x: {"begin": x.offset.to("meta")}, "something else on meta"),
    "no window": (lambda x: {"window": 0}, "window of 0"),
    "no scale": (lambda x: {"scale": 0.0}, "scale"),
    "no such backend": (lambda x: {"backend": "cuda"}, "choose triton, reference"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    x = made(Case(s=4, t=9))
    change, message = WRONG[name]
    given = {"query": x.query, "key": x.key, "value": x.value, "sinks": x.sinks}
    with pytest.raises(ValueError, match=message):
        attention.attend(**{**given, "scale": 1.0, "offset": x.offset, **change(x)})


def test_too_many_channels_for_triton() -> None:
    x = made(Case(s=4, t=9, d=130))
    with pytest.raises(ValueError, match="128 channels"):
        attention.attend(
            x.query, x.key, x.value, None, scale=1.0, offset=x.offset, backend="triton"
        )


# --- on a GPU ------------------------------------------------------------------------------------

REAL = {
    "prefill": Case(s=1000, t=1500, b=2, g=8, r=8, d=64),
    "prefill of a window": Case(s=1000, t=1500, b=2, g=8, r=8, d=64, window=128),
    "prefill behind padding": Case(
        s=777, t=900, b=3, g=8, r=8, d=64, offset=(0, 0, 0), begin=(0, 500, 131), window=128
    ),
    "prefill of few": Case(s=3, t=4000, b=5, g=8, r=8, d=64),
    "prefill, d=128": Case(s=500, t=700, b=1, g=4, r=5, d=128),
    "prefill, d=16": Case(s=500, t=700, b=1, g=4, r=5, d=16, window=300),
    "prefill, d=80": Case(s=500, t=700, b=1, g=4, r=5, d=80),
    "decode": Case(s=1, t=4096, b=3, g=8, r=8, d=64, offset=(200, 4000, 4095)),
    "decode of a window": Case(
        s=1, t=4096, b=3, g=8, r=8, d=64, offset=(100, 4000, 4095), window=128
    ),
    "decode behind padding": Case(
        s=1, t=4096, b=3, g=8, r=8, d=64, offset=(200, 4000, 4095), begin=(150, 0, 4095)
    ),
    "decode of many": Case(s=1, t=700, b=64, g=8, r=8, d=64),
    "decode, d=128": Case(s=1, t=4096, b=1, g=1, r=20, d=128),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=GPU) for name in REAL])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("sinks", [True, False])
def test_real_sizes(name: str, dtype: torch.dtype, sinks: bool) -> None:
    """The reference is the measure, on the same GPU, which the small sizes have tied to the
    definition; it takes float32 made from the same numbers."""
    case = replace(REAL[name], dtype=dtype, sinks=sinks)
    x = made(case)
    how = {"scale": case.scale, "offset": x.offset, "begin": x.begin, "window": case.window}
    got = attention.attend(x.query, x.key, x.value, x.sinks, **how, backend="triton")
    wide = (x.query.float(), x.key.float(), x.value.float(), x.sinks)
    want = attention.attend(*wide, **how, backend="reference")
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, **CLOSE[dtype])


@pytest.mark.parametrize("window", [pytest.param(w, marks=GPU) for w in (None, 128)])
def test_a_graph_holds_for_later_offsets(window: int | None) -> None:
    case = Case(s=1, t=4096, b=2, g=8, r=8, d=64, dtype=torch.bfloat16)
    x = made(replace(case, offset=(4095, 4095)))
    begin = torch.zeros_like(x.offset)
    how = {"scale": case.scale, "offset": x.offset, "begin": begin, "window": window}
    tensors = x.query, x.key, x.value, x.sinks
    attention.attend(*tensors, **how)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attention.attend(*tensors, **how)
    for places, begins in (((0, 7), (0, 3)), ((4095, 130), (0, 129)), ((999, 2500), (400, 0))):
        x.offset.copy_(torch.tensor(places))
        begin.copy_(torch.tensor(begins))
        graph.replay()
        want = attention.attend(*tensors, **how, backend="reference")
        torch.testing.assert_close(got, want, **CLOSE[torch.bfloat16])


@pytest.mark.parametrize("s", [pytest.param(s, marks=GPU) for s in (1, 130)])
def test_more_elements_than_31_bits_count(s: int) -> None:
    """Only the end of the cache is filled, the rest is NaN; key and value are one."""
    b, t, g, d, filled = 2, 2**22 + 5, 8, 64, 300
    cache = torch.full((b, t, g, d), NAN, dtype=torch.bfloat16, device=DEVICE)
    assert cache[0].numel() > 2**31
    rows = torch.randn(b, filled, g, d, generator=noise(1)).to(torch.bfloat16).to(DEVICE)
    cache[:, t - filled :] = rows
    query = torch.randn(b, s, 2 * g, d, generator=noise(2)).to(torch.bfloat16).to(DEVICE)
    place = torch.full((b,), t - s, device=DEVICE)
    how = {"scale": 0.3, "offset": place, "begin": torch.full_like(place, t - filled)}
    got = attention.attend(query, cache, cache, None, **how)
    place = torch.full((b,), filled - s, device=DEVICE)
    want = attention.attend(query, rows, rows, None, scale=0.3, offset=place)
    torch.testing.assert_close(got, want, **CLOSE[torch.bfloat16])
