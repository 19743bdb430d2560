"""Build the model of this rank.

::

    device = initialize_parallel(tp=2, pp=1, ep=2)
    model = build_gpt_model(fields, dtype=torch.bfloat16, device=device)
    load_checkpoint(model, "models/gpt-oss-20b/iter_0000000")
    logits = model(ids, positions, None)  # [batch, tokens, vocabulary]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)

from gptoss_plugins.gpt_model.config import GptOssConfig, make_config
from gptoss_plugins.gpt_model.dialects import rename_norms
from gptoss_plugins.gpt_model.load import load_checkpoint
from gptoss_plugins.gpt_model.loss import weighted_loss
from gptoss_plugins.gpt_model.parallel import initialize_parallel, shut_down_parallel
from gptoss_plugins.gpt_model.rope import YarnRope
from gptoss_plugins.gpt_model.spec import block_spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = [
    "GptOssModel",
    "build_gpt_model",
    "initialize_parallel",
    "load_checkpoint",
    "shut_down_parallel",
]


_CUTS = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
}


class GptOssModel(GPTModel):  # type: ignore[misc]  # megatron-core is untyped
    """GPTModel with device-neutral positions; names of parameters are GPTModel's."""

    def __init__(self, config: GptOssConfig, **options: Any) -> None:
        # "none", so that GPTModel does not build its own YaRN tables, which asks for CUDA.
        super().__init__(config=config, position_embedding_type="none", **options)
        self.position_embedding_type = "yarn"
        self.rotary_pos_emb = YarnRope(config, cp_group=self.pg_collection.cp)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Any, **options: Any
    ) -> Tensor:
        """Logits ``[b, s, v]``, or the loss; hidden states before the last pipeline stage.

        Args:
            input_ids: int64 ``[b, s]``.
            position_ids: int64 ``[b, s]``.
            attention_mask: as ``SinkAttention`` takes it.
            options: GPTModel's. With ``labels`` (int64 ``[b, s]``) alone, losses float32 ``[b, s]``;
                with ``loss_mask`` (float32 ``[b, s]``, weights), too, the weighted sum of them: a
                float32 scalar, for which no rank ever has all logits.

        """
        cached = options.get("inference_context") is not None
        self.rotary_pos_emb.positions = None if cached else position_ids
        found: Tensor = super().forward(input_ids, position_ids, attention_mask, **options)
        return found

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Any = None, loss_mask: Any = None, **options: Any
    ) -> Tensor:
        if not self.post_process or labels is None or loss_mask is None:
            made: Tensor = super()._postprocess(
                hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **options
            )
            return made
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            whole = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        return weighted_loss(
            whole.flatten(0, 1),
            self._output_weight(),
            labels.T.flatten(),
            loss_mask.T.flatten(),
            group,
        )

    def _output_weight(self) -> Tensor:
        """Of the output layer, which is not called: megatron-core waits in its hook for the weights that
        an overlapped gather still brings.
        """
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        shared = self.share_embeddings_and_output_weights
        found: Tensor = (
            self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        )
        return found

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """States of Transformer Engine's modules load too."""
        rename_norms(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def build_gpt_model(
    megatron_config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    sequence_parallel: bool = False,
    parallel_output: bool = False,
    random_weights: bool = False,
    vp_stage: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> GptOssModel:
    """Build this rank's part of GPT-OSS, in the layout that ``initialize_parallel`` set up.

    Args:
        megatron_config: Megatron names -> plain values; see ``config.py`` for which count.
        dtype: of the parameters.
        device: where they live; what ``initialize_parallel`` returned.
        sequence_parallel: split activations along the sequence; training needs it if TP > 1.
        parallel_output: leave the logits cut along the vocabulary (for Megatron's loss).
        random_weights: draw initial weights; otherwise they are undefined until a load.
        vp_stage: which chunk of a virtual pipeline to build.
        overrides: further TransformerConfig fields, set last.

    Raises:
        gptoss_convert.errors.ConfigError: a field is missing, unsupported or does not divide.

    """
    device = torch.device(device)
    config = make_config(
        megatron_config,
        dtype=dtype,
        device=device,
        sequence_parallel=sequence_parallel,
        random_weights=random_weights,
        overrides=overrides,
    )
    model = GptOssModel(
        config,
        transformer_layer_spec=block_spec(config, vp_stage),
        vocab_size=config.vocab_size,
        max_sequence_length=config.seq_length,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        parallel_output=parallel_output,
        vp_stage=vp_stage,
        **_pipeline_ends(vp_stage),
    )
    _mark_cuts(model)
    moved: GptOssModel = model.to(device=device, dtype=dtype)
    return moved


def _mark_cuts(model: GptOssModel) -> None:
    """Say of every parameter that tensor parallelism cuts along which dim it does.

    megatron-core says so as it draws weights, and so not of weights that are to be loaded. Gradient
    norms would then leave out the parts of all ranks but the first.
    """
    for name, parameter in model.named_parameters():
        dim = next((d for end, d in _CUTS.items() if name.endswith(end)), None)
        if dim is not None and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def _pipeline_ends(vp_stage: int | None) -> dict[str, bool]:
    """Whether this rank embeds (first stage) and makes logits (last stage)."""
    where = {"ignore_virtual": False, "vp_stage": vp_stage}
    return {
        "pre_process": parallel_state.is_pipeline_first_stage(**where),
        "post_process": parallel_state.is_pipeline_last_stage(**where),
    }
