"""MXFP4 kernels: exact or not, then how fast, beside a copy of the same bytes and other libraries.

    python benchmarks/bench_mxfp4.py --device cuda
    CUDA_VISIBLE_DEVICES= python benchmarks/bench_mxfp4.py --device cpu --threads 1,2
    python benchmarks/bench_mxfp4.py --check-only

Every result is compared bit for bit with the definition before it is timed; --check-only stops
there, after every scale byte with every largest code. A row of ours that is not exact, or whose
ratio is below --min-ratio, makes the exit code 1. The last line is JSON.

``ratio`` is the time of a copy over the time of the kernel:

* cuda: as bytes read and written per second, over those of a device-to-device copy of 2 GiB. By
  events, the L2 flushed, median; all twice, and ``spread`` is how far the two medians are apart.
* cpu: copy_ of the bfloat16 side, on the same threads, in turn with the kernel; least over least,
  ``med`` is median over median. GB/s count the bfloat16 side.

``peak MB`` is the extra memory at its highest, results not counted. ``pipeline`` goes from host to
GPU to host, its ratio is to the pinned link. ``hint-off`` is data with codes up to 5, so that the
rule never gives the source's scale; ``error`` is the policy that waits for the GPU's answer.

Peers that cannot be imported are skipped, with the reason. ``--peer-path`` is a folder to find them
in, for unpacked wheels, or the folder of Megatron-Bridge's one file:

    pip download --no-deps --only-binary=:all: --python-version 3.12 megatron-bridge==0.6.2
    unzip megatron_bridge-0.6.2-*.whl -d /tmp/bridge
    python benchmarks/bench_mxfp4.py --device cpu --peers hf,bridge --peer-path /tmp/bridge

A peer's ``exact`` is the share of the blocks that are as ours, where not all are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mxfp4_yardsticks import (
    PEERS,
    CpuClock,
    CudaClock,
    Packed,
    Peer,
    Timing,
    load_peer,
    peak_of,
    to_model,
    true_decode,
    true_encode,
)
from torch import Tensor

from gptoss_kernels import mxfp4

LAYOUTS = {
    "natural": {"transpose": False, "deinterleave": False},
    "deinterleave": {"transpose": False, "deinterleave": True},
    "transpose": {"transpose": True, "deinterleave": False},
    "both": {"transpose": True, "deinterleave": True},
}
POISON = 0x7FBB  # a NaN that no decoder makes


class Case(NamedTuple):
    """What is done; encoding to a layout is encoding from it."""

    op: str
    layout: str = "natural"
    kind: str = ""


def cases(arguments: argparse.Namespace) -> list[Case]:
    """What was asked for; pipelines apart."""
    every = [Case("dequant", layout) for layout in LAYOUTS]
    every += [Case("quant", "natural", rule) for rule in mxfp4.RULES]
    every += [Case("quant", layout, "even") for layout in list(LAYOUTS)[1:]]
    kinds = ("hint", "hint-off", "float32", "error")
    every += [Case("quant", "natural", kind) for kind in kinds]
    every.append(Case("roundtrip", "natural", "hint"))
    return [
        case
        for case in every
        if arguments.op in (case.op, "all")
        and case.layout in (arguments.layout or LAYOUTS)
        and (not arguments.rule or case.op == "dequant" or case.kind in arguments.rule)
        and (not arguments.hint or case.op == "dequant" or case.kind.startswith("hint"))
    ]


# --- data, and what to make of it -----------------------------------------------------------------


@dataclass
class Data:
    """Random experts, ``[E, R, K]`` in the order of the blocks; what is not used is not made."""

    shape: tuple[int, int, int]
    device: torch.device
    seed: int = 0
    expected: dict[tuple[str, torch.dtype], Packed] = field(default_factory=dict)

    def _codes(self, most: int) -> Packed:
        experts, rows, width = self.shape
        noise = torch.Generator(self.device).manual_seed(self.seed)
        like = {"generator": noise, "device": self.device}
        scales = torch.empty(experts, rows, width // 32, device=self.device)
        scales = scales.normal_(119, 1.2, generator=noise).round_().to(torch.uint8)
        places = (*scales.shape, 16)
        blocks = torch.randint(256, places, dtype=torch.uint8, **like)
        if most < 7:
            low, high = (torch.randint(most + 1, places, dtype=torch.uint8, **like) for _ in "lh")
            blocks = (blocks & 0x88) | low | (high << 4)
        return blocks, scales

    @cached_property
    def packed(self) -> Packed:
        """Any codes."""
        return self._codes(7)

    @cached_property
    def packed_below_six(self) -> Packed:
        """Codes up to 5: every rule gives these blocks a smaller scale than they have."""
        return self._codes(5)

    @cached_property
    def weights(self) -> Tensor:
        """float32, gaussian."""
        noise = torch.Generator(self.device).manual_seed(self.seed + 1)
        return torch.empty(self.shape, device=self.device).normal_(0, 0.02, generator=noise)

    @cached_property
    def weights_bf16(self) -> Tensor:
        """bfloat16, the same."""
        return self.weights.bfloat16()

    def encoded(self, rule: str, dtype: torch.dtype) -> Packed:
        """What the weights are by the definition."""
        if (rule, dtype) not in self.expected:
            rows = self.weights if dtype == torch.float32 else self.weights_bf16
            self.expected[rule, dtype] = truth(rows, rule)
        return self.expected[rule, dtype]


def truth(rows: Tensor, rule: str, hint: Tensor | None = None) -> Packed:
    """An expert at a time, as float64 is large."""
    hints = [None] * len(rows) if hint is None else list(hint)
    made = [true_encode(x, rule, h) for x, h in zip(rows, hints, strict=True)]
    return torch.stack([m[0] for m in made]), torch.stack([m[1] for m in made])


def decoded(packed: Packed) -> Tensor:
    """bfloat16 ``[E, R, K]``, by the definition."""
    made = [true_decode(*expert) for expert in zip(*packed, strict=True)]
    return torch.stack(made).view(torch.bfloat16)


@dataclass
class Job:
    """One thing to do, in memory of its own; ``run`` takes a backend's name."""

    run: Callable[[str], object]
    poison: Callable[[], object]  # so that what is not written is seen
    exact: Callable[[], bool]
    moved: int  # bytes read and written
    made: tuple[Tensor, ...]

    def verify(self, backend: str) -> bool:
        """Do it once, and compare all of it."""
        self.poison()
        self.run(backend)
        return self.exact()


