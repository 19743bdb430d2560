"""Copies out of transposed views hold what a plain copy would, for every shape, step and place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_convert import transpose
from gptoss_convert.transpose import compiled, words


def noise(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-(2**15), 2**15, (count,), generator=generator, dtype=torch.int16)


@pytest.fixture(autouse=True, params=["compiled", "words"])
def small(request, monkeypatch) -> str:
    """Take a fast path, and several tiles, strips and blocks, at sizes that are quick to test."""
    monkeypatch.setattr(transpose, "_LEAST", 1)
    monkeypatch.setattr(transpose, "_COMPILED", 0 if request.param == "compiled" else 1 << 60)
    for name, value in {"_COLUMNS": 8, "_WORDS": 2, "_STRIP": 3}.items():
        monkeypatch.setattr(words, name, value)
    return request.param


def check(source: torch.Tensor) -> None:
    target = torch.full(source.shape, 99, dtype=source.dtype)
    transpose.copy(target, source)
    assert target.tolist() == source.tolist()


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 40),
    step=st.integers(1, 3),
    columns=st.lists(st.tuples(st.integers(1, 13), st.integers(0, 60)), min_size=1, max_size=2),
    offset=st.integers(0, 9),
    spare=st.integers(0, 4),
)
def test_any_strides(rows: int, step: int, columns, offset: int, spare: int) -> None:
    shape = (rows, *(size for size, _ in columns))
    strides = (step, *(stride for _, stride in columns))
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    check(noise(offset + reach + 1 + spare).as_strided(shape, strides, offset))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8])
def test_dtypes_bit_for_bit(dtype: torch.dtype) -> None:
    source = noise(24 * 40).view(dtype).view(24, -1).T
    target = torch.zeros(source.shape, dtype=dtype)
    transpose.copy(target, source)
    made, wanted = (t.contiguous().view(torch.uint8).tolist() for t in (target, source))
    assert made == wanted


def test_leading_dims_and_what_the_experts_look_like() -> None:
    weights = noise(3 * 20 * 16)
    check(weights.view(3, 20, 8, 2).permute(0, 3, 2, 1))  # gate and up out of [E, in, out]
    check(weights.view(3, 2, 10, 16).permute(0, 3, 2, 1))  # and back into it
    check(weights.view(3, 20, 16).transpose(1, 2))


def test_a_target_with_gaps() -> None:
    source, room = noise(24 * 40).view(40, 24).T, torch.zeros(24, 50, dtype=torch.int16)
    transpose.copy(room[:, 5:45], source)
    assert room[:, 5:45].tolist() == source.tolist()
    assert not room[:, :5].any()
    assert not room[:, 45:].any()


@pytest.mark.parametrize("count", [3, 17, 40])
def test_fast_path_is_taken(small, monkeypatch, count: int) -> None:
    """Only the rows before the first word and after the last are copied plainly."""
    plain, fast = [], []
    original, columns = transpose._plain, compiled.copy_columns
    monkeypatch.setattr(transpose, "_plain", lambda t, s: (plain.append(len(s)), original(t, s)))
    monkeypatch.setattr(compiled, "copy_columns", lambda t, s: (fast.append(len(s)), columns(t, s)))
    check(noise(5 * 48).view(5, 48)[:, 3 : 3 + count].T)
    if small == "compiled":
        assert (sum(plain), sum(fast)) == (0, count)
    else:
        assert (sum(plain), sum(fast)) == ({3: 3, 17: 1 + 0, 40: 1 + 3}[count], 0)


@pytest.mark.parametrize("step", [1, 2])
def test_many_blocks_with_edges(step: int) -> None:
    rows, columns = 2 * 32 + 8 + 5, 2 * 576 + 8 + 3
    source = noise(columns * (rows * step + 7)).view(columns, -1)[:, 3 : 3 + rows * step : step].T
    check(source)
    check(source[:, :, None].expand(-1, -1, 2))
