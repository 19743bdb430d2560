"""Random weights that are the same in every layout: each tensor has random numbers of its own.

megatron-core draws a rank's weights one after the other, so which numbers a weight gets depends on the
stages and, of experts, on the ranks. Here a weight's name decides.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from gptoss_convert.layout import EXPERT_AXIS
from gptoss_convert.plan import parameters
from gptoss_plugins import gptoss

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from gptoss_convert.layout import Parameter, Piece
    from gptoss_plugins.gpt_model.live import LiveModel

STD = 0.02  # GPT-OSS's initializer_range
_SCALED = ("linear_proj.weight", "linear_fc2.weight")  # what is added to the residual stream


@torch.no_grad()
def draw(live: LiveModel, config: Mapping[str, Any], seed: int) -> None:
    """Fill this rank's part of a model, as Megatron initializes: normal, biases 0, norms 1.

    What goes into the residual stream has a deviation smaller by the root of twice the layers.

    Args:
        live: the model.
        config: of it, Hugging Face's.
        seed: of all weights.

    """
    for model in live.models:
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "layernorm" in name else 0.0)  # biases, and a padded vocabulary
    (family,) = gptoss.gptoss_convert_models()
    for name, parameter in parameters(family, config, "the recipe").items():
        kind = name.removesuffix(EXPERT_AXIS)
        if kind.endswith(("layernorm.weight", "layer_norm_weight", "bias")):
            continue
        if (piece := live.mine(parameter)) is not None:
            std = STD / (2 * live.layers) ** 0.5 if kind.endswith(_SCALED) else STD
            _draw(live, name, parameter, piece, std, seed)


def _draw(
    live: LiveModel, name: str, parameter: Parameter, piece: Piece, std: float, seed: int
) -> None:
    if not parameter.has_experts:
        live.fill(parameter, piece, _normal(name, parameter.shape, std, seed, live.place))
        return
    for start, stop in piece.box[0]:
        for expert in range(start, stop):
            rows = _normal(f"{name} {expert}", parameter.shape[1:], std, seed, live.place)
            live.fill(parameter, piece, rows[None], expert)


def _normal(
    name: str, shape: tuple[int, ...], std: float, seed: int, device: torch.device
) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator, device=device).mul_(std)
