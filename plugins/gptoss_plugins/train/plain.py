"""A config as plain values (JSON's kinds), and back. Nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from gptoss_convert.errors import UsageError
from gptoss_plugins.train.config import TrainingConfig
from gptoss_plugins.train.names import require_field, require_section, section_types
from gptoss_plugins.train.reading import alternatives, hints_of, read, shown


def to_plain(value: Any) -> Any:
    """A config, or a part of one, as dicts, lists, numbers, text, true, false and null."""
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    return [to_plain(one) for one in value] if isinstance(value, tuple) else value


def from_plain(sections: Any) -> TrainingConfig:
    """The inverse of :func:`to_plain`; what is left out has its default.

    Raises:
        UsageError: naming a section or field that there is not, or a value of the wrong type.

    """
    if not isinstance(sections, Mapping):
        raise UsageError(f"a config has sections with fields, and is not {shown(sections)}")
    for name in sections:
        require_section(str(name), str(name))
    return TrainingConfig(**{name: _section(name, part) for name, part in sections.items()})


def _section(name: str, part: Any) -> Any:
    if part is None and type(None) in alternatives(hints_of(TrainingConfig)[name]):
        return None
    if not isinstance(part, Mapping):
        raise UsageError(f"{name} is a section with fields, and not {shown(part)}")
    kind = _kind(name, part)
    for field in part:
        require_field(name, str(field), kind)
    hints = hints_of(kind)
    return kind(**{f: read(value, hints[f], f"{name}.{f}") for f, value in part.items()})


def _kind(name: str, part: Mapping[str, Any]) -> type:
    """The dataclass of a section; where it may be one of several, its field ``kind`` says which."""
    kinds = section_types()[name]
    if len(kinds) == 1:
        return kinds[0]
    named = {get_args(hints_of(kind)["kind"])[0]: kind for kind in kinds}
    said = part.get("kind", next(iter(named)))
    if not isinstance(said, str) or said not in named:
        raise UsageError(f"{name}.kind takes {' or '.join(named)}, and not {shown(said)}")
    return named[said]
