"""What surrounds the grouped products of experts: each backend beside the formulas, in float64.

The Triton kernels run in Triton's interpreter on a CPU; on a GPU also at real sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gptoss_kernels import backends
from gptoss_kernels.experts import Activation, gated, weighed
from gptoss_kernels.experts.grouped import triton as kernels
from gptoss_kernels.experts.grouped.triton import Cut

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
# Triton's interpreter cuts bfloat16 and float16 off, where a GPU rounds to nearest.
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-3},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
}
NO_LIMIT = Activation(1.3, None, 0.25)
each_backend = pytest.mark.parametrize("backend", backends.BACKENDS)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of few columns, and fewer steps, each of which takes the interpreter long."""
    if DEVICE == "cpu":
        for name in ("_GATED", "_GATED_BACK", "_WEIGHED", "_WEIGHED_BACK"):
            monkeypatch.setattr(kernels, name, Cut(64, 16, 32, 4, 1))


# Rows of each expert: empty ones at the start, between and at the end; tiles of 64 rows, full or not.
COUNTS = {
    "few": (3, 0, 4),
    "tiles": (0, 64, 65, 0, 130, 1, 0),
    "one expert": (70,),
    "all in one": (0, 131, 0, 0),
    "no rows": (0, 0, 0),
}
CASES = [
    *((name, torch.float32) for name in COUNTS),
    *(("tiles", dtype) for dtype in (torch.float16, torch.bfloat16)),
]


class Case(NamedTuple):
    """Leaves on the device, and the gradient of the result."""

    rows: Tensor
    bias: Tensor | None
    counts: Tensor
    shares: Tensor
    late: Tensor


def made(
    counts: tuple[int, ...], columns: int, results: int, dtype: torch.dtype, bias: bool = True
) -> Case:
    noise = torch.Generator().manual_seed(sum(counts) + columns)

    def draw(scale: float, *shape: int) -> Tensor:
        return (scale * torch.randn(shape, generator=noise)).to(DEVICE, dtype)

    t, e = sum(counts), len(counts)
    return Case(
        draw(4.0, t, columns).requires_grad_(),
        draw(1.0, e, columns).requires_grad_() if bias else None,
        torch.tensor(counts, device=DEVICE),
        torch.rand(t, generator=noise).to(DEVICE).requires_grad_(),
        draw(1.0, t, results),
    )


def doubled(case: Case) -> Case:
    """The same values as float64 leaves."""
    rows, bias, shares = (
        None if x is None else x.detach().double().requires_grad_()
        for x in (case.rows, case.bias, case.shares)
    )
    assert rows is not None
    assert shares is not None
    return Case(rows, bias, case.counts, shares, case.late.double())


def biased(case: Case) -> Tensor:
    if case.bias is None:
        return case.rows
    parts = case.rows.split(case.counts.tolist())
    return torch.cat([part + b for part, b in zip(parts, case.bias, strict=True)])


def gated_by_words(case: Case, how: Activation) -> Tensor:
    gate, up = biased(case).chunk(2, 1)
    if how.limit is not None:
        gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit)
    return gate * torch.sigmoid(how.alpha * gate) * (up + how.offset)


def weighed_by_words(case: Case) -> Tensor:
    return biased(case) * case.shares[:, None]


def check(case: Case, function: Callable[[Case], Tensor], words: Callable[[Case], Tensor]) -> None:
    """Result and all gradients; those of sums are close beside the size of what is summed."""
    exact = doubled(case)
    want, got = words(exact), function(case)
    assert got.dtype == case.rows.dtype
    close: dict[str, Any] = CLOSE[got.dtype]
    torch.testing.assert_close(got.double(), want, **close)
    want.backward(exact.late)
    got.backward(case.late)
    for leaf, exact_leaf in zip(case[:2] + case[3:4], exact[:2] + exact[3:4], strict=True):
        if leaf is None or exact_leaf.grad is None:
            assert leaf is None or leaf.grad is None
            continue
        assert leaf.grad.dtype == leaf.dtype
        size = float(exact_leaf.grad.abs().max()) if leaf.numel() else 0.0
        atol = max(1.0, size) * close["atol"]
        torch.testing.assert_close(
            leaf.grad.double(), exact_leaf.grad, rtol=close["rtol"], atol=atol
        )


@each_backend
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_gated(name: str, bias: bool, dtype: torch.dtype, backend: str) -> None:
    """Of 37 columns, which no tile divides, and with a limit that about a third is beyond."""
    how = Activation(1.702, 3.5, 1.0)
    case = made(COUNTS[name], 74, 37, dtype, bias)
    check(
        case,
        lambda x: gated(x.rows, x.bias, x.counts, how, backend=backend),
        lambda x: gated_by_words(x, how),
    )


