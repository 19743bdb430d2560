"""States of other modules' models, under the names that ours have.

Megatron-LM's per-rank checkpoints hold a model's ``state_dict`` as its modules made it: Transformer
Engine's fuse the first norm with the linear behind it and keep states of their own, and experts
stand one by one, as modules or as numbered parameters.
"""

from __future__ import annotations

import re
from typing import Any

import torch

_NORM = "self_attention.linear_qkv.layer_norm_weight"
_OWN_NORM = "input_layernorm.weight"
# Modules that have an extra state in Transformer Engine and none here.
_STATE = re.compile(r".*(core_attention|layernorm)\._extra_state")
_EXPERT = re.compile(
    r"(?:local_experts\.(?P<one>\d+)\.)?(?P<linear>linear_fc[12])\."
    r"(?P<kind>weight|bias|_extra_state)(?P<grouped>\d*)"
)


def rename_norms(state: dict[str, Any], prefix: str) -> None:
    """Give first norms the name they have here, and drop the empty states of others' modules."""
    for key in [key for key in state if key.startswith(prefix)]:
        if key.endswith(_NORM):
            own = key.removesuffix(_NORM) + _OWN_NORM
            if own not in state:
                state[own] = state.pop(key)
        elif _STATE.fullmatch(key):
            del state[key]


def stack_experts(state: dict[str, Any], prefix: str, count: int) -> None:
    """Put experts that stand one by one into one stack per parameter.

    Args:
        state: of the whole module; changed in place.
        prefix: of the experts' names in it.
        count: how many experts a stack must have; others are left as they are.

    """
    found: dict[str, dict[int, str]] = {}
    for key in [key for key in state if key.startswith(prefix)]:
        match = _EXPERT.fullmatch(key.removeprefix(prefix))
        number = match and (match["one"] or match["grouped"])
        if not match or not number:
            continue
        if match["kind"] == "_extra_state":
            del state[key]
        else:
            found.setdefault(f"{prefix}{match['linear']}.{match['kind']}", {})[int(number)] = key
    for name, keys in found.items():
        if sorted(keys) == list(range(count)) and name not in state:
            state[name] = torch.stack([state.pop(keys[number]) for number in range(count)])
