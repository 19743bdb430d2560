"""AdamW in place: each backend beside torch.optim, and float32 weights in two halves.

The Triton kernel runs in Triton's interpreter on a CPU; on a GPU also at real sizes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gptoss_kernels import adamw
from gptoss_kernels.adamw import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
LONG, SHORT = torch.float32, torch.bfloat16
HOW: dict[str, Any] = {
    "lr": 3e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
}
ULP = 2.0**-23
backends = pytest.mark.parametrize("backend", adamw.BACKENDS)


def noise(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def all_floats() -> Tensor:
    """Every upper half of a float32, with the lower halves at which rounding changes. ``[N]``"""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (upper | lower).flatten().view(torch.float32).to(DEVICE)


# --- halves --------------------------------------------------------------------------------------


def test_halves_of_all_floats() -> None:
    """They join to the same bits; the upper one is the nearest bfloat16, ties away from zero."""
    x = all_floats()
    param, remainder = adamw.split(x)
    assert (param.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    number = ~x.isnan()
    joined = adamw.join(param, remainder)
    assert torch.equal(joined.view(torch.int32)[number], x.view(torch.int32)[number])
    assert joined[~number].isnan().all()
    assert param[~number].isnan().all()
    tie = x.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(param[number & ~tie], x.bfloat16()[number & ~tie])
    ties = x[number & tie]
    up = (ties.view(torch.int32) + 0x8000).view(torch.float32)  # away from zero, for either sign
    assert torch.equal(param[number & tie].float(), up)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5, 7)])
def test_shapes_of_halves(shape: tuple[int, ...]) -> None:
    x = noise(1, shape)
    param, remainder = adamw.split(x)
    assert param.shape == remainder.shape == shape
    assert torch.equal(adamw.join(param, remainder), x)
    flipped = x.T if x.dim() == 2 else x
    assert torch.equal(adamw.join(*adamw.split(flipped)), flipped)


def test_halves_of_views() -> None:
    x = noise(2, (6, 10)).T[1::2]
    param, remainder = adamw.split(x)
    assert torch.equal(adamw.join(param, remainder), x)
    assert torch.equal(adamw.join(param.T[::2], remainder.T[::2]), x.T[::2])


def test_what_are_no_halves_is_refused() -> None:
    x = noise(3, (4,))
    with pytest.raises(ValueError, match="master weight is float32"):
        adamw.split(x.double())
    param, remainder = adamw.split(x)
    with pytest.raises(ValueError, match="halves are"):
        adamw.join(param, param)
    with pytest.raises(ValueError, match="differ in shape"):
        adamw.join(param, remainder[1:])


@backends
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy
def test_a_step_of_no_length_keeps_all_floats(backend: str) -> None:
    """The kernel takes halves apart, and puts them together, as ``split`` and ``join`` do."""
    x = all_floats()
    param, remainder = adamw.split(x)
    first, second, grad = torch.zeros_like(x), torch.ones_like(x), torch.ones_like(x)
    how = {**HOW, "lr": 0.0, "step": 1, "backend": backend}
    adamw.step_(param, grad, first, second, remainder, **how)
    want = adamw.split(x)
    number = ~x.isnan()
    # what is no normal number may be flushed, but here nothing is computed with it
    assert torch.equal(param.view(torch.int16)[number], want[0].view(torch.int16)[number])
    assert torch.equal(remainder[number], want[1][number])
    assert param[~number].isnan().all()


# --- steps ---------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("beta1", [0.9, 0.3, 0.0])
@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_torchs_steps(beta1: float, weight_decay: float, backend: str) -> None:
    """The reference makes the same bits as ``torch.optim.AdamW``, where that does not fuse."""
    shape = (13, 11, 17)
    theirs = torch.nn.Parameter(noise(4, shape))
    param, first, second = theirs.detach().clone(), torch.zeros(shape), torch.zeros(shape)
    first, second = first.to(DEVICE), second.to(DEVICE)
    how = {**HOW, "beta1": beta1, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW(
        [theirs], lr=how["lr"], betas=(beta1, 0.95), weight_decay=weight_decay, foreach=False
    )
    for step in range(1, 6):
        theirs.grad = noise(10 + step, shape, 0.1)
        optimizer.step()
        adamw.step_(param, theirs.grad, first, second, None, **how, step=step, backend=backend)
    state = optimizer.state[theirs]
    pairs = (param, theirs.detach()), (first, state["exp_avg"]), (second, state["exp_avg_sq"])
    if backend == "reference":
        assert all(torch.equal(mine, other) for mine, other in pairs)
    for (mine, other), size in zip(pairs, (1e-2, 1e-1, 1e-3), strict=True):
        torch.testing.assert_close(mine, other, rtol=2 * ULP, atol=2 * ULP * size)


@backends
@pytest.mark.parametrize("grads", [LONG, SHORT])
@pytest.mark.parametrize("moments", [(LONG, LONG), (SHORT, SHORT), (SHORT, LONG), (LONG, SHORT)])
def test_halves_are_stepped_as_float32_is(
    moments: tuple[torch.dtype, torch.dtype], grads: torch.dtype, backend: str
) -> None:
    """To the bit, though rounding is other in every step; and the moments are the same, too."""
    shape = (3, 1031)
    whole = noise(5, shape)
    param, remainder = adamw.split(whole)
    first, second = (torch.zeros(shape, dtype=dtype, device=DEVICE) for dtype in moments)
    first2, second2 = first.clone(), second.clone()
    for step in range(1, 5):
        grad = noise(20 + step, shape, 0.1).to(grads)
        how = {**HOW, "step": step, "backend": backend}
        adamw.step_(whole, grad, first, second, None, **how)
        adamw.step_(param, grad, first2, second2, remainder, **how)
        upper, lower = adamw.split(whole)
        assert torch.equal(param, upper)
        assert torch.equal(remainder, lower)
        assert torch.equal(first, first2)
        assert torch.equal(second, second2)
    assert remainder.unique().numel() > 1000


@backends
@pytest.mark.parametrize("param_dtype", [LONG, SHORT])
@pytest.mark.parametrize(
    "dtypes", [(SHORT, SHORT, LONG), (LONG, LONG, SHORT), (SHORT, SHORT, SHORT)]
)
def test_a_step_in_two_bytes(
    dtypes: tuple[torch.dtype, ...], param_dtype: torch.dtype, backend: str
) -> None:
    """What is stored is the float64 result, rounded; the interpreter cuts off what a GPU rounds."""
    shape = (2, 1501)
    param = noise(6, shape).to(param_dtype)
    grad, first = (noise(7 + i, shape, 0.1).to(dtype) for i, dtype in enumerate(dtypes[:2]))
    second = noise(9, shape, 0.1).square().to(dtypes[2])
    g, m, v = (x.double() for x in (grad, first, second))
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    update = (m / (1 - 0.9**7)) / ((v / (1 - 0.95**7)).sqrt() + 1e-8)
    w = param.double() * (1 - 3e-3 * 0.1) - 3e-3 * update
    adamw.step_(param, grad, first, second, None, **HOW, step=7, backend=backend)
    for got, want, size in ((param, w, 1.0), (first, m, 0.1), (second, v, 0.01)):
        error = 2**-7 if got.dtype == SHORT else 8 * ULP
        torch.testing.assert_close(got.double(), want, rtol=error, atol=8 * ULP * size)


@backends
def test_it_learns_what_two_bytes_alone_would_lose(backend: str) -> None:
    """Steps of a fortieth of bfloat16's last place add up in the remainder."""
    how = {**HOW, "lr": 1e-4, "weight_decay": 0.0, "backend": backend}
    param, remainder = adamw.split(torch.full((5,), 0.5, device=DEVICE))
    bare = param.clone()
    ones = torch.ones(5, device=DEVICE)
    moments = [torch.zeros(5, device=DEVICE) for _ in range(4)]
    for step in range(1, 31):
        adamw.step_(param, -ones, moments[0], moments[1], remainder, **how, step=step)
        adamw.step_(bare, -ones, moments[2], moments[3], None, **how, step=step)
    joined = adamw.join(param, remainder)
    torch.testing.assert_close(joined, torch.full_like(joined, 0.5 + 30e-4), rtol=0, atol=1e-6)
    assert torch.equal(bare, torch.full_like(bare, 0.5))


