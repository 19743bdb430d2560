"""What ``bench_parallel.py`` starts on every rank: one layout, from greedy text to training.

A launch does all that is measured of a kind; what is trained last stays in memory until it ends, since
megatron-core's hooks hold on to it. Rank 0 writes ``<name>-<what>.json`` into the folder, the rank with
the logits ``<name>-<dtype>.safetensors``.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

warnings.simplefilter("ignore")  # that Transformer Engine and Apex are not installed

from gptoss_convert.layout import Layout
from gptoss_convert.logical import open_logical
from gptoss_convert.opening import Choice
from gptoss_convert.registry import default_registry
from gptoss_plugins.gpt_model.filling import fill
from gptoss_plugins.gpt_model.forward import logits
from gptoss_plugins.gpt_model.live import build_live
from gptoss_plugins.gpt_model.world import world_of
from gptoss_plugins.infer.decoder import Decoder
from gptoss_plugins.infer.engine import Engine
from gptoss_plugins.train.architecture import megatron_fields
from gptoss_plugins.train.config import (
    DdpConfig,
    MixedPrecisionConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainConfig,
    TrainingConfig,
)
from gptoss_plugins.train.run.data import Steps, place_of
from gptoss_plugins.train.run.figures import flops_per_token, peak
from gptoss_plugins.train.run.step import train_step
from gptoss_plugins.train.run.trainee import build_trainee
from gptoss_plugins.verify.logits import hugging_face_logits, prompt

TOKENS = 300  # of the prompt whose logits are compared: more than the window
NEW = 32
VALUES, SPEED, INFERENCE, THEIRS = (
    "values",
    "speed",
    "inference",
    "transformers",
)  # what a launch measures
EXPERTS = ("eager", "grouped_mm")  # transformers' implementations
LOSSES = 10
FLOAT32_LAYERS, FLOAT32_LENGTH, FLOAT32_ROWS = 2, 512, 2
SIZES: dict[str, dict[str, Any]] = {
    "20b": {"size": "20b"},
    "tiny": {"size": "tiny", "hidden_size": 96, "ffn_hidden_size": 64},  # whole blocks of MXFP4
}


class Rows:
    """Samples of random tokens, without end."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self._vocabulary, self._length = vocabulary, length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(number)
        ids = torch.randint(0, self._vocabulary, (self._length + 1,), generator=noise)
        mask = torch.ones(self._length)
        return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": mask}


