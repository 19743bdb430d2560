"""What every command line program of ours shares: plugin commands, errors as one sentence, running
a conversion. Commands of plugins use it too.

Results go to stdout, everything else to stderr. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gptoss_convert.errors import ConvertError, PluginError, ResourceError, is_chosen
from gptoss_convert.registry import Registry
from gptoss_convert.sigterm import tell_sigterm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gptoss_convert.conversion import Conversion, Result
    from gptoss_convert.layout import Layout
    from gptoss_convert.opening import Choice

log = logging.getLogger("gptoss_convert")
INTERRUPTED = 130
_TRIM_THRESHOLD = -1  # M_TRIM_THRESHOLD of malloc.h
_RANK_0_FIRST = 3.0  # seconds


class Program(click.Group):
    """Core commands, plus whatever plugins offer; turns errors into one sentence and a code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Core and plugin commands by name."""
        return sorted({*super().list_commands(ctx), *self._from_plugins(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A core command, or one of a plugin's."""
        return super().get_command(ctx, cmd_name) or self._from_plugins(ctx).get(cmd_name)

    def _from_plugins(self, ctx: click.Context) -> dict[str, click.Command]:
        found = ctx.meta.get("commands")
        if found is None:
            found = ctx.meta["commands"] = self._collect(ctx)
        return dict(found)

    def _collect(self, ctx: click.Context) -> dict[str, click.Command]:
        try:
            found = registry_of(ctx).commands()
        except PluginError as error:  # must not take --help and `plugins` down with it
            click.echo(f"warning: {error}", err=True)
            return {}
        if clash := sorted(found.keys() & self.commands.keys()):
            click.echo(f"warning: plugins may not replace the command {', '.join(clash)}", err=True)
        return found

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run; outside of standalone mode errors are raised as they are."""
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        if _rank_of_several() is not None:
            tell_sigterm()
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
            sys.exit(code if isinstance(code, int) else 0)
        except Exception as error:
            _fail(error)
        except KeyboardInterrupt:
            _interrupted()


def _fail(error: Exception) -> NoReturn:
    """One clear sentence on stderr, and the exit code that goes with it."""
    if isinstance(error, click.exceptions.Abort):
        _interrupted()
    if not is_chosen(error):
        _let_rank_0_tell()
    if isinstance(error, click.ClickException):
        error.show()
        sys.exit(error.exit_code)
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    if isinstance(error, ConvertError):
        text, code = str(error), error.exit_code
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        text, code = f"{where}the disk is full; make room and try again", ResourceError.exit_code
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text, code = f"{where}{error.strerror or error}; check the path and its permissions", 1
    elif _is_of_memory(error):
        reason = str(error).strip().partition("\n")[0][:200]
        text = f"there is not enough memory ({reason}); make less of it, or use a machine with more"
        code = ResourceError.exit_code
    else:
        text, code = f"internal error ({error!r}); say --debug for its place and report it", 1
    click.echo(f"error: {text}", err=True)
    sys.exit(code)


def _let_rank_0_tell() -> None:
    """What is wrong for all processes of a launch, rank 0 says, and torchrun ends the others then."""
    if _rank_of_several():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_RANK_0_FIRST)


def _rank_of_several() -> int | None:
    """This process's number, if it is one of several."""
    from gptoss_convert.crew import current_crew

    with contextlib.suppress(ConvertError):  # whose time comes
        crew = current_crew()
        if crew.size > 1:
            return crew.rank
    return None


def _is_of_memory(error: Exception) -> bool:
    """Torch says it in a RuntimeError, on a CPU and on a GPU in other words."""
    said = str(error)
    return (
        isinstance(error, MemoryError) or "DefaultCPUAllocator" in said or "out of memory" in said
    )


def _interrupted() -> NoReturn:
    click.echo("interrupted; run the same command again to go on", err=True)
    sys.exit(INTERRUPTED)


