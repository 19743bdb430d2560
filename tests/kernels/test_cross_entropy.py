"""Cross-entropy over a vocabulary: each backend beside torch's, in float64.

The Triton kernels run in Triton's interpreter on a CPU; on a GPU also at real sizes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from gptoss_kernels import cross_entropy
from gptoss_kernels.cross_entropy import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
DTYPES = torch.float32, torch.bfloat16, torch.float16
# Of gradients; Triton's interpreter cuts bfloat16 and float16 off, where a GPU rounds to nearest.
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
INF, NAN = float("inf"), float("nan")
backends = pytest.mark.parametrize("backend", cross_entropy.BACKENDS)
# The interpreter is numpy, which warns of what a GPU is silent about.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def drawn(t: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a label in each row, and weights."""
    noise = torch.Generator().manual_seed(1000 * t + v)
    logits = (4 * torch.randn(t, v, generator=noise)).to(dtype)
    labels = torch.randint(v, (t,), generator=noise)
    weights = torch.rand(t, generator=noise) + 0.1
    return logits.to(DEVICE), labels.to(DEVICE), weights.to(DEVICE)


def wanted(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The gradient of torch's loss, float64."""
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none")
    (losses * weights.double()).sum().backward()
    assert exact.grad is not None
    return exact.grad


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "v"), [(5, 4103), (2, 8192), (3, 12301), (1, 7), (1, 1)])
def test_values(t: int, v: int, dtype: torch.dtype, backend: str) -> None:
    logits, labels, weights = drawn(t, v, dtype)
    want = wanted(logits, labels, weights)
    lse = cross_entropy.logsumexp(logits, backend=backend)
    assert lse.dtype == torch.float32
    exact = logits.double().logsumexp(1)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=2e-6)
    got = cross_entropy.gradient_(logits, labels, lse, weights, backend=backend)
    assert got is logits
    torch.testing.assert_close(got.double(), want, rtol=ERROR[dtype], atol=1e-6)


def test_reference_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_LOGITS", 30)
    test_values(7, 13, torch.bfloat16, "reference")
    test_values(3, 41, torch.float32, "reference")


@quiet
@backends
def test_infinite_logits(backend: str) -> None:
    """As torch has them; -inf is a masked entry, and takes no gradient."""
    logits, labels, weights = drawn(6, 4111)
    logits[0] = -INF
    logits[1, 17] = INF
    logits[2, 4100] = NAN
    logits[3] = torch.finfo(torch.float32).min
    logits[4, ::2] = -INF
    labels[4] = 5
    want = wanted(logits, labels, weights)[4:]
    lse = cross_entropy.logsumexp(logits, backend=backend)
    torch.testing.assert_close(lse, logits.logsumexp(1), equal_nan=True)
    got = cross_entropy.gradient_(logits, labels, lse, weights, backend=backend)
    torch.testing.assert_close(got[4:].double(), want, rtol=1e-5, atol=1e-7)
    assert not got[4, ::2].any()


@quiet
@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_weight_zero_become_zeros(dtype: torch.dtype, backend: str) -> None:
    logits, labels, weights = drawn(5, 2100, dtype)
    logits[0], logits[1], logits[2, 3] = NAN, INF, -INF
    lse = cross_entropy.logsumexp(logits, backend=backend)
    weights[:4] = 0
    got = cross_entropy.gradient_(logits, labels, lse, weights, backend=backend)
    assert torch.equal(got[:4], torch.zeros_like(got[:4]))
    assert got[4, labels[4]] < 0


@backends
def test_a_vocabulary_in_parts(backend: str) -> None:
    """As tensor-parallel ranks have it: labels of other parts are below 0 or beyond the end."""
    logits, labels, weights = drawn(6, 5000)
    labels[:3] = torch.tensor([0, 2303, 2304])
    want = wanted(logits, labels, weights)
    parts = logits[:, :2304].clone(), logits[:, 2304:].clone()
    lse = torch.stack([cross_entropy.logsumexp(p, backend=backend) for p in parts]).logsumexp(0)
    first = cross_entropy.gradient_(parts[0], labels, lse, weights, backend=backend)
    second = cross_entropy.gradient_(parts[1], labels - 2304, lse, weights, backend=backend)
    torch.testing.assert_close(torch.cat([first, second], 1).double(), want, rtol=1e-5, atol=1e-7)


