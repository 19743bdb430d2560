"""The small files that make a folder of tensors a checkpoint for everyone who loads it.

Megatron-LM reads ``common.pt`` and, when asked, its ``args``; Megatron-Bridge reads
``run_config.yaml`` and the train state; megatron-core reads ``metadata.json`` and the content
metadata. Field names are theirs.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from gptoss_convert.blockio import BlockReader
from gptoss_convert.dtypes import torch_dtype, torch_name
from gptoss_plugins.megatron import safe_pickle
from gptoss_plugins.megatron.folder import COMMON, RUN_CONFIG
from gptoss_plugins.megatron.runconfig import model_of
from gptoss_plugins.megatron.torchzip import read_object

if TYPE_CHECKING:
    from pathlib import Path

    from gptoss_convert.layout import Layout
    from gptoss_convert.plan import ConversionPlan
    from gptoss_convert.types import Config
    from gptoss_plugins.megatron.metadata import Stored

METADATA_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
PER_LAYER_CONTENT = {**CONTENT, "non_homogeneous_layers": True}
COMMON_OBJECT = "common_state/shard_0_1"
_ACTIVATIONS = {
    "quick_gelu": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
}
# Megatron-LM's argument -> the field it carries, where the two names differ.
_ARGUMENTS = {
    "num_experts": "num_moe_experts",
    "max_position_embeddings": "seq_length",
    "norm_epsilon": "layernorm_epsilon",
    "rotary_scaling_factor": "yarn_rotary_scaling_factor",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}


def torch_bytes(value: Any) -> bytes:
    """What ``torch.save`` writes for a value."""
    import torch

    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def metadata_json() -> bytes:
    """The mark of completeness; also says that common state is in ``common.pt``."""
    return json.dumps(METADATA_JSON).encode()


def common_state(plan: ConversionPlan, *, stacked: bool) -> dict[str, Any]:
    """State that all ranks share. ``checkpoint_version`` 3.0 tells Megatron-LM not to reorder qkv."""
    return {
        "args": arguments(plan),
        "checkpoint_version": 3.0,
        "iteration": plan.target.iteration,
        "content_metadata": dict(CONTENT if stacked else PER_LAYER_CONTENT),
    }


def arguments(plan: ConversionPlan, ckpt_format: str = "torch_dist") -> argparse.Namespace:
    """The model in Megatron-LM's command-line arguments, for ``--use-checkpoint-args``."""
    fields = dict(plan.megatron_config)
    activation = fields.pop("activation_func", None)
    for argument, name in _ARGUMENTS.items():
        if name in fields:
            fields[argument] = fields[name]
    if "window_size" in fields:
        fields["window_size"] = tuple(fields["window_size"])
    dtype, layout = torch_dtype(plan.dtype), plan.target.layout
    return argparse.Namespace(
        **fields,
        add_position_embedding=True,
        bf16=plan.dtype == "BF16",
        fp16=plan.dtype == "F16",
        ckpt_format=ckpt_format,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        group_query_attention=fields.get("num_query_groups") != fields.get("num_attention_heads"),
        decoder_first_pipeline_num_layers=layout.first,
        decoder_last_pipeline_num_layers=layout.last,
        padded_vocab_size=layout.padded(fields["vocab_size"]) if "vocab_size" in fields else None,
        params_dtype=dtype,
        pipeline_model_parallel_size=layout.pp,
        quick_geglu=activation == "quick_gelu",
        swiglu=activation == "silu",
        tensor_model_parallel_size=layout.tp,
        untie_embeddings_and_output_weights=not fields.get("share_embeddings_and_output_weights"),
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
    )


def train_state() -> bytes:
    """Megatron-Bridge's counters at the start of training; it needs every one of them."""
    import torch

    counters = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    state = {name: torch.tensor(0, dtype=torch.int64) for name in counters}
    state["floating_point_operations_so_far"] = torch.tensor(0.0, dtype=torch.float64)
    for name in ("do_train", "do_valid", "do_test"):
        state[name] = torch.tensor(False)
    return torch_bytes(state)


def run_config(plan: ConversionPlan) -> bytes:
    """``run_config.yaml`` for Megatron-Bridge: this model's values, and no path of this machine."""
    return run_config_of(plan.megatron_config, plan.dtype, plan.target.layout, plan.name_or_path)