@each_backend
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_weighed(name: str, bias: bool, dtype: torch.dtype, backend: str) -> None:
    case = made(COUNTS[name], 41, 41, dtype, bias)
    check(
        case,
        lambda x: weighed(x.rows, x.bias, x.counts, x.shares, backend=backend),
        weighed_by_words,
    )


@each_backend
def test_cut_as_it_is(backend: str) -> None:
    """Several tiles and blocks of columns, of the sizes that are used."""
    case = made((2, 0, 35), 2110, 1055, torch.float32)
    check(
        case,
        lambda x: gated(x.rows, x.bias, x.counts, NO_LIMIT, backend=backend),
        lambda x: gated_by_words(x, NO_LIMIT),
    )
    check(
        made((1, 130), 1055, 1055, torch.float32),
        lambda x: weighed(x.rows, x.bias, x.counts, x.shares, backend=backend),
        weighed_by_words,
    )


@each_backend
def test_clamps_pass_gradients_at_their_bounds(backend: str) -> None:
    """7.0 and -7.0 exactly, and the float32 next to them, with a bias and without."""
    up = torch.tensor(7.0).nextafter(torch.tensor(8.0)).item()
    values = torch.tensor([7.0, -7.0, up, -up, 6.5, -6.5, 9.0, -9.0])
    pairs = torch.cartesian_prod(values, values)  # gate, up
    for bias in (None, torch.zeros(1, 2), torch.tensor([[0.5, -0.5]])):
        rows = pairs - (0 if bias is None else bias)
        case = Case(
            rows.to(DEVICE).requires_grad_(),
            None if bias is None else bias.to(DEVICE).requires_grad_(),
            torch.tensor([64], device=DEVICE),
            torch.ones(64, device=DEVICE),
            torch.linspace(1, 2, 64, device=DEVICE)[:, None],
        )
        gated(case.rows, case.bias, case.counts, Activation(), backend=backend).backward(case.late)
        exact = doubled(case)
        gated_by_words(exact, Activation()).backward(exact.late)
        assert case.rows.grad is not None
        torch.testing.assert_close(case.rows.grad.double(), exact.rows.grad, rtol=1e-5, atol=1e-6)
        assert torch.equal(case.rows.grad == 0, exact.rows.grad == 0)


@each_backend
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy
def test_nan_stays_nan(backend: str) -> None:
    """A clamp must not hide that training has diverged."""
    rows = torch.zeros(3, 8, device=DEVICE)
    rows[0, 1], rows[2, 6] = float("nan"), float("nan")
    counts = torch.tensor([1, 2], device=DEVICE)
    got = gated(rows, None, counts, Activation(), backend=backend)
    assert got.isnan().nonzero().tolist() == [[0, 1], [2, 2]]


