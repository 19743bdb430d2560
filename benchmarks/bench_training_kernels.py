"""Kernels of training on a GPU, beside a copy of the bytes that they must move, and beside plain torch.

    python benchmarks/bench_training_kernels.py
    python benchmarks/bench_training_kernels.py --tokens 512 --vocabulary 25136

``ratio`` is bytes per second over those of a copy within the device, each tensor read once and written
once; ``torch`` is how many times longer torch's own operations take. Medians, the L2 flushed. The
kernels themselves are timed: what autograd and launching cost the CPU is hidden in a model, where it
runs ahead. A ratio below --min-ratio makes the exit code 1. The last line is JSON.

Values are the tests' business (tests/kernels); nothing is compared here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from mxfp4_yardsticks import CudaClock
from torch import Tensor

from gptoss_kernels import adamw, backends, cross_entropy
from gptoss_kernels.experts import Activation

GPU = torch.device("cuda")
HOW = Activation()
REPS = 40
STEP: dict[str, Any] = {
    "lr": 1e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "step": 3,
}


class Row(NamedTuple):
    """A kernel; ``moved`` are the bytes that it has to, ``torch`` does the same by torch."""

    name: str
    moved: int
    ours: Callable[[], object]
    torch: Callable[[], object]


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers on the GPU."""
    return torch.randn(shape, device=GPU, dtype=dtype)


def of_cross_entropy(args: argparse.Namespace) -> Iterator[Row]:
    """Of a chunk of logits, as the loss in ``gptoss_plugins.gpt_model`` takes them."""
    rows, width = args.tokens, args.vocabulary
    logits, weights = drawn(rows, width), torch.rand(rows, device=GPU) + 0.1
    labels = torch.randint(width, (rows,), device=GPU)
    lse = cross_entropy.logsumexp(logits)

    def by_torch() -> Tensor:
        gradient = logits.float().softmax(1)
        gradient[torch.arange(rows, device=GPU), labels] -= 1
        return (gradient * weights[:, None]).to(logits.dtype)

    yield Row(
        "cross_entropy.logsumexp",
        logits.nbytes,
        lambda: cross_entropy.logsumexp(logits),
        lambda: logits.float().logsumexp(1),
    )
    yield Row(
        "cross_entropy.gradient_",
        2 * logits.nbytes,
        lambda: cross_entropy.gradient_(logits, labels, lse, weights),
        by_torch,
    )


def of_experts(args: argparse.Namespace) -> Iterator[Row]:
    """Of one layer."""
    rows, width, experts = args.rows, args.width, args.experts
    kernels = backends.load("experts.grouped", GPU, "triton")
    chosen = torch.randint(experts, (rows,), device=GPU)
    counts = torch.bincount(chosen, minlength=experts)
    wide, narrow, late = drawn(rows, 2 * width), drawn(rows, width), drawn(rows, width)
    bias1, bias2 = drawn(experts, 2 * width), drawn(experts, width)
    shares = torch.rand(rows, device=GPU)

    def gated() -> Tensor:
        gate, up = (wide + bias1.repeat_interleave(counts, 0, output_size=rows)).chunk(2, 1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    def weighed() -> Tensor:
        biased = narrow + bias2.repeat_interleave(counts, 0, output_size=rows)
        return (biased * shares[:, None]).to(narrow.dtype)

    def back(made: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
        """Only the way back, of a graph that is kept."""
        for leaf in leaves:
            leaf.requires_grad_()
        result = made()
        return lambda: torch.autograd.grad(result, leaves, late, retain_graph=True)

    unit = narrow.nbytes
    yield Row("gated", 3 * unit, lambda: kernels.gated(wide, bias1, counts, HOW), gated)
    yield Row(
        "gated, back",
        5 * unit,
        lambda: kernels.gated_back(late, wide, bias1, counts, HOW),
        back(gated, wide, bias1),
    )
    yield Row("weighed", 2 * unit, lambda: kernels.weighed(narrow, bias2, counts, shares), weighed)
    yield Row(
        "weighed, back",
        3 * unit,
        lambda: kernels.weighed_back(late, narrow, bias2, counts, shares),
        back(weighed, narrow, bias2, shares),
    )


def of_adamw(args: argparse.Namespace) -> Iterator[Row]:
    """Beside torch's fused step on float32 weights, gradients and moments."""
    whole = torch.nn.Parameter(drawn(args.weights, dtype=torch.float32))
    whole.grad = drawn(args.weights, dtype=torch.float32)
    fused = torch.optim.AdamW([whole], fused=True)
    short, long = torch.bfloat16, torch.float32
    for name, param, moments in (
        ("adamw, bfloat16 moments", short, short),
        ("adamw, float32 moments", short, long),
        ("adamw, all float32", long, long),
    ):
        weight, remainder = drawn(args.weights, dtype=param), None
        if param == short:
            weight, remainder = adamw.split(drawn(args.weights, dtype=long))
        state = [torch.zeros(args.weights, dtype=moments, device=GPU) for _ in "12"]
        grad = drawn(args.weights, dtype=param)
        changed = [x for x in (weight, remainder, *state) if x is not None]
        moved = grad.nbytes + 2 * sum(x.nbytes for x in changed)
        yield Row(
            name,
            moved,
            partial(adamw.step_, weight, grad, state[0], state[1], remainder, **STEP),
            fused.step,
        )


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1334, help="rows of logits")
    parser.add_argument("--vocabulary", type=int, default=201_088)
    parser.add_argument("--rows", type=int, default=16_384, help="tokens times chosen experts")
    parser.add_argument("--width", type=int, default=2880)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--weights", type=int, default=32 * 2880 * 2880)
    parser.add_argument("--min-ratio", type=float, default=0.75)
    args = parser.parse_args()
    clock, found = CudaClock(), {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {clock.copy:.0f} GB/s")
    print(f"{'':26}{'ms':>9}{'GB/s':>8}{'ratio':>8}{'torch':>8}")
    for part in (of_cross_entropy, of_experts, of_adamw):
        for row in part(args):
            ours = clock.time(row.ours, row.moved, REPS)
            theirs = clock.time(row.torch, row.moved, REPS)
            found[row.name] = round(ours.ratio, 3)
            print(
                f"{row.name:26}{ours.ms:9.3f}{ours.gbps:8.0f}{ours.ratio:8.2f}"
                f"{theirs.ms / ours.ms:8.1f}",
                flush=True,
            )
        torch.cuda.empty_cache()
    print(json.dumps({"copy": clock.copy, **found}))
    return int(min(found.values()) < args.min_ratio)


if __name__ == "__main__":
    sys.exit(main())