@backends
def test_columns_of_wider_rows(backend: str) -> None:
    """What is beside them stays."""
    wide, labels, weights = drawn(4, 2113)
    before, labels = wide.clone(), labels % 2050
    logits = wide[:, 11:2061]
    want = wanted(logits, labels, weights)
    lse = cross_entropy.logsumexp(logits, backend=backend)
    cross_entropy.gradient_(logits, labels, lse, weights, backend=backend)
    torch.testing.assert_close(wide[:, 11:2061].double(), want, rtol=1e-5, atol=1e-7)
    assert torch.equal(wide[:, :11], before[:, :11])
    assert torch.equal(wide[:, 2061:], before[:, 2061:])


@backends
def test_no_rows(backend: str) -> None:
    logits, labels, weights = drawn(0, 9)
    lse = cross_entropy.logsumexp(logits, backend=backend)
    assert lse.shape == (0,)
    got = cross_entropy.gradient_(logits, labels, lse, weights, backend=backend)
    assert got.shape == (0, 9)


# name -> what is changed, as a function of the arguments, and a word of the message
WRONG = {
    "three axes": (lambda x: {"logits": x["logits"][None]}, "logits are"),
    "float64": (lambda x: {"logits": x["logits"].double()}, "logits are"),
    "columns apart": (lambda x: {"logits": x["logits"].T.contiguous().T}, "next to each other"),
    "a label too few": (lambda x: {"labels": x["labels"][1:]}, "labels are"),
    "labels of 32 bits": (lambda x: {"labels": x["labels"].int()}, "labels are"),
    "lse of 64 bits": (lambda x: {"lse": x["lse"].double()}, "lse are"),
    "weights of a column": (lambda x: {"weights": x["weights"][:, None]}, "weights are"),
    "another device": (lambda x: {"weights": x["weights"].to("meta")}, "on meta"),
    "no such backend": (lambda x: {"backend": "cuda"}, "choose triton, reference"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    logits, labels, weights = drawn(3, 5)
    given = {"logits": logits, "labels": labels, "lse": logits.logsumexp(1), "weights": weights}
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        cross_entropy.gradient_(**{**given, **change(given)})


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=GPU) for dtype in DTYPES[:2]])
@pytest.mark.parametrize(("t", "v"), [(512, 201088), (37, 25136), (3, 201087)])
def test_real_sizes(dtype: torch.dtype, t: int, v: int) -> None:
    logits, labels, weights = drawn(t, v, dtype)
    want, other = logits.double(), logits.clone()
    exact = want.logsumexp(1)
    lse = cross_entropy.logsumexp(logits)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=2e-6)
    want = want.sub_(exact[:, None]).exp_()
    want[torch.arange(t), labels] -= 1
    want *= weights[:, None]
    got = cross_entropy.gradient_(logits, labels, lse, weights)
    error = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=error, atol=1e-12)
    again = cross_entropy.gradient_(other, labels, cross_entropy.logsumexp(other), weights)
    assert torch.equal(again, got)


@pytest.mark.parametrize("t", [pytest.param(10_700, marks=GPU)])
def test_more_logits_than_32_bits_count(t: int) -> None:
    v = 201088
    logits = torch.zeros(t, v, dtype=torch.bfloat16, device=DEVICE)
    row, labels, weights = drawn(1, v, torch.bfloat16)
    logits[-1] = row[0]
    lse = cross_entropy.logsumexp(logits)
    torch.testing.assert_close(lse[-1:].double(), row.double().logsumexp(1), rtol=1e-6, atol=2e-6)
    want = wanted(row, labels, weights)[0]
    cross_entropy.gradient_(logits, labels.repeat(t), lse, weights.repeat(t))
    torch.testing.assert_close(logits[-1].double(), want, rtol=2**-8, atol=1e-12)


@pytest.mark.parametrize("t", [pytest.param(9, marks=GPU)])
def test_nothing_waits_for_the_gpu(t: int) -> None:
    logits, labels, weights = drawn(t, 5000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lse = cross_entropy.logsumexp(logits)
        cross_entropy.gradient_(logits, labels, lse, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