@each_backend
def test_only_arguments_are_kept(backend: str) -> None:
    case, kept = made((5, 0, 9), 22, 11, torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated(case.rows, case.bias, case.counts, Activation(), backend=backend)
        weighed(case.rows, case.bias, case.counts, case.shares, backend=backend)
    mine = {x.data_ptr() for x in case if x is not None}
    assert len(kept) == 7
    assert {x.data_ptr() for x in kept} <= mine


@each_backend
def test_rows_and_gradients_of_any_strides(backend: str) -> None:
    case = made((5, 0, 9), 22, 11, torch.float32)
    rows = case.rows.detach().T.contiguous().T.requires_grad_()
    for result in (
        gated(rows, case.bias, case.counts, Activation(), backend=backend),
        weighed(rows, case.bias, case.counts, case.shares, backend=backend),
    ):
        result.sum().backward()  # a gradient whose strides are 0
    plain = case.rows
    gated(plain, case.bias, case.counts, Activation(), backend=backend).sum().backward()
    weighed(plain, case.bias, case.counts, case.shares, backend=backend).sum().backward()
    torch.testing.assert_close(rows.grad, plain.grad)


def test_wrong_counts_do_no_harm() -> None:
    """Values are not checked: of more rows than there are, none is written beyond the end."""
    memory = torch.full((7, 22), 3.0, device=DEVICE)
    rows, bias = memory[:5].requires_grad_(), torch.zeros(2, 22, device=DEVICE).requires_grad_()
    counts = torch.tensor([4, 200], device=DEVICE)
    made = gated(rows, bias, counts, Activation(), backend="triton")
    made.sum().backward()
    weighed(rows, bias, counts, torch.ones(5, device=DEVICE), backend="triton").sum().backward()
    assert torch.equal(memory, torch.full_like(memory, 3.0))
    assert made.unique().numel() == 1


# name -> what is changed, as a function of the case, and a word of the message
WRONG = {
    "rows of one axis": (lambda x: {"rows": x.rows[0]}, "is torch.float32"),
    "float64": (lambda x: {"rows": x.rows.double()}, "float64"),
    "bias of other columns": (lambda x: {"bias": x.bias[:, 1:]}, "the bias is"),
    "a bias too few": (lambda x: {"bias": x.bias[1:]}, "the bias is"),
    "counts of 32 bits": (lambda x: {"counts": x.counts.int()}, "counts are"),
    "no experts": (lambda x: {"counts": x.counts[:0]}, "counts are"),
    "counts elsewhere": (lambda x: {"counts": x.counts.to("meta")}, "on meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    case = made((2, 3), 6, 3, torch.float32)
    change, message = WRONG[name]
    rows, bias, counts, shares, _ = case._replace(**change(case))
    with pytest.raises(ValueError, match=message):
        gated(rows, bias, counts, Activation())
    with pytest.raises(ValueError, match=message):
        weighed(rows, bias, counts, shares)


def test_other_refusals() -> None:
    case = made((2, 3), 7, 3, torch.float32)
    with pytest.raises(ValueError, match="no two halves"):
        gated(case.rows, None, case.counts, Activation())
    with pytest.raises(ValueError, match="shares are"):
        weighed(case.rows, None, case.counts, case.shares[1:])
    with pytest.raises(ValueError, match="choose triton, reference"):
        weighed(case.rows, None, case.counts, case.shares, backend="numba")


# --- on a GPU ------------------------------------------------------------------------------------


def uneven(t: int, e: int) -> tuple[int, ...]:
    """Rows of each expert, some of whom have none."""
    shares = torch.rand(e, generator=torch.Generator().manual_seed(t)).sub_(0.1).clamp_(min=0)
    counts = (shares / shares.sum() * t).long()
    counts[e // 2] += t - counts.sum()
    return tuple(counts.tolist())


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=GPU) for d in CLOSE])
@pytest.mark.parametrize(("t", "e"), [(4096, 32), (3001, 128)])
def test_real_sizes(dtype: torch.dtype, t: int, e: int) -> None:
    counts = uneven(t, e)
    check(
        made(counts, 5760, 2880, dtype),
        lambda x: gated(x.rows, x.bias, x.counts, Activation()),
        lambda x: gated_by_words(x, Activation()),
    )
    check(
        made(counts, 2880, 2880, dtype),
        lambda x: weighed(x.rows, x.bias, x.counts, x.shares),
        weighed_by_words,
    )


@pytest.mark.parametrize("t", [pytest.param(4096, marks=GPU)])
def test_always_the_same_bits_without_waiting(t: int) -> None:
    found = []
    for _ in range(2):
        one, two = made(uneven(t, 32), 5760, 2880, torch.bfloat16), None
        two = made(uneven(t, 32), 2880, 2880, torch.bfloat16)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gated(one.rows, one.bias, one.counts, Activation()).backward(one.late)
            weighed(two.rows, two.bias, two.counts, two.shares).backward(two.late)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append([x.grad for x in (one.rows, one.bias, two.rows, two.bias, two.shares)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("t", [pytest.param(373_000, marks=GPU)])
def test_more_numbers_than_32_bits_count(t: int) -> None:
    """5760 * 373,000 > 2**31; every row but the last of each expert is alike."""
    counts = torch.tensor([t - 5, 5], device=DEVICE)
    last = made((1, 1), 5760, 2880, torch.bfloat16)
    rows = torch.zeros(t, 5760, dtype=torch.bfloat16, device=DEVICE)
    rows[t - 6], rows[t - 1] = last.rows.detach()
    rows.requires_grad_()
    got = gated(rows, last.bias, counts, Activation())
    late = torch.zeros_like(got)
    late[t - 6], late[t - 1] = last.late
    got.backward(late)
    exact = doubled(last)
    want = gated_by_words(exact, Activation())
    want.backward(exact.late)
    pick = [t - 6, t - 1]
    close: dict[str, Any] = CLOSE[torch.bfloat16]
    torch.testing.assert_close(got[pick].double(), want, **close)
    torch.testing.assert_close(rows.grad[pick].double(), exact.rows.grad, **close)
    torch.testing.assert_close(last.bias.grad.double(), exact.bias.grad, **close)
