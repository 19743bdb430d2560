"""Training of a slice of GPT-OSS on one GPU: ours beside transformers, and beside what the GPU can do.

    python benchmarks/bench_train.py --layers 3
    python benchmarks/bench_train.py --tiny --device cpu

Both learn from the same random tokens, rows of ``--length``, one at a time, in bfloat16; each has the GPU
to itself. Ours is the code of ``gptoss-convert train``: megatron-core's model, gradients, distributed
optimizer and schedule, float32 master weights and moments in bfloat16. transformers' is its model with
torch's fused AdamW, which has neither master weights nor any state but in bfloat16; of its two ways to
compute experts the faster one counts. A step takes ``--rows`` rows: an optimizer's step costs the same
however many there are, so it is told for one row and for several.

FLOPs are those of ``gptoss_plugins.train.run.figures`` for both: what learning takes, whatever is
computed twice. The last line is JSON; the exit code is 1 if a goal is missed: twice transformers'
tokens/s, 30 % of the GPU's peak (MFU) with the most rows, no more memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

from gptoss_convert.layout import Layout
from gptoss_convert.registry import default_registry
from gptoss_plugins.train.architecture import hf_config, megatron_fields, parameters
from gptoss_plugins.train.config import (
    NAMED,
    DdpConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainConfig,
    TrainingConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SPEED, USE = 2.0, 0.30  # times transformers; of the GPU's peak
WARM, STEPS = 2, 4  # steps before, and in a round
Figures = dict[str, float]


def model_of(args: argparse.Namespace) -> ModelConfig:
    """The slice: layers of 20B, with both of its embeddings."""
    size: Any = "tiny" if args.tiny else "20b"
    return ModelConfig(size=size, num_layers=args.layers, seq_length=args.length)


def rows_of(args: argparse.Namespace, count: int) -> torch.Tensor:
    """Random tokens and their successors: int64 ``[count, length + 1]``."""
    noise = torch.Generator().manual_seed(0)
    vocabulary = hf_config(model_of(args))["vocab_size"]
    return torch.randint(0, vocabulary, (count, args.length + 1), generator=noise).to(args.device)


def seconds(step: Callable[[], object], args: argparse.Namespace) -> float:
    """Wall time of a step, the mean of a round."""
    for _ in range(WARM):
        step()
    done(args)
    started = time.monotonic()
    for _ in range(args.steps):
        step()
    done(args)
    return (time.monotonic() - started) / args.steps


def done(args: argparse.Namespace) -> None:
    """Wait for the GPU."""
    if args.device == "cuda":
        torch.cuda.synchronize()


def figures(took: float, rows: int, args: argparse.Namespace) -> Figures:
    """Of a step of so many rows."""
    from gptoss_plugins.train.run.figures import flops_per_token, peak

    rate = rows * args.length / took
    tflops = rate * flops_per_token(megatron_fields(model_of(args)), args.length) / 1e12
    most: float | None = peak()
    memory = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else 0.0
    use = tflops / most if most else 0.0
    return {"tokens_per_second": rate, "tflops": tflops, "mfu": use, "gigabytes": memory}


def measured(
    steps: Callable[[int], Callable[[], object]], args: argparse.Namespace
) -> dict[int, Figures]:
    """For each number of rows."""
    found = {}
    for rows in args.rows:
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found[rows] = figures(seconds(steps(rows), args), rows, args)
    return found


def ours(args: argparse.Namespace) -> dict[int, Figures]:
    """``gptoss-convert train``'s steps, random weights."""
    from gptoss_plugins.gpt_model.world import world_of
    from gptoss_plugins.train.run.step import Batch, train_step
    from gptoss_plugins.train.run.trainee import build_trainee

    config = TrainingConfig(
        model=model_of(args),
        train=TrainConfig(train_iters=1000, global_batch_size=1),
        optimizer=OptimizerConfig(
            lr=1e-5, min_lr=0.0, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16"
        ),
        scheduler=SchedulerConfig(lr_decay_style="constant"),
        ddp=DdpConfig(grad_reduce_in_fp32=False),
        mixed_precision=NAMED["bf16_mixed"],
    )
    with world_of(Layout(), args.device) as place:
        trainee = build_trainee(config, default_registry(), place, random_weights=False)
        fill(trainee.live.models[0])
        trainee.take_masters()

        def batches(rows: int) -> Iterator[Any]:
            positions = torch.arange(args.length, device=place)[None]
            for row in rows_of(args, rows):
                mask = torch.ones(1, args.length, device=place)
                yield Batch(row[None, :-1], row[None, 1:], mask, positions, None, args.length)

        def steps(rows: int) -> Callable[[], object]:
            given = list(batches(rows))
            return lambda: train_step(trainee, given)

        if args.profile:
            profile(steps(args.rows[-1]), args)
        return measured(steps, args)


