"""What the commands print: facts as plain values, and tables of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.conversion import RESIDENT, Conversion, Result
from gptoss_convert.errors import MOST_SHOWN, PluginError, printable
from gptoss_convert.execute import default_workers, make_budget
from gptoss_convert.loss import total
from gptoss_convert.registry import KINDS, Registry
from gptoss_convert.staging import free_bytes, human

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptoss_convert.loss import Loss


def describe_plan(
    conversion: Conversion, target: Path, workers: int | None, max_memory: int
) -> dict[str, Any]:
    """The plan, and what it takes on this machine."""
    sink = conversion.sink(Path())
    budget = make_budget(sink, workers or default_workers(), max_memory)
    obstacles = conversion.obstacles(target if target.name else None, budget)
    return {
        **conversion.plan.to_json(),
        "bytes_out": sum(group.nbytes for group in sink.groups),
        "source": str(conversion.source.path),
        "target": str(target) if target.name else None,
        "target_format": conversion.target_format.name,
        "disk_needed": sink.nbytes,
        "disk_free": free_bytes(target / "x" if not target.name else target),
        "workers": budget.workers,
        "memory_in_flight": budget.in_flight,
        "memory_peak": budget.in_flight + RESIDENT,
        "obstacles": obstacles,
    }


def print_plan(facts: Mapping[str, Any]) -> None:
    """Totals first, then the steps of one layer and how many layers are like it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=_width())
    _print_facts(
        {
            "conversion": f"{facts['direction']} of {facts['model']} to {facts['target_format']}",
            "source": facts["source"] + "".join(f", decoded from {c}" for c in facts["codecs"]),
            "target": facts["target"] or "not named",
            "parameters": f"{facts['parameters']:,}",
            "read": human(facts["bytes_in"]),
            "written": f"{human(facts['bytes_out'])} as {facts['dtype']}",
            **_encoding(facts),
            "disk": f"{human(facts['disk_needed'])} needed, {human(facts['disk_free'])} free",
            "memory": f"{human(facts['memory_peak'])} at most, of which "
            f"{human(facts['memory_in_flight'])} in flight, {facts['workers']} workers",
            "files carried along": ", ".join(facts["files"]) or "none",
        }
    )
    table = Table("read", "shape", "step", "written", "shape", box=None, pad_edge=False)
    layers = {s["layer"] for s in facts["steps"]} - {None}
    for step in facts["steps"]:
        if step["layer"] not in (None, min(layers, default=None)):
            continue
        table.add_row(
            "\n".join(printable(t["name"]) for t in step["inputs"]),
            "\n".join(str(t["shape"]) for t in step["inputs"]),
            step["op"],
            "\n".join(t["name"] for t in step["outputs"]),
            "\n".join(str(t["shape"]) for t in step["outputs"]),
        )
    console.print(table)
    if len(layers) > 1:
        console.print(f"Layers {sorted(layers)[1]} to {max(layers)} are converted like layer 0.")
    for tensor in facts["dropped"]:
        console.print(f"left out: {tensor['name']} ({tensor['reason']})")
    for obstacle in facts["obstacles"]:
        click.echo(f"would not run: {obstacle}")


def _encoding(facts: Mapping[str, Any]) -> dict[str, str]:
    """What is encoded, or kept to encode it again later."""
    if kept := facts["hints_kept"]:
        return {"kept beside it": f"{human(kept)} of scales, to give the source's bytes back"}
    if encoding := facts["encoding"]:
        how = "the source's, where they fit" if facts["hints_found"] else "new ones"
        return {"encoded as": f"{_form(encoding)}, scales: {how}"}
    return {}


def _form(encoding: Mapping[str, str]) -> str:
    options = (
        f"{name.replace('_', '-')} {value}" for name, value in encoding.items() if name != "codec"
    )
    return f"{encoding['codec']} ({', '.join(options)})".removesuffix(" ()")


def print_result(result: Result, done: str | None = None) -> None:
    """One line for people, and what encoding cost; it begins with what was ``done``, or with the direction."""
    plan = result.plan
    carried = " and the optimizer's state carried" if plan.target and plan.target.state else ""
    click.echo(
        f"{done or plan.direction.removesuffix('e') + 'ed'} {plan.family}: {plan.parameters:,} parameters, "
        f"{human(plan.bytes_in)} read, {human(result.bytes_out)} written{carried} in "
        f"{result.seconds:.1f} s to {result.target}"
    )
    if result.losses:
        _print_losses(result)


