"""Adapters made by PEFT itself, which is what ours are judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PROMPT = torch.tensor([[3, 77, 21, 130, 5, 64, 9, 12, 101, 33, 2, 88, 19]])


def with_adapter(model: Any, seed: int = 5, **options: Any) -> Any:
    """A model wrapped by PEFT, with an adapter whose A and B are both drawn at random."""
    from peft import LoraConfig, get_peft_model

    fields = {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, "target_parameters": EXPERTS}
    wrapped = get_peft_model(model, LoraConfig(**fields | options))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=noise))
    return wrapped.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(PROMPT).logits[0]
    return found


def load_onto(model: Any, folder: Path) -> Any:
    """PEFT loads an adapter's folder."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def alike(folder: Path, kind: str) -> None:
    """Give the modules q, k and v one A, or all experts one adapter."""
    from safetensors.torch import save_file

    found = tensors(folder)
    for name in found:
        if kind == "one A" and (".k_proj.lora_A" in name or ".v_proj.lora_A" in name):
            first = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
            found[name] = found[first].clone()
        if kind == "shared" and ".experts." in name:
            dim, experts = (0, 8) if "lora_A" in name else (1, 8)
            if dim == 0:
                one = found[name].unflatten(0, (experts, -1))[:1]
                found[name] = one.expand(experts, -1, -1).reshape(found[name].shape).contiguous()
            else:
                one = found[name].unflatten(1, (-1, experts))[..., :1]
                found[name] = one.expand(-1, -1, experts).reshape(found[name].shape).contiguous()
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
