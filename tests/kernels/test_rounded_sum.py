"""The sum in one pass against torch's own, step by step."""

import pytest
import torch

from gptoss_kernels.rounded_sum import Rounding, reference, rounded_sum

ROWS, COLUMNS = 37, 2051  # more than 18 blocks of 4096, and some that no block holds
KINDS = ["plain", "exact", "zeros", "tiny", "subnormal", "huge", "nonfinite", "ties"]


def values(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(5)
    weight = (torch.randn(ROWS, COLUMNS, generator=noise) * 0.02).bfloat16()
    change = torch.randn(ROWS, COLUMNS, generator=noise) * 0.003
    if kind == "exact":
        change = torch.zeros_like(change)
    elif kind == "zeros":
        weight, change = weight * 0, change * 0
    elif kind == "tiny":
        weight, change = (weight.float() * 1e-20).bfloat16(), change * 1e-20
    elif kind == "subnormal":
        weight, change = (weight.float() * 1e-37).bfloat16(), change * 1e-37
    elif kind == "huge":
        weight, change = (weight.float() * 1e38).bfloat16(), change * 1e38
    elif kind == "nonfinite":
        weight[3, 7], weight[36, 2050] = float("inf"), float("nan")
        change[20, 1] = -float("inf")
    elif kind == "ties":  # halfway between neighbours, above even and above odd ones
        weight = (1 + torch.arange(ROWS * COLUMNS) % 128 / 128).view(ROWS, COLUMNS).bfloat16()
        change = torch.full_like(change, 2.0**-8 / 0.75)
    return weight, change


def wanted(weight: torch.Tensor, change: torch.Tensor, scale: float, dtype: torch.dtype) -> tuple:
    exact = weight.float() + torch.tensor(scale) * change
    made = exact.to(dtype)
    finite = exact.isfinite()
    error = (made.double() - exact.double())[finite]
    rounding = Rounding(
        exact.numel(),
        int((error == 0).sum()),
        float(error.abs().max()),
        float(error.square().sum()),
        float(exact.double()[finite].square().sum()),
        int((~finite).sum()),
    )
    return made, rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["compiled", "reference"])
def test_as_torch_does_it_step_by_step(which: str, kind: str, dtype: torch.dtype) -> None:
    if which == "compiled":
        pytest.importorskip("numba")
    weight, change = values(kind)
    made, rounding = wanted(weight, change, 0.75, dtype)
    if kind == "plain" and dtype == torch.bfloat16:
        assert rounding.kept < rounding.elements // 10
    out = torch.empty(ROWS, COLUMNS, dtype=dtype)
    if which == "compiled":
        found = rounded_sum(weight, change.clone(), 0.75, out)
    else:
        found = Rounding(*reference.rounded_sum(weight, change.clone(), 0.75, out))
    assert torch.equal(out.nan_to_num(7), made.nan_to_num(7))
    assert torch.equal(out.signbit(), made.signbit())
    assert (found.elements, found.kept, found.nonfinite) == (
        rounding.elements,
        rounding.kept,
        rounding.nonfinite,
    )
    assert found.largest == rounding.largest
    assert found.squares == pytest.approx(rounding.squares, rel=1e-5)
    assert found.power == pytest.approx(rounding.power, rel=1e-5)


def test_other_types_go_by_the_reference() -> None:
    weight, change = values("plain")
    made, rounding = wanted(weight.half(), change, 3.0, torch.float16)
    out = torch.empty(ROWS, COLUMNS, dtype=torch.float16)
    found = rounded_sum(weight.half(), change.clone(), 3.0, out)
    assert torch.equal(out, made)
    assert found == rounding


def test_columns_go_by_the_reference() -> None:
    weight, change = values("plain")
    made, _ = wanted(weight.T, change.T.contiguous(), 3.0, torch.bfloat16)
    out = torch.empty(COLUMNS, ROWS, dtype=torch.bfloat16)
    rounded_sum(weight.T, change.T.contiguous(), 3.0, out)
    assert torch.equal(out, made)


@pytest.mark.parametrize("place", [(0, 0), (36, 2050)])
def test_no_number_becomes_infinite(place: tuple[int, int]) -> None:
    weight, change = values("plain")
    weight[place], change[place] = 3.3895e38, 1e36  # the largest bfloat16, and half a step more
    with pytest.raises(OverflowError, match="is too large for torch"):
        rounded_sum(weight, change, 1.0, torch.empty_like(weight))
