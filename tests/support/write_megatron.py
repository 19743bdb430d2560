"""Write checkpoints with megatron-core's own code, from the values of a Hugging Face checkpoint.

Run by torchrun (or alone), on CPUs; PYTHONPATH may name another megatron-core. ``--spec ours`` is
gptoss_plugins.gpt_model, ``stock-local`` megatron-core's own layer spec with experts one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from load_and_compare import stock_model
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import torch as strategies

from gptoss_plugins.gpt_model.build import build_gpt_model, initialize_parallel, load_checkpoint
from gptoss_plugins.gpt_model.cpu_shim import cuda_means_cpu
from gptoss_plugins.gptoss import megatron_config


class PlainSave(strategies.TorchDistSaveShardedStrategy):
    """megatron-core's strategy with torch's plain file writer, as its own needs CUDA."""

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        named, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        dcp.save(
            strategies.mcore_to_pyt_state_dict(named, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, thread_count=1),
            planner=strategies.MCoreSavePlanner(
                dedup_replicated_tensors=False, flatten_state_dict=False
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="torch_dist folder")
    parser.add_argument("--config", type=Path, required=True, help="Hugging Face's config.json")
    parser.add_argument("--to", type=Path, required=True, help="iteration folder")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--spec", choices=("ours", "stock-local"), default="ours")
    parser.add_argument("--per-layer", action="store_true")
    parser.add_argument("--vocab", type=int, help="rows of the vocabulary, padding included")
    parser.add_argument("--optimizer", action="store_true", help="momenta beside the weights")
    parser.add_argument("--args", action="store_true", help="keep Megatron-LM's args")
    arguments = parser.parse_args()
    with cuda_means_cpu():
        write(arguments)


def write(arguments: argparse.Namespace) -> None:
    """Build, fill, save."""
    initialize_parallel(arguments.tp, arguments.pp, arguments.ep, device="cpu")
    config = json.loads(arguments.config.read_text())
    fields = megatron_config(config)
    if arguments.vocab:
        fields["vocab_size"] = arguments.vocab
    content: dict[str, Any] = {"singleton_local_shards": False}
    if arguments.per_layer:
        content["non_homogeneous_layers"] = True
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**content, "dp_cp_group": replicas}
    if arguments.spec == "ours":
        model: Any = build_gpt_model(fields)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        load_checkpoint(model, arguments.source)
    else:
        model = stock_model(fields, torch.bfloat16)
        stored = dist_checkpointing.load_content_metadata(str(arguments.source)) or {}
        wanted = model.sharded_state_dict(metadata={**stored, "dp_cp_group": replicas})
        loaded = dist_checkpointing.load({"model": wanted}, str(arguments.source))["model"]
        model.load_state_dict(loaded, strict=True)
    state: dict[str, Any] = dict(model.sharded_state_dict(metadata=metadata))
    if arguments.optimizer:
        state |= momenta(model, metadata)
    state |= {"checkpoint_version": 3.0, "iteration": 7}
    if arguments.args:
        state["args"] = argparse.Namespace(
            **{
                **fields,
                "window_size": tuple(fields["window_size"]),
                "vocab_size": config["vocab_size"],
            },
            padded_vocab_size=fields["vocab_size"],
            num_experts=fields["num_moe_experts"],
            max_position_embeddings=fields["seq_length"],
            norm_epsilon=fields["layernorm_epsilon"],
            rotary_scaling_factor=fields["yarn_rotary_scaling_factor"],
            untie_embeddings_and_output_weights=True,
            params_dtype=torch.bfloat16,
        )
    if dist.get_rank() == 0:
        arguments.to.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(
        state,
        str(arguments.to),
        sharded_strategy=PlainSave("torch_dist", 1),
        content_metadata=content,
    )
    if dist.get_rank() == 0:
        print(json.dumps(sorted(path.name for path in arguments.to.iterdir())))
    dist.barrier()


def momenta(model: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """What a plain optimizer keeps, under the keys that megatron-core gives it."""
    kept = {}
    for name, shard in model.sharded_state_dict(metadata=metadata).items():
        if isinstance(shard, ShardedObject) or not hasattr(shard, "data"):
            continue
        shard.data = (shard.data.float() * 0.5).clone()
        shard.dtype = torch.float32
        shard.key = f"optimizer.state.exp_avg.{shard.key}"
        kept[f"momentum.{name}"] = shard
    return kept


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
    sys.exit()
