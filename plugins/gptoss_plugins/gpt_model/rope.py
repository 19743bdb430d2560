"""YaRN rotary frequencies on whatever device the model lives.

Sources: YaRN, arXiv 2309.00071, sections 3.2 to 3.4; the same numbers as transformers'
``_compute_yarn_parameters`` and megatron-core's ``YarnRotaryEmbedding``, which insists on CUDA.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

if TYPE_CHECKING:
    from gptoss_plugins.gpt_model.config import GptOssConfig


def _dim_of(turns: float, config: GptOssConfig) -> float:
    """The (fractional) frequency index that makes ``turns`` turns within the original length."""
    length = config.yarn_original_max_position_embeddings / (turns * 2 * math.pi)
    return float(config.kv_channels * math.log(length) / (2 * math.log(config.rotary_base)))


def _ramp_bounds(config: GptOssConfig) -> tuple[float, float]:
    """Indices between which frequencies go from untouched to fully interpolated."""
    low, high = _dim_of(config.yarn_beta_fast, config), _dim_of(config.yarn_beta_slow, config)
    if config.yarn_correction_range_round_to_int:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, config.kv_channels - 1.0)
    return low, high if high != low else high + 0.001


def yarn_frequencies(config: GptOssConfig) -> Tensor:
    """Radians per position: float32 ``[kv_channels / 2]``, on the CPU."""
    dim = config.kv_channels
    wavelength: Tensor = config.rotary_base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    low, high = _ramp_bounds(config)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    stretched = (config.yarn_rotary_scaling_factor * wavelength).reciprocal()
    return stretched * ramp + wavelength.reciprocal() * (1 - ramp)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def concentration(config: GptOssConfig) -> float:
    """Factor on cos and sin. megatron-core's attention applies it, from the same fields."""
    factor = config.yarn_rotary_scaling_factor
    if config.yarn_mscale is None or config.yarn_mscale_all_dim is None:
        return _mscale(factor, 1.0)
    return _mscale(factor, config.yarn_mscale) / _mscale(factor, config.yarn_mscale_all_dim)


class YarnRope(RotaryEmbedding):  # type: ignore[misc]  # megatron-core is untyped
    """Stands where GPTModel expects its ``YarnRotaryEmbedding``.

    The frequencies are no buffer, because ``model.bfloat16()`` would round a buffer's positions
    away; an empty buffer tells on which device the model lives.

    Attributes:
        positions: int64 ``[b, s]``, those that the model's next pass is at, if they are not
            0, 1, 2 and so on.

    """

    def __init__(self, config: GptOssConfig, cp_group: Any = None) -> None:
        super().__init__(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=config.rotary_base,
            use_cpu_initialization=True,
            cp_group=cp_group,
        )
        self.inv_freq = yarn_frequencies(config)
        self.concentration = concentration(config)
        self.register_buffer("anchor", torch.empty(0), persistent=False)
        self.positions: Tensor | None = None

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: Any = None,
    ) -> tuple[Tensor, float]:
        """Angles float32 ``[s, b or 1, 1, kv_channels]`` (both halves alike), and factor.

        Args:
            max_seq_len: s, where no positions are set.
            offset: the first position then.
            packed_seq: means nothing here; it and the next are the parent's.
            cp_group: likewise.

        """
        if self.inv_freq.device != self.anchor.device:
            self.inv_freq = self.inv_freq.to(self.anchor.device)
        if self.positions is None:
            steps = torch.arange(max_seq_len, device=self.anchor.device)[:, None] + offset
        else:
            steps = self.positions.T
        angles = steps.float().unsqueeze(-1) * self.inv_freq
        return torch.cat((angles, angles), dim=-1).unsqueeze(2), self.concentration