def main() -> None:
    """One layout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", help="of the layout")
    parser.add_argument("what", choices=[VALUES, SPEED, INFERENCE, THEIRS])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--size", default="20b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--prefill", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--device")
    args = parser.parse_args()
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # it tells what it is made of
    layout = Layout(tp=args.tp, pp=args.pp, ep=args.ep)
    found: dict[str, Any] = {}
    with world_of(layout, args.device) as place:
        one = Worker(args, layout, place)
        for name, measure in one.parts():
            started = time.monotonic()
            found[name] = measure()
            tidy()
            if dist.get_rank() == 0:
                took = time.monotonic() - started
                print(f"{args.name}, {args.what}: {name} {took:.0f} s", file=sys.stderr, flush=True)
        if dist.get_rank() == 0:
            (args.folder / f"{args.name}-{args.what}.json").write_text(json.dumps(found))


class Worker:
    """A rank of a layout."""

    def __init__(self, args: argparse.Namespace, layout: Layout, place: torch.device) -> None:
        self.args, self.layout, self.place = args, layout, place
        self.registry = default_registry()
        self.is_alone = dist.get_world_size() == 1

    def parts(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """What there is to measure."""
        if self.args.what == THEIRS:
            yield "logits", self.their_logits
            for experts in EXPERTS:
                yield f"losses, {experts}", lambda e=experts: self.their_losses(e)
        elif self.args.what == VALUES:
            yield "greedy", self.greedy
            yield "logits, float32", lambda: self.logits(torch.float32)
            yield "logits, bfloat16", lambda: self.logits(torch.bfloat16)
            yield "losses, float32", self.losses_float32
        else:
            yield "inference", self.inference
            if self.args.what == SPEED:
                yield "training", self.training

    # --- inference ---

    def live(self, which: str, dtype: torch.dtype) -> tuple[Any, int]:
        """The model of a checkpoint in the folder, and its vocabulary."""
        checkpoint = open_logical(str(self.args.folder / which), self.registry, Choice())
        live = build_live(checkpoint.fields, self.layout, self.registry, self.place, dtype)
        fill(live, checkpoint)
        return live, checkpoint.fields["vocab_size"]

    def greedy(self) -> list[list[int]]:
        """Answers of a small model in float32, alone and in a batch."""
        live, vocabulary = self.live("small-hf", torch.float32)
        engine = Engine(Decoder(live.models[0], vocabulary), 4096)
        prompts = [prompt(vocabulary, count, count)[0].tolist() for count in (1, 100, TOKENS)]
        single, _ = engine.generate(prompts[-1:], new_tokens=NEW)
        engine.forget()
        several, _ = engine.generate(prompts, new_tokens=NEW)
        return [one.ids for one in (*single, *several)]

    def logits(self, dtype: torch.dtype) -> None:
        """Of the full width; kept in a file."""
        live, vocabulary = self.live("megatron", dtype)
        made = logits(live.models, prompt(vocabulary, TOKENS).to(self.place))
        if made is not None and dist.get_rank() == dist.get_world_size() - 1:
            self._keep(dtype, made[0, :, :vocabulary])

    def _keep(self, dtype: torch.dtype, made: Tensor, who: str | None = None) -> None:
        name = f"{who or self.args.name}-{dtype}.safetensors".replace("torch.", "")
        save_file({"logits": made.float().cpu().contiguous()}, self.args.folder / name)

    def inference(self) -> dict[str, float]:
        """Tokens per second of a long prompt, and of answers; gigabytes."""
        self._reset()
        live, vocabulary = self.live("megatron", torch.bfloat16)
        length = self.args.prefill
        engine = Engine(Decoder(live.models[0], vocabulary), length + 2 * NEW)
        ids = [prompt(vocabulary, length)[0].tolist()]
        found = {"prefill": length / self._seconds(lambda: self._first(engine, ids))}
        for batch in (1, 32):
            several = prompt(vocabulary, 128 * batch).view(batch, 128).tolist()
            best = 0.0
            for _ in range(2):
                engine.forget()
                _, timing = engine.generate(several, new_tokens=NEW)
                best = max(best, timing.tokens_per_second)
            found[f"decoding, batch {batch}"] = best
        return {**found, "gigabytes": self._gigabytes()}

    def _first(self, engine: Engine, ids: list[list[int]]) -> None:
        engine.forget()
        engine.generate(ids, new_tokens=1)

    # --- training ---

    def _config(self, layers: int, length: int, rows: int, *, bf16: bool) -> TrainingConfig:
        several = place_of(self.place).ranks > 1
        return TrainingConfig(
            model=ModelConfig(
                **SIZES[self.args.size],
                num_layers=layers,
                seq_length=length,
                tensor_model_parallel_size=self.layout.tp,
                pipeline_model_parallel_size=self.layout.pp,
                expert_model_parallel_size=self.layout.ep,
                sequence_parallel=self.layout.tp > 1,
            ),
            train=TrainConfig(train_iters=1000, global_batch_size=rows),
            optimizer=OptimizerConfig(
                lr=1e-5, min_lr=0.0, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16"
            )
            if bf16
            else OptimizerConfig(lr=1e-5, min_lr=0.0),
            scheduler=SchedulerConfig(lr_decay_style="constant", lr_warmup_iters=0),
            ddp=DdpConfig(
                grad_reduce_in_fp32=False,
                overlap_grad_reduce=several,
                overlap_param_gather=several,
            ),
            mixed_precision=MixedPrecisionConfig(bf16=bf16),
        )

    def _trainee(self, config: TrainingConfig, which: str) -> Any:
        trainee = build_trainee(config, self.registry, self.place, random_weights=False)
        fill(trainee.live, open_logical(str(self.args.folder / which), self.registry, Choice()))
        trainee.take_masters()
        return trainee

    def _steps(self, config: TrainingConfig) -> Any:
        vocabulary = megatron_fields(config.model)["vocab_size"]
        data = Rows(vocabulary, config.model.seq_length)
        return Steps(data, config, place_of(self.place), vocabulary).since(0)

    def losses_float32(self) -> list[float]:
        """The first ones, of a model that float32 leaves room for."""
        length = min(FLOAT32_LENGTH, self.args.length)
        layers = min(FLOAT32_LAYERS, self.args.layers)
        config = self._config(layers, length, FLOAT32_ROWS, bf16=False)
        trainee, steps = self._trainee(config, "shallow-hf"), self._steps(config)
        return [train_step(trainee, next(steps)).loss for _ in range(LOSSES)]

    def training(self) -> dict[str, Any]:
        """The first losses in bfloat16, then tokens per second, memory, what goes over the bus."""
        self._reset()
        config = self._config(self.args.layers, self.args.length, self.args.rows, bf16=True)
        trainee, steps = self._trainee(config, "megatron"), self._steps(config)
        self._reset()
        losses = [train_step(trainee, next(steps)).loss for _ in range(LOSSES)]
        batches = next(steps)
        took = self._seconds(lambda: train_step(trainee, batches))
        rate = self.args.rows * self.args.length / took
        flops = flops_per_token(megatron_fields(config.model), self.args.length)
        most: float | None = peak()
        world = dist.get_world_size()
        return {
            "losses": losses,
            "tokens_per_second": rate,
            "mfu": rate * flops / 1e12 / world / most if most else None,
            "gigabytes": self._gigabytes(),
            **self._bus(lambda: train_step(trainee, batches)),
        }

    def _bus(self, step: Callable[[], object]) -> dict[str, float]:
        """Of one step on this GPU: gigabytes that went over the bus, seconds in NCCL's kernels, and the
        bandwidth used in them, as nccl-tests counts it.
        """
        if self.is_alone or self.place.type != "cuda":
            step()
            return {}
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            step()
            torch.cuda.synchronize()
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            found.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_bytes())["traceEvents"]
        nbytes, seconds = 0.0, 0.0
        for event in events:
            if event.get("cat") == "kernel" and event["name"].startswith("nccl"):
                nbytes += bus_bytes(event["args"])
                seconds += event["dur"] / 1e6
        rate = nbytes / seconds / 1e9 if seconds else 0.0
        return {"bus_gigabytes": nbytes / 1e9, "bus_seconds": seconds, "bus_bandwidth": rate}

    # --- transformers ---

    def their_logits(self) -> None:
        """Kept in files."""
        folder, dtype = self.args.folder / "hf", torch.bfloat16
        ids = prompt(json.loads((folder / "config.json").read_bytes())["vocab_size"], TOKENS)
        for experts in EXPERTS:
            made = hugging_face_logits(
                folder, ids, dtype=dtype, device=self.place, quantized=True, experts=experts
            )
            self._keep(dtype, made, f"transformers-{experts}")
            tidy()

    def their_losses(self, experts: str) -> list[float]:
        """Of the same rows, with torch's AdamW, all in bfloat16."""
        from transformers import AutoModelForCausalLM, Mxfp4Config

        model = AutoModelForCausalLM.from_pretrained(
            self.args.folder / "hf",
            dtype=torch.bfloat16,
            attn_implementation="eager",
            experts_implementation=experts,
            quantization_config=Mxfp4Config(dequantize=True),
            device_map=str(self.place),
        ).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
        )
        data, losses = Rows(model.config.vocab_size, self.args.length), []
        for step in range(LOSSES):
            total = 0.0
            for row in range(step * self.args.rows, (step + 1) * self.args.rows):
                sample = data[row]
                ids = torch.cat([sample["tokens"], sample["labels"][-1:]]).to(self.place)[None]
                logits = model(ids[:, :-1], use_cache=False).logits[0].float()
                loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
                (loss / self.args.rows).backward()
                total += float(loss.detach()) / self.args.rows
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
        return losses

    # --- measuring ---

    def _reset(self) -> None:
        tidy()
        if self.place.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _gigabytes(self) -> float:
        """The most that any GPU had in use."""
        most = torch.cuda.max_memory_allocated() if self.place.type == "cuda" else 0
        found = torch.tensor([most / 1e9], device=self.place)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def _seconds(self, action: Callable[[], object], times: int = 3) -> float:
        """The best of some runs, everywhere done, after one that warms up."""
        best = float("inf")
        for number in range(times + 1):
            dist.barrier(device_ids=None if self.place.index is None else [self.place.index])
            started = time.monotonic()
            action()
            if self.place.type == "cuda":
                torch.cuda.synchronize()
            if number:
                best = min(best, time.monotonic() - started)
        return best


def bus_bytes(of: dict[str, Any]) -> float:
    """Bytes that a collective of NCCL's moves over each rank's bus, by what the profiler tells of it.

    Source of the factors: nccl-tests, doc/PERFORMANCE.md.
    """
    kinds = {"Float": 4, "BFloat16": 2, "Half": 2, "Long": 8, "Int": 4, "Byte": 1, "Double": 8}
    name, ranks = str(of.get("Collective name", "")), int(of.get("Group size", 1))
    given, made = (int(of.get(key, 0)) for key in ("In msg nelems", "Out msg nelems"))
    share = (ranks - 1) / ranks
    if "allreduce" in name:
        share *= 2
    elif name in ("send", "recv", "broadcast"):
        share = 1.0
    return max(given, made) * kinds.get(str(of.get("dtype")), 2) * share


def tidy() -> None:
    """Give a model's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
