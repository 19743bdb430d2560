"""Where a result comes from, for its manifest: nothing that differs between two equal runs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

import gptoss_convert
from gptoss_convert.errors import CheckpointError
from gptoss_convert.manifest import MANIFEST, read_manifest, root_of

if TYPE_CHECKING:
    from pathlib import Path

    from gptoss_convert.plan import ConversionPlan
    from gptoss_convert.registry import Registry
    from gptoss_convert.types import Format, TensorSource


def origin(
    plan: ConversionPlan,
    source: TensorSource,
    hints: TensorSource | None,
    target: Format,
    registry: Registry,
) -> dict[str, Any]:
    """Tool, plugins, source and options; docs/json.md has the fields."""
    versions = sorted({(p.distribution, p.version) for p in registry.plugins if not p.error})
    return {
        "tool": {"name": "gptoss-convert", "version": gptoss_convert.__version__},
        "plugins": [{"distribution": name, "version": version} for name, version in versions],
        "direction": plan.direction,
        "model": plan.family,
        "source": {"name": plan.name_or_path or _name(source.path), **_digest(source)},
        "scales": {"name": _name(hints.path), **_digest(hints)} if hints else None,
        "options": _options(plan, target),
    }


def _options(plan: ConversionPlan, target: Format) -> dict[str, Any]:
    """What was asked for, and what was chosen where nothing was."""
    told = {
        "format": target.name,
        "dtype": plan.dtype,
        "codecs": list(plan.codecs),
        "encoding": dict(plan.encoding) or None,
    }
    if target.side == "hf":
        return told
    return {
        **told,
        "dialect": plan.target.dialect or next(iter(target.dialects), None),
        "layout": {**asdict(plan.target.layout), "stages": list(plan.target.layout.stages)},
        "iteration": plan.target.iteration,
        "hints_kept": bool(plan.kept),
        "training_state": plan.target.state is not None,
    }


def _name(path: Path) -> str:
    """The last part of a path: the others tell where somebody's disks are."""
    return path.name or path.resolve().name


def _digest(source: TensorSource) -> dict[str, str]:
    """The source's manifest stands for its content, if it has one; else its headers are what is known
    of it without reading it all.
    """
    own = _manifest_of(source.path)
    if own is not None:
        return {"digest": own, "digest_of": "manifest"}
    digest = xxh3_128()
    for name, spec in sorted(source.specs().items()):
        digest.update(json.dumps([name, spec.dtype, list(spec.shape)]).encode())
    for name, path in sorted(source.files.items()):
        digest.update(json.dumps([name, path.stat().st_size]).encode())
        digest.update(path.read_bytes())
    return {"digest": digest.hexdigest(), "digest_of": "headers"}


def _manifest_of(folder: Path) -> str | None:
    """The checksum of a source's own manifest; None if there is none, or it is not of what is here now."""
    here, root = folder.resolve(), root_of(folder)
    if root is None:
        return None
    with contextlib.suppress(CheckpointError, OSError):
        files = read_manifest(root).files
        mine = [name for name in files if (root / name).is_relative_to(here)]
        if mine and all((root / n).stat().st_size == files[n].nbytes for n in mine):
            return str(xxh3_128((root / MANIFEST).read_bytes()).hexdigest())
    return None
