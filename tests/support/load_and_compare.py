"""Load a torch_dist checkpoint at some parallel layout and hold it against Hugging Face's.

Run by torchrun, on CPUs (or, with ``--device cuda``, on as many GPUs):

    torchrun --nproc_per_node=4 load_and_compare.py --checkpoint ROOT/iter_0000000 \\
        --hf-model HF --tp 2 --pp 2 --ep 1

``--spec ours`` builds gptoss_plugins.gpt_model, loads strictly, checks every parameter against the
safetensors, and compares the logits of a prompt with transformers'. ``--spec stock-local`` does all
but the logits with megatron-core's own layer spec, which must be able to read the file though it
cannot run GPT-OSS everywhere. Prints one JSON line and exits with 1 if something differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors.torch import load_file
from tiny_gptoss import difference, megatron_fields, megatron_tensors, prompt
from torch import Tensor

from gptoss_plugins.gpt_model.build import (
    build_gpt_model,
    initialize_parallel,
    load_checkpoint,
)
from gptoss_plugins.gpt_model.config import make_config
from gptoss_plugins.gpt_model.cpu_shim import cuda_means_cpu
from gptoss_plugins.gpt_model.forward import logits

SECOND_NAMES = {"mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--hf-model", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=float, default=1e-5, help="relative L2; for float32")
    parser.add_argument("--prompt-length", type=int, default=300)
    parser.add_argument("--spec", choices=("ours", "stock-local"), default="ours")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dispatcher", default="allgather", help="alltoall needs CUDA")
    parser.add_argument("--run-config", action="store_true", help="take the sizes from the import")
    return parser.parse_args()


def stock_model(fields: dict[str, Any], dtype: torch.dtype) -> GPTModel:
    """GPTModel with megatron-core's local layer spec, experts one by one."""
    config = make_config(fields, dtype=dtype, device=torch.device("cpu"))
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    return GPTModel(
        config,
        transformer_layer_spec=spec,
        vocab_size=config.vocab_size,
        max_sequence_length=config.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="yarn",
    ).to(dtype)


def shards(model: GPTModel, folder: Path) -> dict[str, Any]:
    stored = dist_checkpointing.load_content_metadata(str(folder)) or {}
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={**stored, "dp_cp_group": replicas})


def load_as_megatron_does(model: GPTModel, folder: Path) -> None:
    """Everything the model asks for, extra states included, must be there."""
    loaded = dist_checkpointing.load({"model": shards(model, folder)}, str(folder))
    model.load_state_dict(loaded["model"], strict=True)


def expected(whole: dict[str, Tensor], key: str) -> Tensor:
    """The whole tensor under a checkpoint key; the layer is an axis, or in the name."""
    for theirs, ours in SECOND_NAMES.items():
        key = key.replace(theirs, ours)
    if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key):
        return whole[f"decoder.layers.{match[2]}"][int(match[1])]
    return whole[key]


def check_parameters(model: GPTModel, folder: Path, whole: dict[str, Tensor]) -> dict[str, Any]:
    """How many pieces this rank holds, and those that are not bit-equal to their part."""
    pieces = shards(model, folder)
    apply_factories(pieces)
    held = [p for v in pieces.values() for p in (v if isinstance(v, list) else [v])]
    held = [piece for piece in held if isinstance(piece, ShardedTensor)]
    wrong = []
    for piece in held:
        part = expected(whole, piece.key)[piece.global_slice()]
        if not torch.equal(part.to(piece.data.dtype), piece.data.cpu()):
            wrong.append(f"{piece.key} at {piece.global_offset}")
    return {"pieces": len(held), "unequal": wrong}


def examine(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What this rank finds: pieces, unequal ones, logits."""
    config = json.loads((args.hf_model / "config.json").read_text())
    fields, dtype = megatron_fields(config), getattr(torch, args.dtype)
    if args.run_config:
        fields = yaml.safe_load((args.checkpoint / "run_config.yaml").read_text())["model"]
    if args.spec == "stock-local":
        model = stock_model(fields, dtype)
        load_as_megatron_does(model, args.checkpoint)
    else:
        model = build_gpt_model(
            fields,
            dtype=dtype,
            device=device,
            sequence_parallel=args.sequence_parallel,
            overrides={"moe_token_dispatcher_type": args.dispatcher},
        )
        load_checkpoint(model, args.checkpoint)
    state = {
        k: v for file in args.hf_model.glob("*.safetensors") for k, v in load_file(file).items()
    }
    result = check_parameters(model, args.checkpoint, megatron_tensors(config, state))
    if args.spec == "stock-local":
        return result | {"logits": None}
    ids = prompt(config["vocab_size"], args.prompt_length).to(device)
    made = logits([model], ids)
    return result | {"logits": None if made is None else made.cpu()}


def reference(args: argparse.Namespace) -> Tensor:
    """transformers' logits of the same prompt, float32 and eager."""
    from transformers import GptOssForCausalLM

    hf = GptOssForCausalLM.from_pretrained(
        args.hf_model, dtype=torch.float32, attn_implementation="eager"
    )
    return hf.eval()(prompt(hf.config.vocab_size, args.prompt_length)).logits


def verdict(args: argparse.Namespace, findings: list[dict[str, Any]]) -> dict[str, Any]:
    """All ranks' findings in one; the logits are those furthest from the reference."""
    result: dict[str, Any] = {
        "pieces": sum(found["pieces"] for found in findings),
        "unequal": [name for found in findings for name in found["unequal"]][:20],
    }
    if any(found["logits"] is not None for found in findings):
        theirs = reference(args)
        ours = [found["logits"].float() for found in findings if found["logits"] is not None]
        result |= max((difference(x, theirs) for x in ours), key=lambda d: d["rel_l2"])
    return result


def main() -> int:
    args = arguments()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    device = initialize_parallel(args.tp, args.pp, args.ep, device=args.device)
    needs_cuda = dist.get_world_size() > 1 or args.spec == "stock-local"
    shim = cuda_means_cpu if needs_cuda and device.type == "cpu" else contextlib.nullcontext
    with shim():
        mine = examine(args, device)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank != 0:
        return 0
    result = verdict(args, everyone)
    print(json.dumps(result), flush=True)
    return 1 if result["unequal"] or result.get("rel_l2", 0.0) >= args.limit else 0


if __name__ == "__main__":
    sys.exit(main())
