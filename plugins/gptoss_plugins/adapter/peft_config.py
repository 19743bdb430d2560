"""``adapter_config.json``, as far as it decides what an adapter computes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import ConfigError
from gptoss_convert.untrusted import require_small
from gptoss_plugins.huggingface.headers import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

CONFIG, TENSORS, PICKLED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_LONGEST = 1 << 20  # bytes; PEFT writes a few thousand
_NAME = re.compile(r"[\w.]+")
# Fields that make an adapter something else than scale * B A, with the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "velora_config": (None,),
}


@dataclass(frozen=True)
class PeftConfig:
    """What is declared of an adapter.

    Attributes:
        rank, alpha: where no pattern says otherwise.
        ranks, alphas: by pattern of the module's name.
        parameters: names, or ends of names, of the parameters that are adapted.
        modules: likewise of modules; None if the config tells by a regular expression, or not at all.
        excluded: likewise of modules that are not adapted all the same.
        layers: those whose modules are adapted; None for all.
        is_rank_stabilized: the scale is alpha / sqrt(rank) rather than alpha / rank.
        base: how the model is called that it was made for; "" if nothing says.

    """

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    modules: tuple[str, ...] | None = None
    excluded: tuple[str, ...] | None = ()
    layers: tuple[int, ...] | None = None
    is_rank_stabilized: bool = False
    base: str = ""

    def rank_of(self, name: str) -> int:
        """Of a module or parameter, by the model's name of it."""
        return int(_by_pattern(self.ranks, name, self.rank))

    def scale_of(self, name: str) -> float:
        """What a module's B A is multiplied with."""
        rank, alpha = self.rank_of(name), float(_by_pattern(self.alphas, name, self.alpha))
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)

    def has_parameter(self, name: str) -> bool:
        """Whether a parameter of the model is adapted."""
        return _is_among(name, self.parameters)

    def has_module(self, name: str, layer: int) -> bool | None:
        """Whether a module of the model is adapted, which stands on a layer; None if nothing says."""
        if self.layers is not None and layer not in self.layers:
            return False
        if self.modules is None or self.excluded is None:
            return None
        return _is_among(name, self.modules) and not _is_among(name, self.excluded)


def _is_among(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """As PEFT looks it up: the first pattern that is the name, or its end from a dot on.

    PEFT takes regular expressions; of a stranger's, such that are plain names have an end.
    """
    for pattern, value in patterns.items():
        plain = pattern.removeprefix("^").replace("\\.", ".")
        if not _NAME.fullmatch(plain):
            raise ConfigError(
                f"{CONFIG}: the pattern {pattern!r} is no name of a module; write one for each module"
            )
        if name == plain or (plain == pattern and name.endswith(f".{plain}")):
            return value
    return default


def read_peft_config(folder: Path) -> PeftConfig:
    """Read a folder's config.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: it describes what is no plain LoRA.

    """
    path = folder / CONFIG
    require_small([path] if path.exists() else [], _LONGEST)
    raw = read_json(path)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type is {kind!r}; only LORA can be carried over")
    for name, fine in _PLAIN.items():
        if raw.get(name) not in fine:
            raise ConfigError(
                f"{path}: {name} is {raw[name]!r}, which makes it more than a plain LoRA; only that can "
                f"be carried over"
            )
    base = raw.get("base_model_name_or_path")
    return PeftConfig(
        rank=number_of(path, "r", raw.get("r"), int),
        alpha=number_of(path, "lora_alpha", raw.get("lora_alpha"), float),
        ranks=_numbers(path, "rank_pattern", raw, int),
        alphas=_numbers(path, "alpha_pattern", raw, float),
        parameters=_names(path, "target_parameters", raw),
        modules=_listed(path, "target_modules", raw),
        excluded=_listed(path, "exclude_modules", raw) if raw.get("exclude_modules") else (),
        layers=_layers(path, raw.get("layers_to_transform")),
        is_rank_stabilized=_flag(path, "use_rslora", raw),
        base=base if isinstance(base, str) else "",
    )


def number_of(path: Path, name: str, value: Any, kind: type) -> Any:
    """A number of a config, as an int or a float; ConfigError if it is no positive one."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right or not 0 < value < 1 << 20 or (kind is int and value != int(value)):
        raise ConfigError(f"{path}: {name} is {value!r} and no positive number; mend it")
    return kind(value)


def _numbers(path: Path, name: str, raw: Mapping[str, Any], kind: type) -> dict[str, Any]:
    found = raw.get(name) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: {name} is {found!r} and no object; mend it")
    return {key: number_of(path, f"{name} of {key}", value, kind) for key, value in found.items()}


def _names(path: Path, name: str, raw: Mapping[str, Any]) -> tuple[str, ...]:
    found = raw.get(name) or []
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise ConfigError(f"{path}: {name} is {found!r} and no list of names; mend it")
    return tuple(found)


def _listed(path: Path, name: str, raw: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names; None for a regular expression, or nothing."""
    is_list = raw.get(name) is not None and not isinstance(raw[name], str)
    return _names(path, name, raw) if is_list else None


def _flag(path: Path, name: str, raw: Mapping[str, Any]) -> bool:
    found = raw.get(name)
    if not isinstance(found, (bool, type(None))):
        raise ConfigError(f"{path}: {name} is {found!r}, and neither true nor false; mend it")
    return bool(found)


def _layers(path: Path, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    found = value if isinstance(value, list) else [value]
    if not found or not all(type(n) is int and n >= 0 for n in found):
        raise ConfigError(
            f"{path}: layers_to_transform is {value!r} and no list of layers; mend it"
        )
    return tuple(found)


def peft_config(
    rank: int,
    alpha: float,
    modules: Sequence[str],
    parameters: Sequence[str],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    base: str | None,
) -> dict[str, Any]:
    """The config to write; fields that are left out are PEFT's defaults.

    Args:
        rank: where ``ranks`` says nothing.
        alpha: where ``alphas`` says nothing.
        modules: last parts of the adapted modules' names.
        parameters: ends of the adapted parameters' names.
        ranks: of further modules.
        alphas: of further modules.
        base: a hub id, or None.

    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "target_modules": list(modules),
        "target_parameters": list(parameters) or None,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(alphas),
    }