def decode_job(packed: Packed, layout: str) -> Job:
    """Decode into a layout."""
    blocks, scales = packed
    to = LAYOUTS[layout]
    experts, rows, width = (*scales.shape[:2], scales.shape[2] * 32)
    shape = (experts, width, rows) if to["transpose"] else (experts, rows, width)
    out = torch.empty(shape, dtype=torch.bfloat16, device=blocks.device)
    return Job(
        lambda backend: mxfp4.decode(blocks, scales, out=out, backend=backend, **to),
        lambda: out.view(torch.int16).fill_(POISON),
        lambda: all(
            torch.equal(got, to_model(true_decode(b, s), **to))
            for got, b, s in zip(out.view(torch.int16), blocks, scales, strict=True)
        ),
        blocks.numel() + scales.numel() + 2 * out.numel(),
        (out,),
    )


def encode_job(
    rows: Tensor,
    layout: str,
    expected: Packed,
    *,
    rule: str = "even",
    hint: Tensor | None = None,
    policy: str = "nan",
) -> Job:
    """Encode rows, brought to a layout first."""
    to = LAYOUTS[layout]
    x = to_model(rows, **to)
    out = mxfp4.Encoded(*map(torch.empty_like, expected))
    options = {"transpose": to["transpose"], "interleave": to["deinterleave"], "rule": rule}
    options |= {"hint": hint, "on_nonfinite": policy, "out": out}
    return Job(
        lambda backend: mxfp4.encode(x, backend=backend, **options),
        lambda: [o.copy_(e).bitwise_not_() for o, e in zip(out, expected, strict=True)],
        lambda: all(torch.equal(o, e) for o, e in zip(out, expected, strict=True)),
        sum(t.nbytes for t in (x, *out, *([] if hint is None else [hint]))),
        tuple(out),
    )


