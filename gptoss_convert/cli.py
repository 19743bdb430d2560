"""The command line: import, export, plan, inspect, plugins; plugins add more.

Results go to stdout, everything else to stderr. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import importlib
import json
import logging
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import gptoss_convert
from gptoss_convert.errors import ConvertError, PlanError, PluginError
from gptoss_convert.options import (
    Bytes,
    common_options,
    export_dtype_option,
    hf_model_option,
    hf_path_option,
    megatron_option,
    revision_option,
    run_options,
    torch_dtype_option,
)
from gptoss_convert.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger("gptoss_convert")
INTERRUPTED = 130


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
    if isinstance(error, click.ClickException):
        error.show()
        sys.exit(error.exit_code)
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    if isinstance(error, ConvertError):
        text, code = str(error), error.exit_code
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text, code = f"{where}{error.strerror or error}; check the path and its permissions", 1
    else:
        text, code = f"internal error ({error!r}); say --debug for its place and report it", 1
    click.echo(f"error: {text}", err=True)
    sys.exit(code)


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


def _underscores(name: str) -> str:
    return name.replace("_", "-")


@click.group(
    cls=Program,
    context_settings={
        "token_normalize_func": _underscores,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
@click.version_option(gptoss_convert.__version__, prog_name="gptoss-convert")
@click.option(
    "--no-plugin",
    multiple=True,
    is_eager=True,  # so that --help knows
    metavar="NAME",
    help="Leave a plugin out (repeatable).",
)
@click.option("--verbose", "-v", is_flag=True, help="Say more on stderr.")
def main(no_plugin: tuple[str, ...], verbose: bool) -> None:
    """Convert checkpoints between Hugging Face and Megatron-Core.

    Exit codes: 0 ok, 1 failure, 2 wrong usage, 3 mismatch, 4 not enough disk or memory,
    5 incomplete (run the same command again to go on), 130 interrupted.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


def run() -> None:
    """Entry point of ``python -m gptoss_convert``."""
    main(prog_name="gptoss-convert")


def _choice(model: str | None, codec: str | None, format_: str | None) -> Any:
    from gptoss_convert.convert import Choice

    return Choice(model, codec, format_)


@main.command("import")
@hf_model_option
@revision_option
@megatron_option
@torch_dtype_option
@run_options
@common_options
@click.pass_context
def import_(
    ctx: click.Context,
    /,
    hf_model: str | None,
    hf_revision: str | None,
    megatron_path: Path | None,
    torch_dtype: str | None,
    model: str | None,
    codec: str | None,
    format_: str | None,
    **run: Any,
) -> None:
    """Hugging Face checkpoint -> Megatron checkpoint."""
    from gptoss_convert.convert import prepare_import

    target = required(megatron_path, "--megatron-path")
    conversion = prepare_import(
        required(hf_model, "--hf-model"),
        torch_dtype=torch_dtype,
        registry=registry_of(ctx),
        choice=_choice(model, codec, format_),
        revision=hf_revision,
    )
    _run(conversion, target, **run)


@main.command("export")
@megatron_option
@hf_path_option
@hf_model_option
@revision_option
@export_dtype_option
@run_options
@common_options
@click.pass_context
def export(
    ctx: click.Context,
    /,
    megatron_path: Path | None,
    hf_path: Path | None,
    hf_model: str | None,
    hf_revision: str | None,
    export_dtype: str | None,
    model: str | None,
    codec: str | None,
    format_: str | None,
    **run: Any,
) -> None:
    """Megatron checkpoint -> Hugging Face checkpoint.

    The checkpoint carries config and tokenizer from its import; --hf-model names a reference for
    one that does not.
    """
    from gptoss_convert.convert import prepare_export

    target = required(hf_path, "--hf-path")
    conversion = prepare_export(
        required(megatron_path, "--megatron-path"),
        hf_model=hf_model,
        export_dtype=export_dtype,
        registry=registry_of(ctx),
        choice=_choice(model, codec, format_),
        revision=hf_revision,
    )
    _run(conversion, target, **run)


def required(value: Any, flag: str) -> Any:
    """The value of a flag that must be given; a usage error without it."""
    if value is None or not str(value):
        raise click.UsageError(f"Missing option '{flag}'.")
    return value


