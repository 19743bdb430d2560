"""Two models' logits of one prompt: how far apart they are, position by position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from gptoss_convert.errors import ConvertError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the relative error


def prompt(vocabulary: int, length: int, seed: int = 1) -> Tensor:
    """Token ids ``[1, length]``, drawn at random but the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (1, length), generator=generator)


@torch.no_grad()
def hugging_face_logits(
    folder: Path,
    ids: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantized: bool = False,
    trust_remote_code: bool = False,
) -> Tensor:
    """What transformers' own model makes of a prompt, float32 ``[tokens, vocabulary]`` on the CPU.

    Args:
        folder: a Hugging Face checkpoint; safetensors only.
        ids: ``[1, tokens]``.
        dtype: of the computation.
        device: where to compute.
        quantized: whether the checkpoint is in MXFP4, which is decoded when it is loaded.
        trust_remote_code: run code that lies in the checkpoint; transformers' own by default.

    """
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

    more = {"quantization_config": Mxfp4Config(dequantize=True)} if quantized else {}
    where = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **where)
        if (config.pad_token_id or 0) >= config.vocab_size:  # a vocabulary cut short, to try things out
            config.pad_token_id = None
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            **where,
            **more,
        )
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ConvertError(
            f"{folder}: transformers does not load it ({reason}); mend the checkpoint, or leave the "
            f"logits out"
        ) from error
    model = model.to(device=device, dtype=dtype).eval()
    made: Tensor = model(ids.to(device)).logits[0].float().cpu()
    return made


def compare_logits(first: Tensor, second: Tensor) -> dict[str, Any]:
    """How far the second is from the first, both float32 ``[tokens, vocabulary]``.

    Returns:
        relative error (L2) in all and per position, largest and median absolute error, cosine,
        KL divergence in nats (first from second, mean and largest over positions), and the share
        of positions with the same most likely token.

    """
    one, two = first.double(), second.double()
    error = two - one
    per_position = error.norm(dim=1) / one.norm(dim=1)
    kl = (one.softmax(1) * (one.log_softmax(1) - two.log_softmax(1))).sum(1)
    return {
        "positions": len(one),
        "relative_error": float(error.norm() / one.norm()),
        "max_error": float(error.abs().max()),
        "median_error": float(error.abs().median()),
        "cosine": float((one * two).sum() / one.norm() / two.norm()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "argmax_agreement": float((one.argmax(1) == two.argmax(1)).double().mean()),
        "relative_error_by_position": [_plain(x) for x in per_position.tolist()],
        "kl_by_position": [_plain(x) for x in kl.tolist()],
    }


def _plain(number: float) -> float | None:
    return number if math.isfinite(number) else None