def roundtrip_job(packed: Packed) -> Job:
    """Decode, and encode what came of it, with the scales as hint."""
    there = decode_job(packed, "natural")
    back = encode_job(*there.made, "natural", packed, hint=packed[1])  # the same memory
    return Job(
        lambda backend: (there.run(backend), back.run(backend)),
        lambda: (there.poison(), back.poison()),
        lambda: there.exact() and back.exact(),
        there.moved + back.moved,
        there.made + back.made,
    )


def job_of(case: Case, data: Data) -> Job:
    """The work of a row of ours."""
    if case.op == "dequant":
        return decode_job(data.packed, case.layout)
    if case.op == "roundtrip":
        return roundtrip_job(data.packed)
    if case.kind.startswith("hint"):
        packed = data.packed if case.kind == "hint" else data.packed_below_six
        return encode_job(decoded(packed), case.layout, packed, hint=packed[1])
    rows = data.weights if case.kind == "float32" else data.weights_bf16
    rule = case.kind if case.kind in mxfp4.RULES else "even"
    policy = "error" if case.kind == "error" else "nan"
    return encode_job(rows, case.layout, data.encoded(rule, rows.dtype), rule=rule, policy=policy)


# --- --check-only ---------------------------------------------------------------------------------


def every_block(least_scale: int) -> Packed:
    """``[4, 16, 32, 16]``: each scale byte with each largest code, all codes below it, both signs."""
    order = [[c | sign for c in range(most, -1, -1) for sign in (0, 8)] * 16 for most in range(8)]
    codes = torch.tensor([row[:32] for row in order], dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(8).clamp(min=least_scale)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).view(4, 16, 32, 16), scales.view(4, 16, 32)


def between(least_scale: int) -> Tensor:
    """float32 ``[4, 16, 1024]``: eighths of every power of two, so all ties and near ties."""
    noise = torch.Generator().manual_seed(3)
    eighths = torch.randint(-60, 61, (4, 16, 32, 32), generator=noise)
    scales = torch.arange(256).repeat(8).clamp(least_scale + 3, 250).view(4, 16, 32, 1)
    return torch.ldexp(eighths.double() / 8, scales - 127).float().flatten(2)


def checks(device: torch.device, least_scale: int = 0) -> Iterator[tuple[str, Callable[[], Job]]]:
    """All that a backend must get right, with names."""
    packed = tuple(t.to(device) for t in every_block(least_scale))
    own, values = packed[1], decoded(packed)
    for layout in LAYOUTS:
        hinted = truth(values, "even", own)
        yield f"encode {layout}, hint", partial(encode_job, values, layout, hinted, hint=own)
        yield f"decode {layout}", partial(decode_job, packed, layout)
    for name, rows in (("every block", values), ("ties", between(least_scale).to(device))):
        for dtype in (torch.bfloat16, torch.float32):
            x = rows.to(dtype)
            for about, hint in (("no hint", None), ("hint", own), ("wrong hint", own.flip(0, 1))):
                for rule in mxfp4.RULES:
                    yield f"encode {name}, {dtype}, {rule}, {about}", partial(matrix, x, rule, hint)


def matrix(x: Tensor, rule: mxfp4.Rule, hint: Tensor | None) -> Job:
    """Encode in the order of the blocks."""
    return encode_job(x, "natural", truth(x, rule, hint), rule=rule, hint=hint)


def is_brief(name: str) -> bool:
    """Whether it is among the few that Triton's interpreter gets through in some ten seconds."""
    if name in ("encode natural, hint", "decode natural", "decode both"):
        return True
    return name.endswith(("no hint", "block, torch.bfloat16, even, wrong hint"))


