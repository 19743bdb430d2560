"""How well the hardware is used, and how evenly the experts: figures of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from gptoss_plugins.gpt_model.memory import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptoss_plugins.train.run.trainee import Trainee

# Dense bfloat16 products, TFLOP/s, by NVIDIA's data sheets (without sparsity).
PEAKS: Mapping[str, float] = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
}


def flops_per_token(fields: Mapping[str, Any], length: int) -> float:
    """Floating-point operations that learning from a token takes, those of recomputing left out.

    Six for each weight that a token meets (the embedding is looked up), and twelve for each channel
    of each head and key that it sees: products alone, forth and twice that back. Source: appendix B
    of PaLM, arXiv 2204.02311, counting here only keys that causality and windows leave.

    Args:
        fields: the model in Megatron's names.
        length: tokens of a sequence.

    """
    hidden, layers = fields["hidden_size"], fields["num_layers"]
    queries = fields["num_attention_heads"] * fields["kv_channels"]
    both = 2 * fields["num_query_groups"] * fields["kv_channels"]
    inner = fields.get("moe_ffn_hidden_size") or fields["ffn_hidden_size"]
    attention = hidden * (queries + both) + queries * hidden
    experts = fields["num_moe_experts"] * hidden + fields["moe_router_topk"] * 3 * hidden * inner
    weights = layers * (attention + experts) + fields["vocab_size"] * hidden
    everything = (length + 1) / 2
    window = min(length, (fields["window_size"] or (length - 1,))[0] + 1)
    near = window - window * (window - 1) / (2 * length)
    keys = (layers + 1) // 2 * near + layers // 2 * everything  # the first has a window
    return float(6 * weights + 12 * queries * keys)


def utilization(rate: float, fields: Mapping[str, Any], length: int) -> dict[str, float | None]:
    """TFLOP/s of each device, and of what it can do at most (MFU); None where that is not known.

    Args:
        rate: tokens per second of all ranks.
        fields: the model in Megatron's names.
        length: tokens of a sequence.

    """
    done = rate * flops_per_token(fields, length) / dist.get_world_size() / 1e12
    most = peak()
    return {"tflops": done, "mfu": done / most if most else None}


def peak() -> float | None:
    """What this machine's GPU can do, TFLOP/s; None where that is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((most for part, most in PEAKS.items() if part in name), None)


def most_memory(place: torch.device) -> int:
    """Bytes that the rank with the most has used so far. All ranks call this together."""
    most = torch.tensor(peak_bytes(place), device=place)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def expert_load(trainee: Trainee) -> dict[str, float]:
    """The busiest and the idlest expert of any layer, as a multiple of the layer's mean.

    Counts from here on anew. All ranks call this together.
    """
    loads = []
    for model in trainee.live.models:
        for layer in model.decoder.layers:
            experts = layer.mlp.experts
            loads.append(experts.load.to(trainee.live.place).double())
            experts.load = None
    rows = torch.stack(loads)
    dist.all_reduce(rows, group=parallel_state.get_expert_data_parallel_group())
    ranks = [
        torch.empty_like(rows) for _ in range(parallel_state.get_expert_model_parallel_world_size())
    ]
    dist.all_gather(ranks, rows, group=parallel_state.get_expert_model_parallel_group())
    every = torch.cat(ranks, 1)
    relative = every / every.mean(1, keepdim=True).clamp(min=1e-9)
    ends = torch.stack([relative.max(), -relative.min()])
    stages = parallel_state.get_pipeline_model_parallel_group()
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=stages)
    return {"expert_load_max": float(ends[0]), "expert_load_min": float(-ends[1])}
