"""Process groups and random numbers, over NCCL on GPUs and over gloo elsewhere."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.random import initialize_rng_tracker


def initialize_parallel(
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    *,
    vpp: int | None = None,
    cp: int = 1,
    device: torch.device | str | None = None,
    seed: int = 1234,
) -> torch.device:
    """Join the other ranks and set up Megatron's groups; experts are cut by EP only.

    Without torchrun's variables this is a world of one process, which needs no port.

    Args:
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        ep: expert-parallel ranks; they are taken from the data-parallel and tensor-parallel ones.
        vpp: virtual pipeline chunks per stage.
        cp: context-parallel ranks, which share each sequence.
        device: "cpu" or "cuda"; by default CUDA where there is one.
        seed: of the initial weights; pipeline stages differ by 100, other ranks are alike.

    Returns:
        This rank's device.

    """
    place = _join_world(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,  # megatron-core: experts with biases cannot be cut
    )
    _seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank(), place)
    return place


def shut_down_parallel() -> None:
    """Undo ``initialize_parallel``."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join_world(device: torch.device) -> torch.device:
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in the stubs
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return device


def _seed(seed: int, device: torch.device) -> None:
    """Megatron keeps a CUDA generator per kind of parallelism; CPUs get its do-nothing stand-in.

    That is enough: GPT-OSS has no dropout, and on CPUs Megatron draws whole weights and cuts them.
    """
    torch.manual_seed(seed)
    if device.type == "cuda":
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    else:
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
