"""The loss in one pass says what the loss in plain torch says, which has tests of its own."""

import pytest
import torch

pytest.importorskip("numba")
from gptoss_kernels import mxfp4
from gptoss_kernels.mxfp4 import loss as losses


def values(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(3, 34, 96, generator=generator) * 0.02).bfloat16()
    if kind == "kept":
        return mxfp4.decode(*mxfp4.encode(x), backend="reference")
    if kind == "some kept":
        x[1] = mxfp4.decode(*mxfp4.encode(x[1]), backend="reference")
    if kind == "tiny":
        return (x.float() * 1e-37).bfloat16()
    if kind == "huge":
        return (x.float() * 1e38).bfloat16()
    if kind == "zeros of both signs":
        return x * 0
    if kind == "nonfinite":
        x[0, 3, 5], x[2, 33, 95], x[2, 33, 94] = float("nan"), float("inf"), -float("inf")
    return x


@pytest.mark.parametrize(
    "kind", ["lossy", "kept", "some kept", "tiny", "huge", "zeros of both signs", "nonfinite"]
)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_as_in_plain_torch(monkeypatch, kind: str, interleaved: bool, wide: bool) -> None:
    x = values(kind)
    if wide:
        x = x.float() if "kept" in kind else x.float() * 1.0037  # not to be held by bfloat16
    if interleaved:
        x = x.unflatten(1, (2, -1)).transpose(1, 2)
    parts = mxfp4.encode(x, on_nonfinite="nan")
    assert losses._in_one_pass(x) is not None
    found = losses.loss(x, *parts)
    monkeypatch.setattr(losses, "_in_one_pass", lambda tensor: None)
    wanted = losses.loss(x, *parts)
    assert found._replace(squares=0, power=0) == wanted._replace(squares=0, power=0)
    assert found.squares == pytest.approx(wanted.squares, rel=1e-5)
    assert found.power == pytest.approx(wanted.power, rel=1e-5)


def test_it_sees_one_wrong_bit() -> None:
    x = values("kept")
    blocks, scales = mxfp4.encode(x)
    blocks[2, 7, 1, 3] ^= 1
    found = losses.loss(x, blocks, scales)
    assert found.kept == found.blocks - 1
    assert found.largest > 0