def check_only(device: torch.device, backends: list[str]) -> int:
    """Every backend over all checks; how many finite blocks keep their bytes."""
    result: dict[str, dict[str, Any]] = {}
    for backend in backends:
        # Triton's interpreter flushes bfloat16 subnormals, its compiler does not.
        interpreted = (backend, device.type) == ("triton", "cpu")
        least = 2 if interpreted else 0
        blocks, scales = (t.to(device) for t in every_block(least))
        finite = decoded((blocks, scales)).unflatten(-1, (-1, 32)).isfinite().all(-1)
        kept, wrong = torch.zeros_like(finite), []
        for name, make in checks(device, least):
            if interpreted and not is_brief(name):
                continue
            job = make()
            if not job.verify(backend):
                wrong.append(name)
            if name == "encode natural, hint":
                kept = finite & (job.made[0] == blocks).all(-1) & (job.made[1] == scales)
        counts = {"finite": int(finite.sum()), "kept": int(kept.sum()), "wrong": wrong}
        result[backend] = counts
        print(f"{backend}: {counts['kept']} of {counts['finite']} finite blocks keep their bytes")
        for name in wrong:
            print(f"{backend}: NOT EXACT: {name}")
    exact = all(not c["wrong"] and c["kept"] == c["finite"] for c in result.values())
    print(json.dumps({"device": device.type, "check": "every block", **result, "exact": exact}))
    return int(not exact)


# --- rows -----------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table."""

    case: Case
    who: str
    ours: bool
    threads: int
    timing: Timing
    exact: str
    peak_mb: float | None
    versus: dict[str, float] = field(default_factory=dict)

    def show(self, peers: list[str]) -> None:
        """Print it, under ``heading``."""
        ms, *numbers = self.timing
        numbers = [f"{ms:.3f}", f"{numbers[0]:.1f}", *(f"{n:.3f}" for n in numbers[1:])]
        peak = "-" if self.peak_mb is None else f"{self.peak_mb:.1f}"
        versus = [f"{self.versus[p]:.1f}" if p in self.versus else "" for p in peers]
        print_cells((*self.case, self.who, self.threads, *numbers, self.exact, peak), versus)

    def as_json(self) -> dict[str, object]:
        """For --json."""
        flat = {**self.case._asdict(), **vars(self), **self.timing._asdict()}
        return {key: value for key, value in flat.items() if key not in ("case", "timing")}


def print_cells(cells: Sequence[object], versus: list[str]) -> None:
    """One line; names to the left, numbers to the right."""
    widths = (-10, -13, -9, -15, 3, 10, 8, 7, 7, 7, 9)
    line = [f"{c!s:<{-w}}" if w < 0 else f"{c!s:>{w}}" for c, w in zip(cells, widths, strict=True)]
    print(" ".join(line + [f"{v:>17}" for v in versus]).rstrip(), flush=True)


class Goal(NamedTuple):
    """The worst of some rows of ours must reach this. ``versus`` is a peer, or the copy."""

    device: str
    op: str
    layouts: str
    kinds: str
    backend: str
    threads: range
    versus: str
    least: float

    def __str__(self) -> str:
        words = f"{self.op} {self.layouts} {self.kinds}".split()
        return f"{self.backend} {' '.join(words)} / {self.versus}"


ONE, ALL = range(1, 2), range(16, 1 << 16)
GOALS = [
    Goal("cuda", "dequant", "natural,deinterleave", "", "triton", ONE, "copy", 0.95),
    Goal("cuda", "dequant", "natural,deinterleave", "", "triton", ONE, "triton_kernels", 1.6),
    Goal("cuda", "dequant", "natural,deinterleave", "", "triton", ONE, "bridge", 17),
    Goal("cuda", "dequant", "natural,deinterleave", "", "triton", ONE, "openai", 17),
    Goal("cuda", "dequant", "transpose,both", "", "triton", ONE, "copy", 0.85),
    Goal("cuda", "dequant", "transpose,both", "", "triton", ONE, "hf", 25),
    Goal("cuda", "quant", "natural,deinterleave", "even", "triton", ONE, "copy", 0.97),
    Goal("cuda", "quant", "natural,deinterleave", "even", "triton", ONE, "triton_kernels", 2.6),
    Goal("cuda", "quant", "natural,deinterleave", "even", "triton", ONE, "bridge", 50),
    Goal("cuda", "quant", "natural", "hint", "triton", ONE, "copy", 0.75),
    Goal("cuda", "quant", "natural", "hint", "triton", ONE, "triton_kernels", 2),
    Goal("cuda", "pipeline", "natural", "", "triton", ONE, "copy", 0.90),
    Goal("cpu", "dequant", "natural,deinterleave", "", "numba", ONE, "copy", 0.65),
    Goal("cpu", "dequant", "natural,deinterleave", "", "numba", ALL, "copy", 0.75),
    *(
        Goal("cpu", "dequant", "natural,deinterleave", "", backend, threads, peer, least)
        for backend, threads, least in (("numba", ONE, 70), ("numba", ALL, 60), ("table", ONE, 20))
        for peer in ("openai", "bridge")
    ),
    Goal("cpu", "dequant", "natural", "", "table", ONE, "copy", 0.20),
    Goal("cpu", "quant", "natural", "even", "numba", ONE, "copy", 0.15),
    Goal("cpu", "quant", "natural", "even", "numba", ALL, "copy", 0.30),
    Goal("cpu", "quant", "natural", "even", "numba", ONE, "bridge", 35),
    Goal("cpu", "quant", "natural", "even", "numba", ALL, "bridge", 50),
    Goal("cpu", "quant", "natural", "even", "table", ONE, "copy", 0.05),
    Goal("cpu", "quant", "natural", "even", "table", ONE, "bridge", 10),
]