def run_config_of(
    megatron_config: Config, dtype: str, layout: Layout, name_or_path: str | None = None
) -> bytes:
    """The same of any model: its fields in Megatron's names, its type, layout, and hub id."""
    import yaml

    fields = dict(megatron_config)
    if (activation := fields.get("activation_func")) in _ACTIVATIONS:
        fields["activation_func"] = {"_call_": False, "_target_": _ACTIVATIONS[activation]}
    model = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        **fields,
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
        "params_dtype": {"_call_": False, "_target_": f"torch.{torch_name(dtype)}"},
        **_parallel(layout),
        **({"hf_model_id": name_or_path} if name_or_path else {}),
    }
    document = {
        "model": model,
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": True},
        "tokenizer": {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": _tokenizer(name_or_path),
        },
    }
    return yaml.safe_dump(document, sort_keys=True).encode()


def _parallel(layout: Layout) -> dict[str, Any]:
    """The layout in TransformerConfig's fields; what is 1 or absent is left to their defaults."""
    fields = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "num_layers_in_first_pipeline_stage": layout.first,
        "num_layers_in_last_pipeline_stage": layout.last,
    }
    always = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    return {k: v for k, v in fields.items() if k in always or v not in (1, None)}


def _tokenizer(name_or_path: str | None) -> Any:
    """The hub id, or the empty path by which Megatron-Bridge means the checkpoint's ``tokenizer/``."""
    if name_or_path:
        return name_or_path
    return {"_target_": "megatron.bridge.training.model_load_save.Path"}


def common_place(folder: Path, objects: Collection[str]) -> str:
    """Where the common state is: a file (to megatron-core 0.18), or an object (from 0.19)."""
    if (folder / COMMON).is_file():
        return COMMON
    return COMMON_OBJECT if COMMON_OBJECT in objects else "missing"


def read_megatron_config(folder: Path, common: Any) -> dict[str, Any] | None:
    """The model's fields from ``run_config.yaml`` or from ``args`` in the common state, if any."""
    return _from_run_config(folder / RUN_CONFIG) or fields_of(common)


def every_config(folder: Path, objects: Mapping[str, Stored]) -> dict[str, dict[str, Any]]:
    """The model's fields from each of those that has them, by its name."""
    common = fields_of(read_common(folder, objects))
    found = {
        RUN_CONFIG: _from_run_config(folder / RUN_CONFIG),
        f"args in {common_place(folder, objects)}": common,
    }
    return {place: fields for place, fields in found.items() if fields is not None}


def read_common(folder: Path, objects: Mapping[str, Stored]) -> Any:
    """The common state, wherever the version that wrote it keeps it; None if there is none."""
    path = folder / COMMON
    if path.is_file():
        return read_object(BlockReader(path), 0, path.stat().st_size, str(path))
    at = objects.get(COMMON_OBJECT)
    if at is None or not (folder / at.file).is_file():
        return None
    path = folder / at.file
    found = read_object(BlockReader(path), at.offset, at.length, f"{path} ({COMMON_OBJECT})")
    return found[0] if isinstance(found, list) and found else found


def _from_run_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    model = model_of(path)
    activation = model.get("activation_func")
    if isinstance(activation, Mapping):
        model["activation_func"] = str(activation.get("_target_"))[:999].rsplit(".", 1)[-1]
    return plain(model)


def plain(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """The public fields that are numbers, text, or lists of those; none other describes a model.

    An object of a pickle or of YAML may hold itself, or one part a billion times.
    """
    scalars = (str, int, float, bool, type(None))
    return {
        name: value
        for name, value in fields.items()
        if isinstance(name, str)
        and not name.startswith("_")
        and all(
            isinstance(item, scalars)
            for item in (value if isinstance(value, list | tuple) else [value])
        )
    }


def fields_of(common: Any) -> dict[str, Any] | None:
    """The model's fields from the ``args`` of Megatron-LM; None if there are none."""
    args = common.get("args") if isinstance(common, dict) else None
    if not isinstance(args, safe_pickle.Inert):
        return None
    fields = plain(vars(args))
    for argument, name in _ARGUMENTS.items():
        if fields.get(argument) is not None:
            fields.setdefault(name, fields[argument])
    if fields.get("vocab_size") is None:  # left to the tokenizer
        fields["vocab_size"] = fields.get("padded_vocab_size")
    if "untie_embeddings_and_output_weights" in fields:
        tied = not fields["untie_embeddings_and_output_weights"]
        fields.setdefault("share_embeddings_and_output_weights", tied)
    if "quick_geglu" in fields:  # and not the function's name
        quick, swiglu = bool(fields["quick_geglu"]), bool(fields.get("swiglu"))
        fields.setdefault(
            "activation_func", "quick_gelu" if quick else "silu" if swiglu else "gelu"
        )
        fields.setdefault("gated_linear_unit", quick or swiglu)
    return fields