def registry_of(ctx: click.Context) -> Registry:
    """The plugins, as the command line limits them; loaded once."""
    root = ctx.find_root()
    if "registry" not in root.meta:
        root.meta["registry"] = registry = Registry(disabled=root.params.get("no_plugin") or ())
        for plugin in registry.failures:
            click.echo(
                f"warning: plugin {plugin.name!r} of {plugin.distribution} {plugin.version} did "
                f"not load: {plugin.error}",
                err=True,
            )
        for name in registry.unknown:
            click.echo(f"warning: there is no plugin {name!r} to switch on or off", err=True)
    found: Registry = root.meta["registry"]
    return found


def choice_of(
    model: str | None = None,
    codec: str | None = None,
    format_: str | None = None,
    codec_backend: str | None = None,
    codec_option: Sequence[tuple[str, str]] = (),
    scale_rule: str | None = None,
    on_nonfinite: str | None = None,
    **_: Any,
) -> Choice:
    """What a command's options decide about plugins; takes all its options."""
    from gptoss_convert.opening import Choice

    said = [
        ("--codec-backend", "backend", codec_backend),
        ("--scale-rule", "rule", scale_rule),
        ("--on-nonfinite", "on_nonfinite", on_nonfinite),
        *(("--codec-option", name, value) for name, value in codec_option),
    ]
    options: dict[str, tuple[str, str]] = {}
    for flag, name, value in said:
        if value is None:
            continue
        text = f"{flag} {name}={value}" if flag == "--codec-option" else f"{flag} {value}"
        before, other = options.setdefault(name, (value, text))
        if before != value:
            raise click.UsageError(f"{other} and {text} contradict each other; say one of them")
    return Choice(model, codec, format_, {name: value for name, (value, _) in options.items()})


def layout_of(**options: Any) -> Layout:
    """The parallel layout a command's options describe; takes all its options."""
    from gptoss_convert.layout import Layout

    return Layout(**{f.name: options[f.name] for f in fields(Layout) if f.name in options})


def given(ctx: click.Context) -> set[str]:
    """The names of the parameters that stand on the command line."""
    source = click.core.ParameterSource.COMMANDLINE
    return {name for name in ctx.params if ctx.get_parameter_source(name) == source}


def required(value: Any, flag: str) -> Any:
    """The value of a flag that must be given; a usage error without it."""
    if value is None or not str(value):
        raise click.UsageError(f"Missing option '{flag}'.")
    return value


def run_conversion(conversion: Conversion, target: Path, *, as_json: bool, **options: Any) -> None:
    """Convert with progress on stderr, and print the result."""
    from gptoss_convert.report import print_result

    result = converted(conversion, target, **options)
    if result.finished:
        echo_json(result.to_json()) if as_json else print_result(result)


def converted(
    conversion: Conversion,
    target: Path,
    *,
    workers: int | None,
    max_memory: int,
    overwrite: bool,
    no_progress: bool,
    device: str = "cpu",
    **_: Any,
) -> Result:
    """Convert with progress on stderr."""
    from gptoss_convert.crew import current_crew
    from gptoss_convert.progress import reporting

    _import_torch()
    crew = current_crew()
    show = not no_progress and crew.rank == 0
    share = sum(group.nbytes for group in crew.share(conversion.sink(target).groups))
    with reporting(conversion.plan.direction, share, show=show) as progress:
        return conversion.run(
            target,
            workers=workers,
            max_memory=max_memory,
            overwrite=overwrite,
            progress=progress,
            device=device,
            command={"arguments": sys.argv[1:], "folder": os.getcwd()},
        )


def _import_torch() -> None:
    """Hold Ctrl-C back meanwhile: an extension that is interrupted half-loaded swallows it. And look
    for no garbage, then or later, among a million objects that stay: a fifth of the time it takes.

    OpenMP's threads shall sleep between two operations, not spin: the cores are wanted. And glibc
    shall give large memory back at once; by itself it learns to keep it, 20 MB more with every layer.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library needs no telling
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 1 << 17)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    gc.disable()
    try:
        importlib.import_module("torch")
    finally:
        gc.freeze()
        gc.enable()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def echo_json(value: Any) -> None:
    """A result for machines."""
    click.echo(json.dumps(value, indent=2))