def judge(goal: Goal, device: str, rows: list[Row]) -> dict[str, object] | None:
    """None if no row says."""
    found = [
        row.timing.ratio if goal.versus == "copy" else row.versus[goal.versus]
        for row in rows
        if (device, row.case.op, row.who) == (goal.device, goal.op, goal.backend)
        and row.case.layout in goal.layouts.split(",")
        and (not goal.kinds or row.case.kind in goal.kinds.split(","))
        and row.threads in goal.threads
        and (goal.versus == "copy" or goal.versus in row.versus)
    ]
    if not found:
        return None
    threads = {ONE: ", 1 thread", ALL: ", 16 threads or more"}[goal.threads]
    threads = threads if device == "cpu" else ""
    worst = round(min(found), 3)
    return {
        "goal": str(goal) + threads,
        "least": goal.least,
        "reached": worst,
        "pass": worst >= goal.least,
    }


# --- measuring ------------------------------------------------------------------------------------


def peer_call(peer: Peer, case: Case, data: Data) -> Callable[[], Tensor | Packed]:
    """A peer's work."""
    if case.op == "dequant":
        return lambda: peer.dequant(*data.packed)
    return lambda: peer.quant[case.kind](data.weights_bf16)


def share(made: Tensor | Packed, case: Case, data: Data) -> str:
    """How many of a peer's blocks are as the definition has them."""
    if isinstance(made, Tensor):
        if made.device.type != data.device.type:
            raise RuntimeError(f"it moved the work to {made.device}")
        stored = made.transpose(-1, -2) if case.layout == "transpose" else made
        pairs = zip(stored.view(torch.int16), *data.packed, strict=True)
        same = [(got == true_decode(b, s)).unflatten(-1, (-1, 32)).all(-1) for got, b, s in pairs]
        equal = torch.stack(same)
    else:
        blocks, scales = data.encoded(case.kind, torch.bfloat16)
        equal = (made[0].reshape(blocks.shape) == blocks).all(-1)
        equal &= made[1].reshape(scales.shape) == scales
    return "yes" if equal.all() else f"{100 * equal.float().mean():.2f}%"


def peak_in(case: Case, who: str, data: Data, paths: Sequence[Path]) -> float | None:
    """Extra memory of a first call at full size, MB; compiling and tables are not counted."""
    device = data.device.type
    if who not in PEERS:
        job_of(case, Data((1, 64, 64), data.device)).run(who)
        job = job_of(case, data)
        job.poison()
        return peak_of(lambda: job.run(who), device)
    peer = load_peer(who, device, paths)
    assert isinstance(peer, Peer)
    call, held = peer_call(peer, case, data), []
    call()
    peak = peak_of(lambda: held.append(call()), device)
    results = [held[0]] if isinstance(held[0], Tensor) else held[0]
    return None if peak is None else max(0, peak - sum(t.nbytes for t in results) / 1e6)


def peak_in_child(
    case: Case, who: str, shape: tuple[int, int, int], threads: int, paths: Sequence[Path]
) -> float | None:
    """The same on the CPU, by a process that has done nothing else."""
    torch.set_num_threads(threads)
    return peak_in(case, who, Data(shape, torch.device("cpu")), paths)