def theirs(args: argparse.Namespace) -> dict[int, Figures]:
    """Transformers' model with torch's fused AdamW, by the faster of its experts."""
    best: dict[int, Figures] = {}
    for experts in ("eager", "grouped_mm"):
        try:
            found = measured(their_steps(experts, args), args)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            print(f"transformers with experts {experts}: {str(error)[:200]}", flush=True)
            continue
        finally:
            tidy()
        print(f"transformers, experts {experts}: {json.dumps(found)}", flush=True)
        for rows, row in found.items():
            if rows not in best or row["tokens_per_second"] > best[rows]["tokens_per_second"]:
                best[rows] = row
    return best


def their_steps(experts: str, args: argparse.Namespace) -> Callable[[int], Callable[[], object]]:
    """A model of theirs, and what takes a step of it."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = {k: v for k, v in hf_config(model_of(args)).items() if k != "architectures"}
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = GptOssForCausalLM._from_config(
            GptOssConfig(**config), attn_implementation="eager", experts_implementation=experts
        ).train()
    torch.set_default_dtype(dtype)
    fill(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=args.device == "cuda")

    def steps(rows: int) -> Callable[[], object]:
        given = rows_of(args, rows)

        def step() -> None:
            for row in given:
                loss = model(row[None, :-1], labels=row[None, 1:], use_cache=False).loss
                (loss / rows).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return steps


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Weights of 0.02, norms of 1."""
    for name, weight in model.named_parameters():
        weight.normal_(0, 0.02)
        if "norm" in name:
            weight.fill_(1)


def profile(step: Callable[[], object], args: argparse.Namespace) -> None:
    """What a step spends its time on."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    for _ in range(WARM):
        step()
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if args.device == "cuda" else []
    with profiled(activities=kinds) as found:
        step()
        done(args)
    by = "self_cuda_time_total" if args.device == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=45, max_name_column_width=90))


def tidy() -> None:
    """Nothing of a model is left on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    """Measure both, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=3, help="as many as fit")
    parser.add_argument("--length", type=int, default=None, help="tokens of a row: 4096")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="of a step")
    parser.add_argument("--steps", type=int, default=STEPS, help="that are timed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, to try it out")
    parser.add_argument("--only", choices=["ours", "theirs"], help="one of the two")
    parser.add_argument("--profile", action="store_true", help="what ours spends its time on")
    args = parser.parse_args()
    args.length = args.length or (128 if args.tiny else 4096)
    warnings.simplefilter("ignore")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {parameters(model_of(args)) / 1e9:.3f}e9 weights")
    found = {}
    for who, measure in (("ours", ours), ("theirs", theirs)):
        if args.only == who:
            found[who] = measure(args)
        elif args.only is None:  # in a process of its own, whose memory is all given back
            found[who] = elsewhere(who)
    return report(found, args)


def elsewhere(who: str) -> dict[int, Figures]:
    """What this script finds in another process."""
    command = [sys.executable, *sys.argv, "--only", who]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(said, end="", flush=True)
    return {int(rows): row for rows, row in json.loads(said.splitlines()[-1])[who].items()}


def report(found: dict[str, dict[int, Figures]], args: argparse.Namespace) -> int:
    """A row for each step's size, and whether the goals are met."""
    good = True
    for rows in args.rows:
        for who, by_rows in found.items():
            row = by_rows[rows]
            print(
                f"{rows} rows  {who:7}{row['tokens_per_second']:10,.0f} tokens/s"
                f"{row['tflops']:8.1f} TFLOP/s{row['mfu']:8.1%} MFU{row['gigabytes']:7.1f} GB"
            )
        if len(found) == 2:
            mine, other = found["ours"][rows], found["theirs"][rows]
            ratio = mine["tokens_per_second"] / other["tokens_per_second"]
            memory = mine["gigabytes"] / (other["gigabytes"] or 1)
            print(f"{rows} rows  {ratio:.2f} x tokens/s, {memory:.2f} x memory")
            good &= ratio >= SPEED and not memory > 1
            good &= rows != max(args.rows) or mine["mfu"] >= USE
    print(json.dumps({"args": {k: v for k, v in vars(args).items()}, **found}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
