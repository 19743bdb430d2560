"""Describing a checkpoint from its headers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import ConvertError, PlanError
from gptoss_convert.opening import config_of, own_config
from gptoss_convert.plan import ConversionPlan, make_plan, parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptoss_convert.opening import Choice
    from gptoss_convert.registry import Registry
    from gptoss_convert.types import ModelFamily, TensorSource

INSPECT_SCHEMA = "gptoss-convert.inspect/1"


def inspect_source(source: TensorSource, registry: Registry, choice: Choice) -> dict[str, Any]:
    """Facts of a checkpoint as plain values; the schema is described in docs/json.md."""
    found = registry.format_of(source.path, name=choice.format)
    importing = found is not None and found.side == "hf"
    problems: list[str] = []
    family: ModelFamily | None = None
    plan: ConversionPlan | None = None
    try:
        source.check()
    except PlanError as error:
        problems += error.problems
    problems += _kept_problems(source, registry)
    try:
        config = own_config(source) if importing else config_of(source, registry, choice)
        family = registry.model_for(config, choice.model)
        if hasattr(source, "arrange"):
            source.arrange(parameters(family, config, str(source.path)))
        plan = make_plan(
            "import" if importing else "export",
            source.specs(),
            family,
            config,
            where=str(source.path),
            codec=registry.codec_for(config, choice.codec) if importing else None,
            known_codecs=registry.codecs().values(),
        )
    except PlanError as error:
        problems += error.problems
    except ConvertError as error:
        problems.append(str(error))
    specs = source.specs()
    dtypes = Counter[str]()
    for spec in specs.values():
        dtypes[spec.dtype] += spec.nbytes
    return {
        "schema": INSPECT_SCHEMA,
        "path": str(source.path),
        "format": found.name if found else None,
        "model": family.name if family else None,
        "parameters": plan.parameters if plan else None,
        "tensors": len(specs),
        "bytes": sum(dtypes.values()),
        "bytes_by_dtype": dict(dtypes.most_common()),
        "megatron_config": dict(plan.megatron_config) if plan else None,
        "layout": dict(source.describe()),
        "problems": problems,
    }


def _kept_problems(source: TensorSource, registry: Registry) -> list[str]:
    """What is wrong with what was kept beside a Megatron checkpoint to encode it again."""
    found = []
    for name in sorted(registry.codecs()):
        try:
            kept = source.hints(name) if hasattr(source, "hints") else None
            if kept is not None and kept is not source:
                kept.check()
        except PlanError as error:
            found += [f"{source.path}: {problem}" for problem in error.problems]
        except ConvertError as error:
            found.append(str(error))
    return found


def unreadable(path: str, problems: Sequence[str]) -> dict[str, Any]:
    """The facts of a checkpoint whose headers do not hang together: only what is wrong."""
    unknown = ("format", "model", "parameters", "megatron_config")
    return {
        "schema": INSPECT_SCHEMA,
        "path": path,
        **dict.fromkeys(unknown),
        "tensors": 0,
        "bytes": 0,
        "bytes_by_dtype": {},
        "layout": {},
        "problems": list(problems),
    }
