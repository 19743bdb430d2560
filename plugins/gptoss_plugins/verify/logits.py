"""Two models' logits of one prompt: how far apart they are, position by position."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

import torch

from gptoss_convert.compare import finite
from gptoss_convert.dtypes import from_torch_name, torch_dtype
from gptoss_convert.errors import ConvertError
from gptoss_convert.layout import Layout
from gptoss_convert.types import Finding
from gptoss_plugins.adapter.merging import MergedSource

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.logical import Logical
    from gptoss_convert.registry import Registry
    from gptoss_plugins.verify.checking import Report

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the relative error


def precision(dtype: str | None, device: str | None) -> torch.dtype:
    """The type that the user named, or else what fits the device: bfloat16 on a GPU."""
    on_gpu = device == "cuda" or (device is None and torch.cuda.is_available())
    return torch_dtype(from_torch_name(dtype or ("bfloat16" if on_gpu else "float32")))


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
    experts: str | None = None,
) -> Tensor:
    """What transformers' own model makes of a prompt, float32 ``[tokens, vocabulary]`` on the CPU.

    Args:
        folder: a Hugging Face checkpoint; safetensors only.
        ids: ``[1, tokens]``.
        dtype: of the computation.
        device: where to compute.
        quantized: whether the checkpoint is in MXFP4, which is decoded when it is loaded.
        experts: which of transformers' implementations of the experts; its own choice by default.

    """
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config, utils

    utils.logging.disable_progress_bar()
    utils.logging.set_verbosity_error()  # what it warns of is looked at by verify itself
    more: dict[str, Any] = {}
    if quantized:
        more["quantization_config"] = Mxfp4Config(dequantize=True)
    where = {"trust_remote_code": False, "local_files_only": True}  # no code of the folder is run
    try:
        config = AutoConfig.from_pretrained(folder, **where)
        if (
            config.pad_token_id or 0
        ) >= config.vocab_size:  # a vocabulary cut short, to try things out
            config.pad_token_id = None
        if torch.device(device).type != "cpu":
            more["device_map"] = str(device)  # decoded there, and never whole on the host
        if experts:
            more["experts_implementation"] = experts
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


def logits_of(
    of: Logical,
    ids: Tensor,
    registry: Registry,
    *,
    dtype: torch.dtype,
    device: str | None = None,
) -> Tensor:
    """A checkpoint's logits: transformers' model for Hugging Face's, GPTModel for Megatron's, and for any
    that has an adapter added.

    Args:
        of: the checkpoint.
        ids: ``[1, tokens]``.
        registry: the plugins.
        dtype: of the computation.
        device: ``cpu`` or ``cuda``; CUDA where there is one.

    Returns:
        float32 ``[tokens, vocabulary]`` on the CPU.

    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if of.side == "hf" and not isinstance(of.source, MergedSource):
        return hugging_face_logits(
            of.source.path,
            ids,
            dtype=dtype,
            device=place,
            quantized=of.codec is not None,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Transformer Engine and Apex are not installed
        from gptoss_plugins.gpt_model.filling import load_by_megatron
        from gptoss_plugins.gpt_model.forward import logits
        from gptoss_plugins.gpt_model.live import build_live
        from gptoss_plugins.gpt_model.world import world_of

    alone = Layout()
    with world_of(alone, place) as here:
        live = build_live(of.fields, alone, registry, here, dtype)
        load_by_megatron(live, of)
        made = logits(live.models, ids.to(here))
        assert made is not None
        return made[0, :, : of.fields["vocab_size"]].float().cpu()


def check_logits(
    first: Logical,
    second: Logical,
    report: Report,
    registry: Registry,
    *,
    length: int,
    dtype: str | None,
    device: str | None,
    limit: float | None,
) -> None:
    """Run both models one after the other, and add to a report how far apart they are."""
    if any(one.problems for one in (first, second)):
        return  # no model could be built, and the report says why
    if first.fields["vocab_size"] != second.fields["vocab_size"]:
        return  # likewise, why logits cannot be compared
    kind = precision(dtype, device)
    started = time.monotonic()
    ids = prompt(min(one.fields["vocab_size"] for one in (first, second)), length)
    try:
        made = [logits_of(one, ids, registry, dtype=kind, device=device) for one in (first, second)]
    except ConvertError as error:
        report.take("logits", error)
        return
    most = LIMITS[kind] if limit is None else limit
    found = compare_logits(*made)
    report.logits = {"dtype": str(kind).removeprefix("torch."), "limit": most, **found}
    if not found["relative_error"] <= most:
        report.findings.append(
            Finding(
                "error",
                "logits",
                f"differ by a relative error of {found['relative_error']:.3g} on {length} tokens, and "
                f"have the same most likely token at {found['argmax_agreement']:.1%} of them",
                "the models compute different things; see which tensors or fields differ",
            )
        )
    report.seconds += time.monotonic() - started


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
        "relative_error_by_position": [finite(x) for x in per_position.tolist()],
        "kl_by_position": [finite(x) for x in kl.tolist()],
    }
