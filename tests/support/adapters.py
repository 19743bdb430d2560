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
