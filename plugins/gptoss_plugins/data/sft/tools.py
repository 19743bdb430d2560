"""Functions that the model may call, as harmony tells them: types in the manner of TypeScript.

The form is openai_harmony's, down to its indents (tests/plugins/test_sft_harmony.py has it render the
same); what a schema says beyond that is left out, as there.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gptoss_plugins.data.sft.records import BadRecordError, require_utf8, unfolded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NAMES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}
_DEEPEST = 32  # objects in objects


def describe_tools(tools: Any) -> str:
    """The part of a developer message about functions; empty, if there are none.

    Args:
        tools: in OpenAI's form, ``[{"type": "function", "function": {...}}]``.

    Raises:
        BadRecordError: it is in another one.

    """
    if not (tools := unfolded(tools)):
        return ""
    if not isinstance(tools, list | tuple):
        raise BadRecordError("has tools that are no list; write one, in OpenAI's form")
    lines = ["# Tools", "", "## functions", "", "namespace functions {", ""]
    for number, tool in enumerate(map(unfolded, tools)):
        lines += [*_function(tool, number), ""]
    found = "\n".join([*lines, "} // namespace functions"])
    require_utf8("tools", found)
    return found


def _function(tool: Any, number: int) -> Iterator[str]:
    told = unfolded(tool.get("function", tool)) if isinstance(tool, dict) else {}
    name = told.get("name") if isinstance(told, dict) else None
    if not isinstance(name, str) or not name:
        raise BadRecordError(f"has a tool {number} without the name of a function; name it")
    yield from (f"// {line}" for line in _words(told, "description").splitlines())
    parameters = unfolded(told.get("parameters"))
    takes = f"_: {_type(parameters, '', _DEEPEST)}" if isinstance(parameters, dict) else ""
    yield f"type {name} = ({takes}) => any;"


def _type(schema: Any, indent: str, depth: int) -> str:
    """A JSON schema as a type."""
    if depth == 0:
        raise BadRecordError(f"has a tool with objects in objects, more than {_DEEPEST} deep")
    if not isinstance(schema, dict):
        return "any"
    kind = schema.get("type")
    if isinstance(schema.get("oneOf"), list):
        variants = _variants(schema, indent, depth, quotes_all=True)
        return "".join(f"\n{line}" for line in variants)
    if isinstance(kind, list):
        return " | ".join(_NAMES.get(str(one), str(one)) for one in kind) or "any"
    if kind == "object":
        return _object(schema, indent, depth)
    if kind == "array":
        items = schema.get("items")
        return "Array<any>" if items is None else f"{_type(items, indent, depth - 1)}[]"
    if kind == "string" and isinstance(schema.get("enum"), list) and schema["enum"]:
        return " | ".join(_quoted(one) for one in schema["enum"] if isinstance(one, str))
    return _NAMES.get(str(kind), "any")


def _object(schema: Mapping[str, Any], indent: str, depth: int) -> str:
    text = _words(schema, "description")
    lines = [f"{indent}// {text}"] if text else []
    lines.append("{")
    properties = schema.get("properties")
    required = schema.get("required")
    for name, value in properties.items() if isinstance(properties, dict) else ():
        mark = "" if isinstance(required, list) and name in required else "?"
        value = value if isinstance(value, dict) else {}
        lines += [f"{indent}{line}" if line else indent for line in _comments(value)]
        if isinstance(value.get("oneOf"), list):
            variants = _variants(value, indent, depth, _words(value, "description"))
            lines += [f"{indent}{name}{mark}:", *variants, f"{indent},"]
            continue
        type_ = _nullable(value, _type(value, indent + "    ", depth - 1))
        default = f" // {told}" if (told := _default(value)) else ""
        lines.append(f"{indent}{name}{mark}: {type_},{default}")
    return "\n".join([*lines, f"{indent}}}"])


def _comments(schema: Mapping[str, Any]) -> Iterator[str]:
    """Above a property."""
    if title := _words(schema, "title"):
        yield f"// {title}"
        yield "//"
    text, is_union = _words(schema, "description"), isinstance(schema.get("oneOf"), list)
    if text and not is_union:
        yield f"// {text}"
    examples = schema.get("examples")
    if isinstance(examples, list) and examples:
        yield "// Examples:"
        yield from (f"// - {_quoted(one)}" for one in examples if isinstance(one, str))
    if text and is_union and text != _first_description(schema):
        yield f"// {text}"
    if is_union and (told := _default(schema)):
        yield f"// {told}"


def _first_description(schema: Mapping[str, Any]) -> str:
    first = next(iter(schema["oneOf"]), None)
    return _words(first, "description") if isinstance(first, dict) else ""


def _variants(
    schema: Mapping[str, Any],
    indent: str,
    depth: int,
    above: str = "",
    *,
    quotes_all: bool = False,
) -> Iterator[str]:
    """A line for each. Under a description above, the first one's is left out, and equal ones are."""
    for number, variant in enumerate(schema["oneOf"]):
        told = variant if isinstance(variant, dict) else {}
        line = f"{indent} | {_nullable(told, _type(variant, indent + '   ', depth - 1))}"
        text = _words(told, "description")
        if above and (number == 0 or text == above):
            text = ""
        words = [text for text in (text, _default(told, quotes_all=quotes_all)) if text]
        yield f"{line} // {' '.join(words)}" if words else line


def _nullable(schema: Mapping[str, Any], type_: str) -> str:
    return f"{type_} | null" if schema.get("nullable") is True and "null" not in type_ else type_


def _default(schema: Mapping[str, Any], *, quotes_all: bool = False) -> str:
    """``default: ...``; text in quotes, unless it is one of an enum, and not inside of a union."""
    if "default" not in schema:
        return ""
    value = schema["default"]
    if isinstance(value, str):
        return f"default: {value if schema.get('enum') and not quotes_all else _quoted(value)}"
    return f"default: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"


def _quoted(text: str) -> str:
    return f'"{text}"'


def _words(schema: Mapping[str, Any], key: str) -> str:
    found = schema.get(key)
    return found if isinstance(found, str) else ""