def _print_losses(result: Result) -> None:
    """A line if nothing was lost, else a table with a row per tensor."""
    how = _form(result.encoding)
    everything = total(result.losses.values())
    if not result.plan.hints_found:
        click.echo(
            f"{how}: scales are new, as the source's own were not at hand (--scales-from names them)"
        )
    if everything.kept == everything.blocks and not everything.nonfinite:
        unit = everything.unit
        click.echo(f"{how}: all {everything.blocks:,} {unit} keep their values, nothing was lost")
        return
    print_costs(how, result.losses, "requantized")


def print_costs(how: str, losses: Mapping[str, Loss], changed: str) -> None:
    """What was lost, a row per tensor.

    Args:
        how: what it was lost to.
        losses: by tensor.
        changed: what those blocks are called that did not keep their values.

    """
    from rich.console import Console
    from rich.table import Table

    everything = total(losses.values())
    unit = everything.unit
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", no_wrap=True)
    spoiled = ["NaN or inf"] if everything.nonfinite else []
    for name in (unit, "kept", changed, *spoiled, "max error", "RMS error", "SQNR (dB)"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, loss in [*sorted(losses.items()), ("all", everything)]:
        table.add_row(
            printable(name),
            f"{loss.blocks:,}",
            f"{loss.kept:,}",
            f"{loss.blocks - loss.kept:,}",
            *[f"{loss.nonfinite:,}" for _ in spoiled],
            f"{loss.largest:.3g}",
            f"{loss.rms:.3g}",
            "" if loss.sqnr is None else f"{loss.sqnr:.2f}",
        )
    kept = f"a kept {unit.removesuffix('s')} has every value it had"
    lost = "; of finite values, those lost to a NaN count in full" if spoiled else ""
    click.echo(f"What {how} costs ({kept}{lost}):")
    Console(width=_width()).print(table)


def print_inspection(facts: Mapping[str, Any]) -> None:
    """A table of facts, then what is wrong."""
    sizes = (f"{human(n)} {dtype}" for dtype, n in facts["bytes_by_dtype"].items())
    layout = {k.replace("_", " "): _text(v) for k, v in facts["layout"].items()}
    _print_facts(
        {
            "path": facts["path"],
            "format": facts["format"],
            "model": facts["model"] or "unknown",
            "parameters": f"{facts['parameters']:,}" if facts["parameters"] else "unknown",
            "tensors": f"{facts['tensors']:,}",
            "size": f"{human(facts['bytes'])} ({', '.join(sizes)})",
            **layout,
        }
    )
    problems = facts["problems"]
    if not problems:
        click.echo("complete: every tensor is there and fits")
        return
    click.echo(f"{len(problems)} problem{'s' * (len(problems) > 1)}:")
    for problem in problems[:MOST_SHOWN]:
        click.echo(f"  {problem}")
    if len(problems) > MOST_SHOWN:
        click.echo(f"  ... and {len(problems) - MOST_SHOWN} more (--json lists all)")


def describe_plugins(registry: Registry) -> dict[str, Any]:
    """Plugins with their origin, and what is on offer by kind."""
    offers, conflicts = {}, []
    for kind in KINDS:
        try:
            offers[kind] = sorted(getattr(registry, kind)())
        except PluginError as error:  # all commands stop at it; here it is what to look at
            offers[kind] = registry.names(kind)
            conflicts.append(str(error))
    return {
        "schema": "gptoss-convert.plugins/1",
        "plugins": [vars(plugin) for plugin in registry.plugins],
        "offers": offers,
        "conflicts": list(dict.fromkeys(conflicts)),
    }


def print_plugins(facts: Mapping[str, Any]) -> None:
    """Two tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=_width())
    table = Table("plugin", "distribution", "version", "module", "state", box=None, pad_edge=False)
    for plugin in facts["plugins"]:
        state = plugin["error"] or "ok"
        table.add_row(*(plugin[k] for k in ("name", "distribution", "version", "module")), state)
    console.print(table)
    console.print()
    _print_facts({kind: ", ".join(names) or "none" for kind, names in facts["offers"].items()})
    for conflict in facts["conflicts"]:
        click.echo(f"conflict: {conflict}")


def _print_facts(facts: Mapping[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:{width}}  {value}")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(map(str, value[:4]))
        return f"{shown}, ... ({len(value)} in all)" if len(value) > 4 else shown or "none"
    return "none" if value is None else str(value)


def _width() -> int | None:
    """The terminal's width; wide enough for a table where the output is no terminal."""
    import sys

    return None if sys.stdout.isatty() else 200
