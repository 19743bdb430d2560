"""All GPUs of a host: the commands of a first day with 20B, at its own size, and what they make.

    python benchmarks/bench_node.py --ranks 8 --folder /dev/shm/node
    python benchmarks/bench_node.py --ranks 8 --size tiny --device cpu --folder /tmp/node

Makes a calm random checkpoint in MXFP4 (``bench_logits.py``), and then, by ``torchrun`` with ``--ranks``
processes, as a user would:

* ``import`` and ``export``: ``verify`` finds the exported tensors to be the first ones
* ``roundtrip --tp 2 --pp 2``: all weights, and the logits beside transformers'
* ``generate --tp 2 --pp 2 --ep 2 --etp 1``, in float32: its tokens are those of two processes
* full fine-tuning, packed, from those weights, at (tp, pp, ep) = (2, 2, ranks / 2) and (1, 1, ranks):
  the losses of the two; and a run that stops half way at the first layout goes on at the second;
  with two ranks at (1, 2, 1) and (1, 1, 2), and only this

Prints a table of the training, beside the 5,851 tokens/s of each GPU that are published for
pretraining 20B with the reference system on 16 H100 (Megatron-Bridge's documentation); the last line
is JSON. The exit code is 1 if something is not the same, or losses are more than 1e-3 apart in
bfloat16, 1e-4 in float32. 20B takes 55 GB in the folder, and 250 GB once training is
saved: 10 bytes a weight.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_logits import make
from bench_parallel import apart, launch, output, require_empty, require_even, tell

from gptoss_plugins.data.byte_level import byte_level_files
from gptoss_plugins.train.architecture import hf_config
from gptoss_plugins.train.config import ModelConfig

PUBLISHED = 5851  # tokens/s of a GPU
APART = {"bfloat16": 1e-3, "float32": 1e-4}  # of losses
TINY = {"hidden_size": 96, "ffn_hidden_size": 64, "num_moe_experts": 8}  # whole blocks of MXFP4
PARTS = ("convert", "roundtrip", "generate", "train", "resume")


class Node:
    """The commands, and where they work."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.hf, self.megatron = args.folder / "hf", args.folder / "megatron"
        first = (1, 2, 1) if args.ranks == 2 else (2, 2, args.ranks // 2)
        self.layouts = [first, (1, 1, args.ranks)]
        sizes: dict[str, Any] = TINY if args.size == "tiny" else {}
        self.model = ModelConfig(size=args.size, num_layers=args.layers, **sizes)
        self.wrong: list[str] = []

    def run(self, ranks: int, *command: object) -> str:
        """What a command printed; one that fails ends the benchmark."""
        words, began = [str(word) for word in command], time.monotonic()
        said = output(launch(ranks, "-m", "gptoss_convert", *words))
        tell(f"{time.monotonic() - began:6.1f} s  {ranks} x {' '.join(words)[:150]}")
        return said

    def require(self, holds: bool, what: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.wrong.append(what)

    # --- what is measured ---

    def prepare(self) -> None:
        """The checkpoint, with a tokenizer of bytes; and what is learned."""
        config = hf_config(self.model)
        make(
            self.hf, {**config, "quantization_config": {"quant_method": "mxfp4"}}, self.args.device
        )
        if self.args.device == "cuda":
            torch.cuda.empty_cache()
        for name, data in byte_level_files().items():
            (self.hf / name).write_bytes(data)
        letters, data = random.Random(1), self.args.folder / "data"
        data.mkdir()
        left = self.args.steps * self.args.rows * self.args.length
        with (data / "training.jsonl").open("w") as file:
            while left > 0:
                asked, said = (letters.randint(20, self.args.length // 2 - 20) for _ in range(2))
                prompt, completion = (
                    "".join(letters.choices("abcdefghijklmnopqrstuvwxyz ,.", k=size))
                    for size in (asked, said)
                )
                file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
                left -= asked + said

    def convert(self) -> dict[str, Any]:
        """There and back; seconds of each."""
        back = self.args.folder / "back"
        both = ("--hf-model", self.hf, "--megatron-path", self.megatron)
        found = {}
        for name, more in (
            ("import", ()),
            ("export", ("--hf-path", back, "--export-dtype", "mxfp4")),
        ):
            if name == "export" and not self.wants("convert"):
                continue
            began = time.monotonic()
            self.run(self.args.ranks, name, *both, *more, "--device", self.args.device)
            found[name] = time.monotonic() - began
        if back.exists():
            said = json.loads(self.run(1, "verify", self.hf, back, "--json"))
            self.require(said["sound"], "exported tensors are others than the first")
            shutil.rmtree(back)
        return found

    def roundtrip(self) -> dict[str, Any]:
        """Weights and logits of the live model."""
        both = ("--hf-model", self.hf, "--megatron-path", self.megatron)
        how = ("--tp", 2, "--pp", 2, "--device", self.args.device, "--json")
        found = json.loads(self.run(self.args.ranks, "roundtrip", *both, *how))
        self.require(found["ok"], "roundtrip")
        equal = sum(row["match"] for row in found["tensors"])
        return {"tensors": len(found["tensors"]), "equal": equal, "logits": found["logits"]}

    def generate(self) -> dict[str, Any]:
        """Greedy tokens at the seed's layout and on two ranks."""
        letters = random.Random(2)
        prompts = [
            "Hello, how are you?",
            "".join(letters.choices("abcdefghijklmnopqrstuvwxyz ", k=300)),
        ]
        asked = [part for prompt in prompts for part in ("--prompt", prompt)]
        how = ("--torch-dtype", "float32", "--max-new-tokens", 32, "--device", self.args.device)
        command = ("generate", "--megatron-path", self.megatron, *asked, *how, "--json")
        found = {}
        for name, ranks, layout in (
            ("two", 2, ("--tp", 2)),
            ("all", self.args.ranks, ("--tp", 2, "--pp", 2, "--ep", 2, "--etp", 1)),
        ):
            said = json.loads(self.run(ranks, *command, *layout))
            found[name] = {
                "ids": [row["ids"] for row in said["results"]],
                "tokens_per_second": said["timing"]["tokens_per_second"],
            }
        self.require(found["all"]["ids"] == found["two"]["ids"], "greedy tokens")
        return found

    def train(self) -> dict[str, Any]:
        """The same steps at both layouts."""
        found = {}
        for layout in self.layouts:
            found[named(layout)] = self.figures(self.steps(layout))
        first, second = (found[named(layout)]["losses"] for layout in self.layouts)
        self.require(len(first) == len(second) == self.args.steps, "steps")
        found["apart"] = apart(first, second)
        self.require(found["apart"] <= self.near, "losses of the two layouts")
        self.whole = second
        return found

    def resume(self) -> dict[str, Any]:
        """Half way at the first layout, on at the second."""
        save, half = self.args.folder / "run", self.args.steps // 2
        where = (f"checkpoint.save={save}", f"checkpoint.load={save}", "checkpoint.most_recent_k=1")
        self.steps(self.layouts[0], *where, f"train.exit_interval={half}")
        lines = self.steps(self.layouts[1], *where, "checkpoint.save=null")
        found = [line["loss"] for line in lines if "loss" in line]
        self.require(len(found) == self.args.steps - half, "steps after resuming")
        shutil.rmtree(save)
        distance = apart(found, self.whole[half:])
        self.require(distance <= self.near, "losses after resuming at another layout")
        return {"losses": found, "apart": distance}

    def wants(self, part: str) -> bool:
        """Whether to do it."""
        return part in self.args.only

    @property
    def near(self) -> float:
        """How far apart losses may be."""
        return APART["float32" if self.args.size == "tiny" else "bfloat16"]

    def steps(self, layout: tuple[int, int, int], *more: str) -> list[dict[str, Any]]:
        """Train; the lines of figures."""
        tp, pp, ep = layout
        args = self.args
        sizes = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "expert_model_parallel_size": ep,
            "sequence_parallel": str(tp > 1).lower(),
            "seq_length": args.length,
            "num_layers": args.layers or "null",
            "calculate_per_token_loss": "true",
        }
        sizes |= TINY if args.size == "tiny" else {}
        recipe = "tiny_sft_config" if args.size == "tiny" else f"gpt_oss_{args.size}_sft_config"
        words = [f"model.{name}={value}" for name, value in sizes.items()]
        words += [
            f"checkpoint.pretrained_checkpoint={self.megatron}",
            "checkpoint.save=null",
            "checkpoint.load=null",
            f"dataset.dataset_root={args.folder / 'data'}",
            f"dataset.sequence_length={args.length}",
            "dataset.val_proportion=0",
            "dataset.num_workers=0",
            f"train.train_iters={args.steps}",
            f"train.global_batch_size={args.rows}",
            "train.eval_iters=0",
            f"scheduler.lr_warmup_iters={min(5, args.steps // 2)}",
            "tokenizer.tokenizer_type=ByteLevelTokenizer",
            "tokenizer.tokenizer_model=null",
            "logger.log_interval=1",
            "logger.tensorboard_dir=null",
        ]
        if args.size != "tiny":
            words += [
                "optimizer.exp_avg_dtype=bf16",
                "optimizer.exp_avg_sq_dtype=bf16",
                "ddp.overlap_grad_reduce=true",
                "ddp.overlap_param_gather=true",
            ]
        command = ("train", "--recipe", recipe, *words, *more, "--device", args.device, "--json")
        lines: list[dict[str, Any]] = json.loads(self.run(args.ranks, *command))["lines"]
        return lines

    def figures(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """Losses; speed of the fastest step, and the most memory of any rank."""
        steps = [line for line in lines if "loss" in line]
        best = max(steps, key=lambda line: line["tokens_per_second"])
        return {
            "losses": [line["loss"] for line in steps],
            "tokens_per_second": best["tokens_per_second"] / self.args.ranks,
            "mfu": best["mfu"],
            "gigabytes": max(line["peak_bytes"] for line in steps) / 1e9,
        }


def named(layout: tuple[int, int, int]) -> str:
    """As the table has it."""
    return "tp{} pp{} ep{}".format(*layout)


def print_table(found: dict[str, Any], layouts: list[tuple[int, int, int]]) -> None:
    """A line for each layout that was trained."""
    print(f"{'':14}{'tokens/s of a GPU':>20}{'published':>12}{'MFU':>8}{'GB of a GPU':>14}")
    for layout in layouts:
        row = found["train"][named(layout)]
        rate, use = row["tokens_per_second"], row["mfu"]
        share = "" if use is None else f"{use:.1%}"
        print(
            f"{named(layout):14}{rate:20,.0f}{rate / PUBLISHED:10.2f} x{share:>8}"
            f"{row['gigabytes']:14.1f}"
        )


def main() -> int:
    """Make, run, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of all files; new or empty")
    parser.add_argument("--ranks", type=int, default=8, help="processes: 4 or 8; 2 to train")
    parser.add_argument("--size", choices=["20b", "120b", "tiny"], default="20b")
    parser.add_argument("--layers", type=int, help="of the model, if not all; even")
    parser.add_argument("--length", type=int, help="tokens of a row: 4096")
    parser.add_argument("--rows", type=int, default=32, help="of a step")
    parser.add_argument("--steps", type=int, default=20, help="of training; even")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    args = parser.parse_args()
    if "resume" in args.only and "train" not in args.only:
        parser.error("resume is compared to train: name both")
    if args.ranks == 2 and {"roundtrip", "generate"} & {*args.only}:
        parser.error("--ranks 2 is for --only convert train resume")
    require_even(parser, args, "layers", "steps")
    require_empty(parser, args.folder)
    args.length = args.length or (256 if args.size == "tiny" else 4096)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    node = Node(args)
    node.prepare()
    found: dict[str, Any] = {"convert": node.convert()}
    for part in PARTS[1:]:
        if node.wants(part):
            found[part] = getattr(node, part)()
            tell(f"{part}: {json.dumps(found[part])}")
    shutil.rmtree(args.folder)
    if "train" in found:
        print_table(found, node.layouts)
    print("\n".join(f"not met: {what}" for what in node.wrong) or "all met")
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(json.dumps({"device": where, "ranks": args.ranks, "size": args.size, **found}))
    return int(bool(node.wrong))


if __name__ == "__main__":
    sys.exit(main())