def test_reference_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_PIECE", 1000)
    test_halves_are_stepped_as_float32_is((SHORT, LONG), LONG, "reference")
    test_torchs_steps(0.9, 0.1, "reference")


@backends
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy
def test_nan_stays_nan(backend: str) -> None:
    """Of a gradient; as halves NaN could otherwise become zero."""
    param, remainder = adamw.split(noise(8, (4,)))
    grad = torch.tensor([1.0, float("nan"), 0.0, float("inf")], device=DEVICE)
    first, second = torch.zeros_like(grad), torch.zeros_like(grad)
    adamw.step_(param, grad, first, second, remainder, **HOW, step=1, backend=backend)
    assert param.isnan().tolist() == [False, True, False, True]


@backends
def test_tensors_of_other_shapes_and_none_at_all(backend: str) -> None:
    """The elements count, not the axes; a scalar and nothing are as good."""
    for shape, other in (((4, 6), (24,)), ((), (1,)), ((0, 3), (3, 0))):
        param, remainder = adamw.split(noise(30, shape))
        want = adamw.join(param, remainder)
        grad, first = noise(31, other), torch.zeros(other, device=DEVICE)
        second, how = torch.zeros(shape, device=DEVICE), {**HOW, "step": 1, "backend": backend}
        adamw.step_(want, grad.view(shape), first.clone(), second.clone(), None, **how)
        adamw.step_(param, grad, first, second, remainder, **how)
        assert torch.equal(adamw.join(param, remainder), want)