def pipeline(op: str, data: Data, reps: int) -> tuple[Timing, bool]:
    """Host to GPU to host through pinned memory, four experts at a time on two streams."""
    packed = data.packed if op == "dequant" else data.encoded("even", torch.bfloat16)
    wide = decoded(packed) if op == "dequant" else data.weights_bf16
    given = (*packed, wide)
    host = [torch.empty_like(t, device="cpu", pin_memory=True).copy_(t) for t in given]
    near = [[torch.empty_like(t[:4]) for t in given] for _ in "ab"]
    streams = [torch.cuda.Stream() for _ in "ab"]
    sources, targets = ((0, 1), (2,)) if op == "dequant" else ((2,), (0, 1))

    def run() -> None:
        for turn, start in enumerate(range(0, len(wide), 4)):
            ring, count = near[turn % 2], min(4, len(wide) - start)
            blocks, scales, values = (t[:count] for t in ring)
            with torch.cuda.stream(streams[turn % 2]):
                for i in sources:
                    ring[i][:count].copy_(host[i][start : start + count], non_blocking=True)
                if op == "dequant":
                    mxfp4.decode(blocks, scales, out=values, backend="triton")
                else:
                    out = mxfp4.Encoded(blocks, scales)
                    mxfp4.encode(values, out=out, on_nonfinite="nan", backend="triton")
                for i in targets:
                    host[i][start : start + count].copy_(ring[i][:count], non_blocking=True)
        torch.cuda.synchronize()

    def link() -> None:
        far, close = (host[2], wide) if op == "dequant" else (wide, host[2])
        far.copy_(close, non_blocking=True)
        torch.cuda.synchronize()

    def seconds(action: Callable[[], None]) -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    for i in targets:
        host[i].view(torch.uint8).bitwise_not_()
    run()
    exact = all(
        torch.equal(host[i].view(torch.uint8), given[i].cpu().view(torch.uint8)) for i in targets
    )
    links, runs = zip(*((seconds(link), seconds(run)) for _ in range(reps)), strict=True)
    usual = statistics.median(runs)
    ratio = statistics.median(links) / usual
    return Timing(1e3 * usual, 1e-9 * wide.nbytes / usual, ratio, max(runs) / min(runs) - 1), exact


