"""A model of full size in transformers and in megatron-core: how far apart, beside transformers' own noise.

    python benchmarks/bench_logits.py --config config_20b.json --folder /dev/shm/calm --device cuda
    python benchmarks/bench_logits.py --config config_20b.json --layers 2 --dtype float32 --folder ...

Makes a checkpoint of random weights in MXFP4, imports it, and runs one prompt through transformers with
each of its implementations of the experts, and through GPTModel. Random weights of one size make a
model that is chaotic in bfloat16; these are calm: embeddings of 1, what adds to the residual stream
of 0.002, the rest of 0.02. Errors are absolute, over all logits. ``ok`` is false, and the exit code 1,
if the median error is more than 1.5 times the noise, or in float32 the relative error is 1e-5 or more.
The last line is JSON. 20B takes 56 GB in the folder and as much memory of the GPU as the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss_convert.convert import import_checkpoint
from gptoss_convert.logical import open_logical
from gptoss_convert.opening import Choice
from gptoss_convert.registry import default_registry
from gptoss_convert.testing import hf_specs, write_hf_folder
from gptoss_kernels import mxfp4
from gptoss_plugins.verify.logits import compare_logits, hugging_face_logits, logits_of, prompt

NOISE, NEAR = 1.5, 1e-5
CALM = {"embed_tokens.weight": 1.0, "o_proj.weight": 0.002, "down_proj": 0.002, "": 0.02}


def make(
    folder: Path, config: dict[str, Any], place: str, sizes: Mapping[str, float] = CALM
) -> None:
    """Write the checkpoint; ``sizes`` are standard deviations by how names end, the first that fits."""
    family = default_registry().models()["gpt-oss"]
    tensors: dict[str, Tensor] = {}
    for number, (name, spec) in enumerate(hf_specs(family, config).items()):
        noise = torch.Generator(place).manual_seed(number)
        std = next(size for end, size in sizes.items() if name.endswith(end))
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, width, rows = spec.shape
            shape = (experts, rows, width)
            weight = torch.randn(shape, generator=noise, device=place, dtype=torch.bfloat16) * std
            made = mxfp4.encode(weight)
            tensors |= {name + "_blocks": made.blocks.cpu(), name + "_scales": made.scales.cpu()}
            continue
        values = torch.randn(spec.shape, generator=noise, device=place) * std
        if "norm" in name:
            values += 1
        tensors[name] = values.bfloat16().cpu()
    write_hf_folder(folder, config, tensors, shards=min(8, len(tensors)), files={})


def main() -> int:
    """Make, import, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="a published config.json")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=300)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    config = json.loads(args.config.read_bytes())
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    hf, megatron = args.folder / "hf", args.folder / "megatron"
    shutil.rmtree(args.folder, ignore_errors=True)
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {what}", flush=True)

    make(hf, config, args.device)
    tell("made")
    import_checkpoint(hf, megatron, device=args.device)
    tell("imported")
    ids = prompt(config["vocab_size"], args.tokens)
    theirs = {}
    for experts in ("eager", "grouped_mm"):
        theirs[experts] = hugging_face_logits(
            hf, ids, dtype=dtype, device=args.device, quantized=True, experts=experts
        )
        free(args.device)
        tell(f"transformers, experts {experts}")
    registry = default_registry()
    checkpoint = open_logical(megatron, registry, Choice())
    ours = logits_of(checkpoint, ids, registry, dtype=dtype, device=args.device)
    tell("megatron-core")
    noise = compare_logits(theirs["eager"], theirs["grouped_mm"])
    errors = {name: compare_logits(reference, ours) for name, reference in theirs.items()}
    best = min(errors.values(), key=lambda found: found["median_error"])
    share = best["median_error"] / noise["median_error"] if noise["median_error"] else None
    share = 0.0 if best["median_error"] == 0 else share
    is_near = best["relative_error"] < NEAR
    ok = is_near if dtype == torch.float32 else is_near or (share is not None and share <= NOISE)
    rows = {"transformers, grouped against eager": noise}
    rows |= {f"megatron-core against transformers, {name}": e for name, e in errors.items()}
    for name, found in rows.items():
        print(
            f"{name:45} median {found['median_error']:.2e}, largest {found['max_error']:.2e}, relative "
            f"{found['relative_error']:.2e}, same most likely token {found['argmax_agreement']:.1%}"
        )
    facts = {k: {n: v for n, v in f.items() if not isinstance(v, list)} for k, f in rows.items()}
    where = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    told = {"layers": config["num_hidden_layers"], "dtype": args.dtype, "device": where}
    print(json.dumps({**told, "of_noise": share, "ok": ok, "results": facts}))
    shutil.rmtree(args.folder)
    return 0 if ok else 1


def free(device: str) -> None:
    """Give a model's memory back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