def _run(
    conversion: Any,
    target: Path,
    *,
    workers: int | None,
    max_memory: int,
    overwrite: bool,
    no_progress: bool,
    as_json: bool,
    **_: Any,
) -> None:
    from gptoss_convert.progress import reporting
    from gptoss_convert.report import print_result

    _import_torch()
    with reporting(conversion.plan, show=not no_progress) as progress:
        result = conversion.run(
            target,
            workers=workers,
            max_memory=max_memory,
            overwrite=overwrite,
            progress=progress,
        )
    echo_json(result.to_json()) if as_json else print_result(result)


def _import_torch() -> None:
    """Hold Ctrl-C back meanwhile: an extension that is interrupted half-loaded swallows it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        importlib.import_module("torch")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@main.command("plan")
@hf_model_option
@revision_option
@megatron_option
@hf_path_option
@torch_dtype_option
@export_dtype_option
@click.option("--workers", type=click.IntRange(1), help="Layers written side by side.")
@click.option("--max-memory", type=Bytes(), default="1GiB", show_default=True, help="In flight.")
@common_options
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    hf_model: str | None,
    hf_revision: str | None,
    megatron_path: Path | None,
    hf_path: Path | None,
    torch_dtype: str | None,
    export_dtype: str | None,
    workers: int | None,
    max_memory: int,
    model: str | None,
    codec: str | None,
    format_: str | None,
    as_json: bool,
    **_: Any,
) -> None:
    """What a conversion would do: steps, bytes, disk, memory. Reads headers only.

    With --hf-model an import (to --megatron-path, if given); with --hf-path, or without --hf-model,
    an export.
    """
    from gptoss_convert.convert import prepare_export, prepare_import
    from gptoss_convert.report import describe_plan, print_plan

    choice, registry = _choice(model, codec, format_), registry_of(ctx)
    if hf_model and not hf_path:
        target = megatron_path
        conversion = prepare_import(
            hf_model,
            torch_dtype=torch_dtype,
            registry=registry,
            choice=choice,
            revision=hf_revision,
            headers_only=True,
        )
    else:
        target = hf_path
        conversion = prepare_export(
            required(megatron_path, "--megatron-path' or '--hf-model"),
            hf_model=hf_model,
            export_dtype=export_dtype,
            registry=registry,
            choice=choice,
            revision=hf_revision,
        )
    facts = describe_plan(conversion, target or Path(), workers, max_memory)
    echo_json(facts) if as_json else print_plan(facts)


@main.command("inspect")
@click.argument("path", required=False, type=str)
@hf_model_option
@revision_option
@megatron_option
@common_options
@click.pass_context
def inspect(
    ctx: click.Context,
    /,
    path: str | None,
    hf_model: str | None,
    hf_revision: str | None,
    megatron_path: Path | None,
    model: str | None,
    codec: str | None,
    format_: str | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Describe a checkpoint: format, model, sizes, layout, what is missing.

    PATH is any checkpoint folder, or a hub id. No pickle is executed. Exit code 1 if tensors are
    missing or do not fit.
    """
    from gptoss_convert.convert import open_source
    from gptoss_convert.inspection import inspect_source, unreadable
    from gptoss_convert.report import print_inspection

    choice, registry = _choice(model, codec, format_), registry_of(ctx)
    where = required(path or hf_model or megatron_path, "PATH")
    try:
        source = open_source(
            where,
            "hf" if hf_model else "megatron" if megatron_path else None,
            registry=registry,
            choice=choice,
            revision=hf_revision,
            headers_only=True,
        )
    except PlanError as error:  # so damaged that there is nothing else to say
        if not as_json:
            raise
        facts = unreadable(str(where), error.problems)
    else:
        facts = inspect_source(source, registry, choice)
    echo_json(facts) if as_json else print_inspection(facts)
    if facts["problems"]:
        ctx.exit(1)


@main.command("plugins")
@click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
@click.pass_context
def plugins(ctx: click.Context, as_json: bool, debug: bool) -> None:
    """List the installed plugins and what each offers."""
    from gptoss_convert.report import describe_plugins, print_plugins

    facts = describe_plugins(registry_of(ctx))
    echo_json(facts) if as_json else print_plugins(facts)


def echo_json(value: Any) -> None:
    """A result for machines."""
    click.echo(json.dumps(value, indent=2))