class Bench:
    """One run of the program."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments = arguments
        self.device = device
        self.reps = arguments.reps or (50 if device.type == "cuda" else 20)
        shape = (arguments.experts, arguments.rows, arguments.cols)
        self.data = Data(shape, device, arguments.seed)
        self.rows: list[Row] = []
        self.copies: dict[int, float] = {}
        loaded = {p: load_peer(p, device.type, arguments.peer_path) for p in arguments.peers}
        self.skipped = {name: peer for name, peer in loaded.items() if isinstance(peer, str)}
        self.peers = {name: peer for name, peer in loaded.items() if isinstance(peer, Peer)}

    def measure(self, backends: list[str], threads: int, memory: bool) -> None:
        """All rows on so many threads: peers first, so that ours can be compared."""
        wanted = cases(self.arguments)
        side = 2 * self.data.weights.numel()
        clock = CudaClock() if self.device.type == "cuda" else CpuClock(side)
        self.copies[threads] = clock.copy
        self.heading(clock, threads)
        for name, peer in self.peers.items():
            todo = [Case("dequant", peer.layout), *(Case("quant", kind=k) for k in peer.quant)]
            for case in todo:
                if case.op in {c.op for c in wanted}:
                    self.peer_row(name, case, clock, threads, memory)
        for case in wanted:
            for backend in backends:
                job = job_of(case, self.data)
                exact = job.verify(backend)
                timing = clock.time(lambda j=job, b=backend: j.run(b), job.moved, self.reps)
                del job
                peak = self.peak(case, backend, threads) if memory else None
                self.add(Row(case, backend, True, threads, timing, "yes" if exact else "NO", peak))
        if isinstance(clock, CudaClock) and self.arguments.op in ("pipeline", "all"):
            for op in ("dequant", "quant") if "triton" in backends else ():
                timing, exact = pipeline(op, self.data, self.reps)
                case, right = Case("pipeline", kind=op), "yes" if exact else "NO"
                self.add(Row(case, "triton", True, threads, timing, right, None))

    def heading(self, clock: CpuClock | CudaClock, threads: int) -> None:
        """What the copies do, and the names of the columns."""
        floor = 1e-6 * decode_moves(self.data) / clock.copy
        print(f"\ncopy {clock.copy:.1f} GB/s read and written, {clock.note}; ", end="")
        print(f"{decode_moves(self.data) / 1e6:.1f} MB to move in decoding: {floor:.3f} ms at that")
        names = ["op", "layout", "kind", "who", "thr", "ms", "GB/s", "ratio"]
        print_cells((*names, clock.beside, "exact", "peak MB"), [f"x_{p}" for p in self.peers])

    def peer_row(
        self, name: str, case: Case, clock: CpuClock | CudaClock, threads: int, memory: bool
    ) -> None:
        """Measure a peer; one that fails is told of, and left out."""
        try:
            call = peer_call(self.peers[name], case, self.data)
            exact = share(call(), case, self.data)
            timing = clock.time(call, decode_moves(self.data), self.reps)
            peak = self.peak(case, name, threads) if memory else None
        except Exception as error:
            self.skipped[f"{name} {case.op} {case.kind}".rstrip()] = brief(error)
            print(f"{name}: {case.op} {case.kind} failed: {brief(error)}", flush=True)
            return
        self.add(Row(case, name, False, threads, timing, exact, peak))

    def add(self, row: Row) -> None:
        """Compare one of ours with the best that each peer does, and print it."""
        for peer in self.peers if row.ours else ():
            times = [
                r.timing.ms
                for r in self.rows
                if (r.who, r.case.op, r.threads) == (peer, row.case.op, row.threads)
                and (r.case.layout == "natural" or row.case.layout in ("transpose", "both"))
            ]
            if times:
                row.versus[peer] = min(times) / row.timing.ms
        self.rows.append(row)
        row.show(list(self.peers))

    def peak(self, case: Case, who: str, threads: int) -> float | None:
        """See ``peak_in``."""
        paths = self.arguments.peer_path
        if self.device.type == "cuda":
            return peak_in(case, who, self.data, paths)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "gptoss_kernels.mxfp4"])
        with ProcessPoolExecutor(1, context) as child:
            asked = child.submit(peak_in_child, case, who, self.data.shape, threads, paths)
            return asked.result()

    def finish(self, left_out: dict[str, str]) -> int:
        """Judge, print the goals and the JSON line; the exit code."""
        device, least = self.device.type, self.arguments.min_ratio
        judged = [judge(goal, device, self.rows) for goal in GOALS]
        goals = [goal for goal in (*judged, self.memory_goal()) if goal]
        print()
        for goal in goals:
            verdict = "pass" if goal["pass"] else "FAIL"
            bound = f"<= {goal['most']}" if "most" in goal else f">= {goal['least']}"
            print(f"{verdict} {goal['reached']:>8} {bound:<8} {goal['goal']}")
        ours = [row for row in self.rows if row.ours]
        result = {
            "device": device,
            "name": device_name(self.device),
            "versions": versions(self.peers),
            "backends_left_out": left_out,
            "peers_left_out": self.skipped,
            "shape": self.data.shape,
            "copy_gbps": {str(k): round(v, 1) for k, v in self.copies.items()},
            "load_average": os.getloadavg()[0],
            "exact": all(row.exact == "yes" for row in ours),
            "goals": goals,
        }
        if self.arguments.json:
            whole = {**result, "rows": [row.as_json() for row in self.rows]}
            self.arguments.json.write_text(json.dumps(whole, indent=1) + "\n")
        slow = [row for row in ours if row.timing.ratio < least]
        for row in slow:
            print(f"below --min-ratio {least}: {' '.join(row.case).strip()} {row.who}")
        print(json.dumps(result))
        return int(bool(slow) or not result["exact"])

    def memory_goal(self) -> dict[str, object] | None:
        """Decoding by the best backend takes at most 1 % of its result beside it."""
        decoding = [r for r in self.rows if r.ours and r.case.op == "dequant"]
        peaks = [r.peak_mb for r in decoding if r.who == decoding[0].who and r.peak_mb is not None]
        if not peaks:
            return None
        most = max(peaks) * 1e6 / (2 * self.data.weights.numel())
        name = f"{decoding[0].who} dequant, extra memory / result"
        return {"goal": name, "most": 0.01, "reached": round(most, 4), "pass": most <= 0.01}


def brief(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def decode_moves(data: Data) -> int:
    """Bytes read and written by decoding, or encoding, once."""
    return sum(t.nbytes for t in data.packed) + 2 * data.weights.numel()


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), "a CPU")


def versions(peers: dict[str, Peer]) -> dict[str, str]:
    """Of what is timed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "numba"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {name: peer.source for name, peer in peers.items()}


