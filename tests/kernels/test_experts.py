"""The mixture of experts for few tokens, by Triton, beside the formula written out in float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_kernels import experts
from gptoss_kernels.experts import Activation, Weights

triton_ = pytest.importorskip("triton")
on_gpu = torch.cuda.is_available()
device = "cuda" if on_gpu else "cpu"
pytestmark = pytest.mark.skipif(
    not on_gpu and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or the interpreter"
)


def make(tokens: int, top: int, count: int, hidden: int, width: int, dtype: torch.dtype) -> Any:
    noise = torch.Generator().manual_seed(tokens * 1000 + hidden)

    def draw(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, generator=noise)).to(dtype)

    weights = Weights(
        draw(count, 2 * width, hidden),
        draw(count, 2 * width),
        draw(count, hidden, width),
        draw(count, hidden),
    )
    chosen = torch.stack([torch.randperm(count, generator=noise)[:top] for _ in range(tokens)])
    return draw(tokens, hidden), chosen, torch.rand(tokens, top, generator=noise), weights


def expected(
    tokens: Tensor, chosen: Tensor, shares: Tensor, weights: Weights, how: Activation
) -> Tensor:
    fc1, bias1, fc2, bias2 = (None if w is None else w.double() for w in weights)
    rows = []
    for x, experts_, parts in zip(tokens.double(), chosen.tolist(), shares.double(), strict=True):
        total = torch.zeros_like(x)
        for e, share in zip(experts_, parts, strict=True):
            inner = fc1[e] @ x + (0 if bias1 is None else bias1[e])
            gate, up = inner.chunk(2)
            if how.limit is not None:
                gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit)
            inner = gate * torch.sigmoid(how.alpha * gate) * (up + how.offset)
            total += share * (fc2[e] @ inner + (0 if bias2 is None else bias2[e]))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    ("tokens", "top", "count", "hidden", "width"),
    [(1, 4, 7, 96, 72), (3, 2, 5, 520, 12), (2, 1, 3, 33, 20)],
)
@pytest.mark.parametrize("how", [Activation(), Activation(1.3, None, 0.25)])
def test_formula(
    dtype: torch.dtype,
    error: float,
    tokens: int,
    top: int,
    count: int,
    hidden: int,
    width: int,
    how: Activation,
) -> None:
    case = make(tokens, top, count, hidden, width, dtype)
    wanted = expected(*case, how)
    x, chosen, shares, weights = case
    moved = Weights(*(w.to(device) for w in weights))
    made = experts.mix(x.to(device), chosen.to(device), shares.to(device), moved, how)
    assert made.dtype == dtype
    assert ((made.cpu().double() - wanted).norm() / wanted.norm()).item() < error


def test_without_biases() -> None:
    x, chosen, shares, weights = make(2, 2, 4, 64, 48, torch.float32)
    bare = Weights(weights.fc1.to(device), None, weights.fc2.to(device), None)
    made = experts.mix(x.to(device), chosen.to(device), shares.to(device), bare, Activation())
    plain = Weights(weights.fc1, None, weights.fc2, None)
    torch.testing.assert_close(
        made.cpu().double(), expected(x, chosen, shares, plain, Activation()), rtol=1e-5, atol=1e-4
    )
