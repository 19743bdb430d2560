"""The command line: import, export, plan, inspect, plugins; plugins add more."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

import gptoss_convert
from gptoss_convert.errors import PlanError
from gptoss_convert.options import (
    Bytes,
    Folder,
    common_options,
    decode_options,
    encode_options,
    export_dtype_option,
    hf_model_option,
    hf_path_option,
    keep_scales_option,
    layout_options,
    megatron_option,
    output_option,
    revision_option,
    run_options,
    scales_option,
    torch_dtype_option,
)
from gptoss_convert.program import (
    Program,
    choice_of,
    echo_json,
    given,
    layout_of,
    registry_of,
    required,
    run_conversion,
)

log = logging.getLogger("gptoss_convert")


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


@main.command("import")
@hf_model_option
@revision_option
@megatron_option
@torch_dtype_option
@keep_scales_option
@layout_options
@decode_options
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
    keep_scales: bool,
    dialect: str | None,
    **rest: Any,
) -> None:
    """Hugging Face checkpoint -> Megatron checkpoint.

    --format torch_dist (default) is one checkpoint for every parallel layout; torch is a file per
    rank of the layout that --tp, --pp, --vpp, --ep and --etp name.
    """
    from gptoss_convert.convert import prepare_import

    target = required(megatron_path, "--megatron-path")
    conversion = prepare_import(
        required(hf_model, "--hf-model"),
        torch_dtype=torch_dtype,
        registry=registry_of(ctx),
        choice=choice_of(**rest),
        revision=hf_revision,
        keep_scales=keep_scales,
        layout=layout_of(**rest),
        dialect=dialect,
    )
    run_conversion(conversion, target, **rest)


@main.command("export")
@megatron_option
@hf_path_option
@hf_model_option
@revision_option
@export_dtype_option
@scales_option
@decode_options
@encode_options
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
    scales_from: str | None,
    **rest: Any,
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
        scales_from=scales_from,
        registry=registry_of(ctx),
        choice=choice_of(**rest),
        revision=hf_revision,
    )
    run_conversion(conversion, target, **rest)


@main.command("plan")
@hf_model_option
@revision_option
@megatron_option
@hf_path_option
@output_option
@torch_dtype_option
@export_dtype_option
@scales_option
@keep_scales_option
@layout_options
@decode_options
@encode_options
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
    output: Path | None,
    torch_dtype: str | None,
    export_dtype: str | None,
    scales_from: str | None,
    keep_scales: bool,
    dialect: str | None,
    workers: int | None,
    max_memory: int,
    as_json: bool,
    **rest: Any,
) -> None:
    """What a conversion would do: steps, bytes, disk, memory, and what would keep it from running.

    Reads headers only. With --hf-model an import (to --megatron-path, if given); with --hf-path as
    well, quantizing to --export-dtype, or dequantizing without it; without --hf-model, or with all
    three, an export; with --megatron-path and --output resharding.
    """
    from gptoss_convert.planning import prepare_plan
    from gptoss_convert.report import describe_plan, print_plan

    if not hf_model:
        required(megatron_path, "--megatron-path' or '--hf-model")
    conversion, target = prepare_plan(
        hf_model,
        megatron_path,
        hf_path,
        output,
        torch_dtype=torch_dtype,
        export_dtype=export_dtype,
        scales_from=scales_from,
        keep_scales=keep_scales,
        layout=layout_of(**rest),
        dialect=dialect,
        given=given(ctx),
        registry=registry_of(ctx),
        choice=choice_of(**rest),
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
    as_json: bool,
    **rest: Any,
) -> None:
    """Describe a checkpoint: format, model, sizes, layout, what is missing.

    PATH is any checkpoint folder, or a hub id. No pickle is executed. Exit code 1 if tensors are
    missing or do not fit.
    """
    from gptoss_convert.convert import open_source
    from gptoss_convert.inspection import inspect_source, unreadable
    from gptoss_convert.report import print_inspection

    choice, registry = choice_of(**rest), registry_of(ctx)
    where = required(path or hf_model or megatron_path, "PATH")
    if not {path, hf_model, megatron_path} <= {where, None}:
        raise click.UsageError("PATH, --hf-model and --megatron-path name one checkpoint; give one")
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


@main.command("commit")
@click.argument("target", type=Folder())
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
def commit(target: Path, debug: bool) -> None:
    """Put in place what several processes have made, if the last one could not.

    TARGET is the folder that they were to make. Exit code 5 if parts are missing.
    """
    from gptoss_convert.crew import Crew, as_crew, stored_command

    with as_crew(Crew(commits_only=True)), stored_command(target) as arguments:
        main(arguments, prog_name="gptoss-convert", standalone_mode=False)


@main.command("plugins")
@click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
@click.pass_context
def plugins(ctx: click.Context, as_json: bool, debug: bool) -> None:
    """List the installed plugins and what each offers."""
    from gptoss_convert.report import describe_plugins, print_plugins

    facts = describe_plugins(registry_of(ctx))
    echo_json(facts) if as_json else print_plugins(facts)
