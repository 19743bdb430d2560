"""Every rewrite: forwards as defined element by element, back bit for bit, and cut into units."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_convert import QKV, Concat, Copy, Experts, Transpose
from gptoss_convert.ops import forward_shape, split_row_major, units

sizes = st.integers(1, 5)


def numbered(*shape: int) -> torch.Tensor:
    """All elements different."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


def check(op, parts: list[torch.Tensor]) -> torch.Tensor:
    """Shape as promised, inverse exact, units independent; returns what forward made."""
    shape = forward_shape(op, [tuple(p.shape) for p in parts])
    made = op.forward(parts).reshape(shape)
    for part, back in zip(parts, op.inverse(made), strict=True):
        assert torch.equal(back.reshape(part.shape), part)
    count = units(op, shape)
    cuts = zip(*(p.chunk(count, 0) for p in parts), strict=True)
    assert torch.equal(torch.cat([op.forward(c).reshape(-1) for c in cuts]), made.reshape(-1))
    meta = op.forward([p.to("meta") for p in parts])
    assert meta.numel() == made.numel()
    return made


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, sizes)
def test_qkv_rows_go_by_group(groups: int, each: int, head_dim: int, hidden: int) -> None:
    heads = groups * each
    q = numbered(heads * head_dim, hidden)
    k = numbered(groups * head_dim, hidden) + 10_000
    v = numbered(groups * head_dim, hidden) + 20_000
    made = check(QKV(heads, groups, head_dim), [q, k, v])
    want = []
    for group in range(groups):
        for head in range(group * each, (group + 1) * each):
            want += [q[head * head_dim + d] for d in range(head_dim)]
        want += [k[group * head_dim + d] for d in range(head_dim)]
        want += [v[group * head_dim + d] for d in range(head_dim)]
    assert torch.equal(made, torch.stack(want))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes)
def test_experts_transpose_and_deinterleave(experts: int, half: int, hidden: int) -> None:
    weight = numbered(experts, hidden, 2 * half)  # Hugging Face: [E, in, out], gate at even columns
    made = check(Experts(transpose=True, interleaved=True), [weight])
    for e in range(experts):
        for i in range(half):
            assert torch.equal(made[e, i], weight[e, :, 2 * i])
            assert torch.equal(made[e, half + i], weight[e, :, 2 * i + 1])


def test_experts_square_is_still_transposed() -> None:
    weight = numbered(2, 4, 4)
    made = check(Experts(transpose=True), [weight])
    assert torch.equal(made, weight.mT)
    assert not torch.equal(made, weight)


def test_experts_bias() -> None:
    made = check(Experts(interleaved=True), [numbered(2, 6)])
    assert made.tolist() == [[0, 2, 4, 1, 3, 5], [6, 8, 10, 7, 9, 11]]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 3), sizes, sizes)
def test_concat(count: int, rows: int, columns: int) -> None:
    parts = [numbered(rows, columns) + 100 * i for i in range(count)]
    assert torch.equal(check(Concat(count), parts), torch.cat(parts))


def test_copy_and_transpose() -> None:
    check(Copy(), [numbered(3, 2)])
    assert torch.equal(check(Transpose(), [numbered(3, 2)]), numbered(3, 2).T)


def test_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match="q has 7 rows, not 8"):
        forward_shape(QKV(4, 2, 2), [(7, 3), (4, 3), (4, 3)])
    with pytest.raises(ValueError, match="equal shapes"):
        forward_shape(Concat(2), [(2, 3), (3, 3)])
    with pytest.raises(ValueError, match="odd number"):
        forward_shape(Experts(transpose=True, interleaved=True), [(2, 3, 5)])


def test_an_op_without_shapes_is_asked_on_meta_tensors() -> None:
    class Flip:
        def forward(self, parts):
            return parts[0].flip(0)[1:]

        def inverse(self, tensor):
            return (tensor,)

    assert forward_shape(Flip(), [(5, 2)]) == (4, 2)
    assert units(Flip(), (4, 2)) == 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_row_major_runs(a: int, b: int, c: int) -> None:
    tensor = numbered(a, b, c).transpose(1, 2)  # strided on purpose
    for count in (1, a, a * c):
        runs = split_row_major(tensor, count)
        assert torch.equal(torch.cat([r.reshape(-1) for r in runs]), tensor.reshape(-1))
        assert len(runs) == count
