"""Text from a full-size model on one GPU: ours beside transformers, and beside what memory allows.

    python benchmarks/bench_generate.py --config config_20b.json --device cuda
    python benchmarks/bench_generate.py --config config_20b.json --layers 2 --tiny --device cpu

Random weights, the same kind for both; each model has the GPU to itself. Decoding is timed as the
difference between a long and a short answer, so that neither prefill nor the capture of graphs counts;
prefill is one pass with the logits of the last token. ``of limit`` is decoding beside the time in which
the weights that a step needs could be copied once; a step of several sequences needs the experts that
any of them chose. The last line is JSON; the exit code is 1 if a goal is missed: 4 times transformers
in decoding, twice at 8192 tokens, no more memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptoss_convert.layout import Layout
from gptoss_convert.registry import default_registry

PROMPT, SHORT = 128, 9
BATCHES, LENGTHS = (1, 32), (2048, 8192)
DECODING, PREFILL = 4.0, 2.0  # times transformers
TINY = {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_local_experts": 8,
    "vocab_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": None,
}
Times = dict[str, float]


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    """The published config, cut to the layers asked for."""
    config: dict[str, Any] = json.loads(args.config.read_bytes())
    config.pop("quantization_config", None)
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    return {**config, **(TINY if args.tiny else {})}


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Weights of 0.02, norms of 1."""
    for name, weight in model.named_parameters():
        weight.normal_(0, 0.02)
        if "norm" in name:
            weight.fill_(1)


def seconds(action: Callable[[], object], device: str) -> float:
    """Wall time, everything on the GPU done."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.monotonic()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started


def measure(
    generate: Callable[[torch.Tensor, int], object],
    prefill: Callable[[torch.Tensor], object],
    args: argparse.Namespace,
    vocabulary: int,
) -> Times:
    """Tokens per second by case, and the peak of memory.

    Args:
        generate: prompts ``[b, s]`` and how many tokens to add.
        prefill: one pass over ``[1, s]``.
        args: the options.
        vocabulary: ids are below it.

    """
    found: Times = {}
    for batch in args.batches:
        ids = torch.randint(0, vocabulary, (batch, PROMPT), device=args.device)
        generate(ids, SHORT)
        short, long = (
            min(seconds(partial(generate, ids, n), args.device) for _ in range(args.reps))
            for n in (SHORT, SHORT + args.new)
        )
        found[f"decode, batch {batch}"] = batch * args.new / (long - short)
    for length in args.lengths:
        ids = torch.randint(0, vocabulary, (1, length), device=args.device)
        prefill(ids)
        took = min(seconds(partial(prefill, ids), args.device) for _ in range(args.reps))
        found[f"prefill, {length}"] = length / took
    if args.device == "cuda":
        found["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def free(device: str) -> None:
    """Give the GPU back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def of_transformers(config: dict[str, Any], args: argparse.Namespace) -> Times:
    """Its own model and its own ``generate``."""
    from transformers import GptOssConfig, GptOssForCausalLM

    kind = getattr(torch, args.dtype)
    torch.set_default_dtype(kind)
    with torch.device(args.device):
        settings = GptOssConfig(**{k: v for k, v in config.items() if k != "transformers_version"})
        model = GptOssForCausalLM._from_config(settings, attn_implementation="eager").eval()
    torch.set_default_dtype(torch.float32)
    fill(model)

    @torch.inference_mode()
    def generate(ids: torch.Tensor, count: int) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )

    @torch.inference_mode()
    def prefill(ids: torch.Tensor) -> None:
        model(ids, logits_to_keep=1, use_cache=False)

    return measure(generate, prefill, args, config["vocab_size"])


def of_ours(config: dict[str, Any], args: argparse.Namespace) -> Times:
    """The engine of ``gptoss-convert generate``."""
    warnings.simplefilter("ignore")  # that Transformer Engine and Apex are not installed
    from gptoss_plugins.gpt_model.live import build_live
    from gptoss_plugins.gpt_model.world import world_of
    from gptoss_plugins.infer.decoder import Decoder
    from gptoss_plugins.infer.engine import Engine

    registry = default_registry()
    fields = registry.models()["gpt-oss"].megatron_config(config)
    with world_of(Layout(), args.device, schedules=False) as place:
        live = build_live(fields, Layout(), registry, place, getattr(torch, args.dtype))
        fill(live.models[0])
        decoder = Decoder(live.models[0], fields["vocab_size"])
        engine = Engine(decoder, fields["seq_length"])

        def generate(ids: torch.Tensor, count: int) -> None:
            engine.forget()
            engine.generate(ids.tolist(), new_tokens=count)

        def prefill(ids: torch.Tensor) -> None:
            count = torch.tensor([ids.shape[1]], device=place)
            decoder.step(ids, count, decoder.cache(1, ids.shape[1]))

        return measure(generate, prefill, args, fields["vocab_size"])


def bytes_of_a_step(config: dict[str, Any], batch: int, itemsize: int) -> float:
    """Weights that a decoding step reads, on average where sequences choose experts at random."""
    hidden, width, heads = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"] * config["head_dim"],
    )
    kv = config["num_key_value_heads"] * config["head_dim"]
    attention = hidden * (heads + 2 * kv) + heads * hidden
    share = 1 - (1 - config["num_experts_per_tok"] / config["num_local_experts"]) ** batch
    experts = share * config["num_local_experts"] * 3 * hidden * width
    layer = attention + experts + hidden * config["num_local_experts"]
    return itemsize * (config["num_hidden_layers"] * layer + hidden * config["vocab_size"])


def copy_speed(device: str) -> float:
    """Bytes per second that a copy reads, and writes."""
    source = torch.empty(1 << (30 if device == "cuda" else 26), dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    took = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.nbytes / took


def main() -> int:
    """Measure both, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="a published config.json")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tiny", action="store_true", help="a small width, to try it out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--new", type=int, default=64, help="tokens that are timed")
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--only", choices=("ours", "transformers"))
    args = parser.parse_args()
    config = config_of(args)
    speed = copy_speed(args.device)
    free(args.device)
    found: dict[str, Times] = {}
    for name, run in (("transformers", of_transformers), ("ours", of_ours)):
        if args.only in (None, name):
            found[name] = run(config, args)
            print(name, {case: round(value, 1) for case, value in found[name].items()}, flush=True)
            free(args.device)
    limits = {
        f"decode, batch {b}": b
        * speed
        / bytes_of_a_step(config, b, 2 if args.dtype == "bfloat16" else 4)
        for b in args.batches
    }
    print(
        f"copy {speed / 1e9:.0f} GB/s\n{'':18}{'ours':>10}{'transformers':>14}{'ratio':>8}  of limit"
    )
    missed = False
    for case, ours in found.get("ours", {}).items():
        theirs = found.get("transformers", {}).get(case, float("nan"))
        part = f"{ours / limits[case]:.2f}" if case in limits else ""
        print(f"{case:18}{ours:10.1f}{theirs:14.1f}{ours / theirs:8.2f}  {part}")
        goal = DECODING if case in limits else PREFILL if case.endswith("8192") else 0.0
        missed |= ours > theirs if case == "peak GB" else ours < goal * theirs
    print(json.dumps({"config": str(args.config), "layers": config["num_hidden_layers"], **found}))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