USUAL = ("numba", "table")  # on a CPU


def usable(names: str, device: torch.device, check_only: bool) -> tuple[list[str], dict[str, str]]:
    """Backends to run, and why not the others. ``auto`` is what a user would get, and on the CPU
    the one that is always there; in --check-only all that run.
    """
    wanted = list(mxfp4.BACKENDS) if names == "auto" else names.replace("torch", "table").split(",")
    ready, missing = [], {}
    for name in wanted:
        try:
            mxfp4.choose(device, name)
            ready.append(name)
        except (ImportError, ValueError) as error:
            missing[name] = brief(error)
    if names == "auto" and not check_only:
        ready = ready[:1] if device.type == "cuda" else [n for n in ready if n in USUAL]
    return ready, missing


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""

    def several(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    operations = ("dequant", "quant", "roundtrip", "pipeline", "all")
    cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--op", choices=operations, default="all")
    parser.add_argument("--layout", type=several, help=f"some of {','.join(LAYOUTS)}")
    parser.add_argument("--rule", type=several, help=f"some of {','.join(mxfp4.RULES)}")
    parser.add_argument("--hint", action="store_true", help="encode with hints only")
    parser.add_argument("--experts", type=int, help="default: 32 on cuda, 4 on the CPU")
    parser.add_argument("--rows", type=int, default=5760)
    parser.add_argument("--cols", type=int, default=2880)
    parser.add_argument("--threads", type=several, default=sorted({1, cores}), help="CPU: 1,2,...")
    parser.add_argument("--backends", default="auto", help="of triton,numba,torch (table)")
    parser.add_argument("--peers", type=several, default=list(PEERS), help=",".join(PEERS))
    parser.add_argument("--peer-path", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--reps", type=int, help="default: 50 on cuda, 20 on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--min-ratio", type=float, default=0.0)
    arguments = parser.parse_args(argv)
    arguments.experts = arguments.experts or (32 if arguments.device == "cuda" else 4)
    if (arguments.op, arguments.device) == ("pipeline", "cpu"):
        parser.error("--op pipeline is for --device cuda")
    for name, known in (("layout", LAYOUTS), ("rule", mxfp4.RULES), ("peers", PEERS)):
        if strange := set(getattr(arguments, name) or ()) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(strange))} is none of {', '.join(known)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run it."""
    arguments = parse(argv)
    device = torch.device(arguments.device)
    backends, missing = usable(arguments.backends, device, arguments.check_only)
    for name, reason in missing.items():
        print(f"backend {name} is left out: {reason}")
    if not backends:
        print("no backend to measure")
        return 1
    if arguments.check_only:
        return check_only(device, backends)
    bench = Bench(arguments, device)
    experts, rows, cols = bench.data.shape
    print(f"{device_name(device)}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.2f}")
    print(", ".join(f"{name} {v}" for name, v in versions(bench.peers).items()))
    print(f"{experts} experts of {rows} x {cols}")
    for name, reason in bench.skipped.items():
        print(f"peer {name} is left out: {reason}")
    counts = [int(n) for n in arguments.threads] if device.type == "cpu" else [1]
    before = torch.get_num_threads()
    for threads in counts:
        if device.type == "cpu":
            torch.set_num_threads(threads)
        bench.measure(backends, threads, not arguments.no_memory and threads == counts[-1])
    torch.set_num_threads(before)
    return bench.finish(missing)


if __name__ == "__main__":
    sys.exit(main())
