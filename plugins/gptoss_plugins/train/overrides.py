"""Overrides as users write them behind a command: ``train.train_iters=100 optimizer.lr=1e-4``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import ConfigError, UsageError
from gptoss_plugins.train.config import NAMED, LoRA, TrainingConfig
from gptoss_plugins.train.names import ALIASES, require_field, require_section
from gptoss_plugins.train.reading import hints_of, read, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

_NULL = ("null", "~", "None")
_DECAYS = ("start_weight_decay", "end_weight_decay")


def override(config: TrainingConfig, words: Sequence[str]) -> TrainingConfig:
    """A config with overrides applied, in their order.

    A word is ``section.field=value``, as OmegaConf reads it: ``1e-4``, ``[a,b]``, ``null``, quotes.
    ``+`` and ``++`` before it, as Hydra has them, change nothing. Two whole sections can be set:
    ``mixed_precision=bf16_with_mxfp8_mixed`` and ``peft=lora`` or ``peft=null``.

    Raises:
        UsageError: a word is no override, or names a section or field that there is not, or its
            value is of the wrong type, or the override would have no effect.

    """
    for word in words:
        key, value = split(word)
        section, dot, field = ALIASES.get(key, key).partition(".")
        require_section(section, key)
        if dot:
            config = _with_field(config, section, field, value)
        else:
            config = _with_section(config, section, value)
    _require_effect(config, {split(word)[0] for word in words})
    return config


def split(word: str) -> tuple[str, Any]:
    """``key=value`` -> the key, without ``+``, and its value.

    Raises:
        UsageError: it is nothing of the kind.

    """
    key, equals, text = word.partition("=")
    if word.startswith("~"):
        raise UsageError(f"{word}: fields cannot be removed; say {key[1:]}=null")
    key = key.strip().removeprefix("++").removeprefix("+")
    if not equals or not key:
        raise UsageError(f"{word}: is no override; write it as section.field=value")
    return key, _value(key, text.strip())


def _value(key: str, text: str) -> Any:
    """A value's text as OmegaConf reads it, but for scalars: those are what they look like.

    OmegaConf would make 83 of ``0123``, 150 of ``2:30`` and nothing of ``#1``.
    """
    if not text:
        raise UsageError(f"{key}: is empty, perhaps a variable was not set; say null for nothing")
    if text in _NULL:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return _structured(key, text) if text[0] in "[{'\"" else text


def _structured(key: str, text: str) -> Any:
    """Lists and what is in quotes."""
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ImportError:
        raise ConfigError(
            "overrides with lists need OmegaConf, which is not installed: "
            "pip install 'gptoss-convert[train]'"
        ) from None
    try:
        read_ = OmegaConf.from_dotlist([f"value={text}"])
        found = OmegaConf.to_container(read_, resolve=False)  # ${...} stays as it is: text
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError):
        raise UsageError(
            f"{key}: {shown(text)} cannot be read; write a list as [a,b], and text with brackets or "
            f"quotes in quotes"
        ) from None
    return found["value"] if isinstance(found, dict) else found


def _with_field(config: TrainingConfig, section: str, field: str, value: Any) -> TrainingConfig:
    part = getattr(config, section)
    if part is None:
        raise UsageError(f"{section}.{field}: {section} is null here; say {section}=lora before it")
    kind: type = type(part)
    require_field(section, field, kind)
    taken = read(value, hints_of(kind)[field], f"{section}.{field}")
    part = dataclasses.replace(part, **{field: taken})
    return dataclasses.replace(config, **{section: part})


def _with_section(config: TrainingConfig, section: str, value: Any) -> TrainingConfig:
    """A whole section at once, by the name of a set of its values."""
    if section == "mixed_precision":
        name = value.replace("-", "_") if isinstance(value, str) else value
        if not isinstance(name, str) or name not in NAMED:
            raise UsageError(f"mixed_precision takes {' or '.join(NAMED)}, and not {shown(value)}")
        return dataclasses.replace(config, mixed_precision=NAMED[name])
    if section == "peft":
        return dataclasses.replace(config, peft=adapters(value))
    kind: type = type(getattr(config, section))
    raise UsageError(f"{section} is a section; set one of its fields: {', '.join(hints_of(kind))}")


def adapters(value: Any) -> LoRA | None:
    """``lora``, ``none`` or null, or a LoRA as it is.

    Raises:
        UsageError: it is something else.

    """
    if value is None or isinstance(value, LoRA):
        return value
    if isinstance(value, str) and value.lower() in ("lora", "none"):
        return LoRA() if value.lower() == "lora" else None
    raise UsageError(f"peft takes lora or null, and not {shown(value)}")


def _require_effect(config: TrainingConfig, keys: set[str]) -> None:
    """The published recipes' schedulers set the weight decay, and the optimizer's has no effect."""
    ruling = [f"scheduler.{n}" for n in _DECAYS if getattr(config.scheduler, n) is not None]
    if (
        "optimizer.weight_decay" in keys
        and ruling
        and not keys & {f"scheduler.{n}" for n in _DECAYS}
    ):
        raise UsageError(
            f"optimizer.weight_decay has no effect where {' and '.join(ruling)} are set; set these, "
            f"or say {' '.join(f'{name}=null' for name in ruling)} too"
        )
