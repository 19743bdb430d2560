"""Plain values held against a field's type: taken as that type has them, or refused in a sentence."""

from __future__ import annotations

import math
import re
import types
import typing
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from gptoss_convert.errors import UsageError
from gptoss_plugins.train.config.kinds import Form, Within

if TYPE_CHECKING:
    from collections.abc import Sequence

# YAML 1.1 has 1e-4 as text, 0123 as octal and 2:30 as 150; here a number is what it looks like.
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_LONGEST = 60  # characters of a value in a message
_MISFIT = object()
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}


@cache
def hints_of(section: type) -> dict[str, Any]:
    """The fields of a config dataclass and their types."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in fields(section)}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a union allows; of any other type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def sections_of(hint: Any) -> tuple[type, ...]:
    """The config dataclasses that a field of this type may hold."""
    return tuple(one for one in alternatives(hint) if is_dataclass(one) and isinstance(one, type))


def read(value: Any, hint: Any, where: str) -> Any:
    """A plain value (of JSON's kinds) as a field has it: lists as tuples, whole numbers as ints.

    Args:
        value: what was given; a number may also come as its text.
        hint: the field's type.
        where: the field's name, for the message.

    Raises:
        UsageError: naming the field, the value and the type.

    """
    found = _fit(value, hint)
    if found is _MISFIT:
        raise UsageError(f"{where} takes {describe(hint)}, and not {shown(value)}")
    return found


def describe(hint: Any) -> str:
    """A type in words: ``a whole number of 1 or more``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        for extra in hint.__metadata__:
            if isinstance(extra, Form):
                return extra.text
            if isinstance(extra, Within):
                return f"{describe(args[0])} {extra}"
    if origin is Literal:
        return _listed(args, " or ")
    if origin is tuple:
        inner = args[0]
        each = f"any of {_listed(get_args(inner), ', ')}" if _is_literal(inner) else describe(inner)
        return f"a list of {each}"
    if len(several := alternatives(hint)) > 1:
        told = " or ".join(describe(one) for one in several if one is not types.NoneType)
        return f"{told}, or null" if types.NoneType in several else told
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def shown(value: Any) -> str:
    """A value for a message, cut short if it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _is_literal(hint: Any) -> bool:
    return get_origin(hint) is Literal


def _listed(values: Sequence[Any], last: str) -> str:
    head, tail = [str(v) for v in values[:-1]], str(values[-1])
    return f"{', '.join(head)}{last}{tail}" if head else tail


def _fit(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return _fit_annotated(value, args[0], hint.__metadata__)
    if origin is Literal:
        return next((one for one in args if type(one) is type(value) and one == value), _MISFIT)
    if origin is tuple:
        return _fit_list(value, args)
    if len(several := alternatives(hint)) > 1:
        found = (_fit(value, one) for one in several)
        return next((one for one in found if one is not _MISFIT), _MISFIT)
    if hint in (int, float):
        return _fit_number(value, hint)
    return value if type(value) is hint else _MISFIT


def _fit_annotated(value: Any, hint: Any, extras: Sequence[Any]) -> Any:
    for extra in extras:
        if isinstance(extra, Form):
            value = extra.lengthen(value)
    found = _fit(value, hint)
    if found is _MISFIT:
        return _MISFIT
    ranges = [extra for extra in extras if isinstance(extra, Within)]
    return found if all(one.holds(found) for one in ranges) else _MISFIT


def _fit_list(value: Any, args: tuple[Any, ...]) -> Any:
    """A list of any length for ``tuple[T, ...]``, of one length for ``tuple[A, B]``."""
    if not isinstance(value, list | tuple):
        return _MISFIT
    hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(hints) != len(value):
        return _MISFIT
    found = [_fit(one, hint) for one, hint in zip(value, hints, strict=True)]
    return _MISFIT if any(one is _MISFIT for one in found) else tuple(found)


def _fit_number(value: Any, kind: type) -> Any:
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value) if re.search(r"[.e]", value, re.IGNORECASE) else _whole(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _MISFIT
    try:
        number = float(value)
    except OverflowError:  # an int that no float holds
        return _MISFIT
    if not math.isfinite(number):
        return _MISFIT
    if kind is float:
        return number
    return int(value) if number.is_integer() else _MISFIT


def _whole(text: str) -> Any:
    try:
        return int(text)
    except ValueError:  # more digits than Python reads
        return text