# name -> what is changed, as a function of the arguments, and a word of the message
WRONG: dict[str, Any] = {
    "float16": (lambda x: {"grad": x["grad"].half()}, "grad is torch.float16"),
    "whole moments": (lambda x: {"exp_avg": x["exp_avg"].int()}, "exp_avg is"),
    "a remainder of 32 bits": (lambda x: {"remainder": x["remainder"].int()}, "a remainder is"),
    "a remainder to float32": (lambda x: {"param": x["grad"]}, "a remainder is"),
    "an element too few": (lambda x: {"exp_avg_sq": x["exp_avg_sq"][1:]}, "exp_avg_sq has 3"),
    "strides": (lambda x: {"grad": x["grad"].repeat(2)[::2]}, "contiguous"),
    "another device": (lambda x: {"grad": x["grad"].to("meta")}, "on meta"),
    "step 0": (lambda x: {"step": 0}, "count from 1"),
    "beta 1": (lambda x: {"beta2": 1.0}, "betas"),
    "no such backend": (lambda x: {"backend": "fused"}, "choose triton, reference"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    param, remainder = adamw.split(noise(40, (4,)))
    x = {"grad": noise(41, (4,)), "exp_avg": noise(42, (4,)), "exp_avg_sq": noise(43, (4,))}
    given = {**HOW, "step": 1, "param": param, "remainder": remainder, **x}
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        adamw.step_(**{**given, **change(given)})
    assert torch.equal(adamw.join(param, remainder), noise(40, (4,)))


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n", [pytest.param(n, marks=GPU) for n in (4096 * 2880 + 3, 2**31 + 70_001)]
)
def test_real_sizes(n: int) -> None:
    """Beside the reference, at both ends: nothing between is larger or smaller."""
    ends = [slice(0, 100_000), slice(n - 100_000, n)]
    param = torch.zeros(n, dtype=SHORT, device=DEVICE)
    remainder = torch.zeros(n, dtype=torch.int16, device=DEVICE)
    grad, first, second = (torch.zeros(n, dtype=SHORT, device=DEVICE) for _ in range(3))
    small = []
    for seed, end in enumerate(ends):
        parts = adamw.split(noise(50 + seed, (100_000,)))
        param[end], remainder[end] = parts
        grad[end] = noise(60 + seed, (100_000,), 0.1)
        small.append(
            (*(x[end].clone() for x in (param, grad, first, second)), remainder[end].clone())
        )
    adamw.step_(param, grad, first, second, remainder, **HOW, step=1)
    for end, tensors in zip(ends, small, strict=True):
        adamw.step_(*tensors, **HOW, step=1, backend="reference")
        want = adamw.join(tensors[0], tensors[4])
        got = adamw.join(param[end], remainder[end])
        torch.testing.assert_close(got, want, rtol=2 * ULP, atol=2 * ULP * 1e-2)
        torch.testing.assert_close(first[end], tensors[2], rtol=2**-7, atol=0)
        torch.testing.assert_close(second[end], tensors[3], rtol=2**-7, atol=0)


@pytest.mark.parametrize("n", [pytest.param(5000, marks=GPU)])
def test_nothing_waits_for_the_gpu(n: int) -> None:
    tensors = [noise(70 + i, (n,)) for i in range(4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw.step_(*tensors, None, **HOW, step=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@backends
@pytest.mark.parametrize("dtype", [LONG, SHORT])
def test_a_scaled_gradient(backend: str, dtype: torch.dtype) -> None:
    """A step with a scale is that of the scaled float32 gradient, to the bit."""
    shape, scale = (37, 29), 0.3
    grad = noise(1, shape).to(dtype)
    found = []
    for given, factor in ((grad, scale), (grad.float() * scale, 1.0)):
        param, moments = noise(2, shape), [noise(3, shape), noise(4, shape).abs()]
        adamw.step_(param, given, *moments, **HOW, step=5, grad_scale=factor, backend=backend)
        found.append([param, *moments])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(found[0][0], noise(2, shape))
