"""``launch slurm`` and ``launch local``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from gptoss_convert.errors import UsageError
from gptoss_convert.options import Folder, together
from gptoss_convert.program import INTERRUPTED, echo_json

SCHEMA = "gptoss-convert.launch/1"
_words = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
_debug = click.option("--debug", is_flag=True, help="Show where an error comes from.")
_env = click.option(
    "--env",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Variable for the command, with a value or with that it has here (repeatable).",
)
_dry_run = click.option("--dry-run", is_flag=True, help="Show what would be run, and run nothing.")
_processes = click.option(
    "--nproc-per-node",
    "processes",
    type=click.IntRange(1),
    help="Processes on a node; one per GPU, or what the layout needs, if left out.",
)
_place = together(
    click.option(
        "--nodes", type=click.IntRange(1), help="As few as the layout needs, if left out."
    ),
    click.option(
        "--gpus-per-node",
        "gpus",
        type=click.IntRange(0),
        help="GPUs of a node, a rank on each; 0 for CPUs.",
    ),
    _processes,
    click.option("--cpus-per-task", type=click.IntRange(1), help="CPUs of a launcher or process."),
    click.option(
        "--exclusive/--no-exclusive",
        default=True,
        show_default=True,
        help="Whole nodes, with all their memory.",
    ),
    click.option("--time", help="Time limit, as sbatch takes it."),
    click.option("--partition", help="Partition; the cluster's default if left out."),
    click.option("--account", help="Account that pays."),
    click.option("--name", help="Name of the job; the results' if left out."),
    click.option(
        "--sbatch",
        "further",
        multiple=True,
        metavar="NAME[=VALUE]",
        help="Any other option of sbatch, such as qos=high (repeatable).",
    ),
)
_surroundings = together(
    click.option(
        "--container-image",
        envvar="CONTAINER_IMAGE",
        help="Image for pyxis's srun --container-image; $CONTAINER_IMAGE if left out.",
    ),
    click.option(
        "--container-mounts",
        envvar="CONTAINER_MOUNTS",
        metavar="SRC:DST,...",
        help="What the container sees; $CONTAINER_MOUNTS if left out.",
    ),
    _env,
)


@click.group()
def launch() -> None:
    """Run another command on a Slurm cluster, or on several processes here.

    Behind -- stands any command of gptoss-convert. Training, generate and roundtrip get ranks that
    find each other by torchrun; conversions processes that share the folder; all others one process.
    """


@launch.command("slurm")
@_place
@_surroundings
@click.option(
    "--requeue",
    is_flag=True,
    help="Start again, and go on, after preemption, a node's failure or the time limit.",
)
@click.option(
    "--ahead",
    type=click.IntRange(1),
    help="Seconds before the time limit at which training is told to save; 300, but at most a quarter "
    "of --time, if left out.",
)
@click.option(
    "--array",
    metavar="NUMBERS",
    help="One task per number, as 0-3; %a in COMMAND is the number, %% a %.",
)
@click.option(
    "--job-dir",
    type=Folder(),
    help="Folder for script and log; beside the results, or in $WORKSPACE/results, if left out.",
)
@click.option("--follow", is_flag=True, help="Show the log, and end with the job's exit code.")
@_dry_run
@click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
@_debug
@_words
@click.pass_context
def slurm(
    ctx: click.Context,
    /,
    words: tuple[str, ...],
    nodes: int | None,
    gpus: int | None,
    processes: int | None,
    follow: bool,
    dry_run: bool,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Submit a command to Slurm.

    The script stays beside the results, with the log. Example: launch slurm --time 24:00:00 --requeue
    -- pretrain --recipe 20b checkpoint.save=results/a
    """
    from gptoss_plugins.launch import submit
    from gptoss_plugins.launch.inner import look_at
    from gptoss_plugins.launch.script import is_mounted, render
    from gptoss_plugins.launch.size import size_of

    if follow and (as_json or options["array"]):
        raise UsageError("--follow shows one job's log; leave --json and --array out")
    inner = look_at(ctx, words)
    size = size_of(inner, nodes, gpus, processes)
    request = _request(inner, options)
    text = render(inner, size, request, Path.cwd())
    if request.container_image and not is_mounted(inner.target or Path(), request, Path.cwd()):
        click.echo(
            f"warning: {inner.target} is in no mount of the container, and is gone with it; add its "
            f"folder to --container-mounts",
            err=True,
        )
    job = None
    if not dry_run:
        job = submit.submit(text, request.job_dir, array=bool(request.array))
    if as_json:
        echo_json(
            {
                "schema": SCHEMA,
                "job": job and job.number,
                "script": text,
                "script_file": job and str(job.script),
                "log": job and str(job.log),
                "nodes": size.nodes,
                "gpus_per_node": size.gpus,
                "processes_per_node": size.processes,
                "processes_needed": inner.need,
            }
        )
    elif job is None:
        click.echo(text.encode(errors="surrogateescape"), nl=False)
    elif not follow:
        click.echo(f"submitted job {job.number}: log {job.log}, script {job.script}")
    if job and follow:
        click.echo(f"submitted job {job.number}; Ctrl-C leaves it running", err=True)
        try:
            ctx.exit(submit.follow(job))
        except KeyboardInterrupt:
            click.echo(f"job {job.number} goes on; scancel {job.number} ends it", err=True)
            ctx.exit(INTERRUPTED)


def _request(inner: Any, options: dict[str, Any]) -> Any:
    from gptoss_plugins.launch.inner import workspace
    from gptoss_plugins.launch.request import Request, ahead_of, variables

    env, passed = variables(options.pop("env"))
    ahead = ahead_of(options.pop("ahead"), options["time"])
    name = options.pop("name") or inner.name
    results = os.path.join(workspace(), "results", name.replace("/", "_"))
    if inner.target and not options["array"]:  # each task has another
        results = os.path.abspath(inner.target)  # "." and ".." have no name
    job_dir = (options.pop("job_dir") or Path(f"{results}.launch")).absolute()
    if options["requeue"] and inner.begins_anew:
        click.echo(
            "warning: the job begins anew whenever it starts again; say the same folder as checkpoint.save "
            "and checkpoint.load",
            err=True,
        )
    return Request(job_dir, name, ahead=ahead, env=env, passed=passed, **options)


@launch.command("local")
@_processes
@_env
@_dry_run
@_debug
@_words
@click.pass_context
def local(
    ctx: click.Context,
    words: tuple[str, ...],
    processes: int | None,
    env: tuple[str, ...],
    dry_run: bool,
    debug: bool,
) -> None:
    """Run a command on several processes of this machine.

    As many as its layout needs, or as --nproc-per-node says; the exit code is the command's own.
    """
    from gptoss_plugins.launch.inner import look_at
    from gptoss_plugins.launch.local import command_of
    from gptoss_plugins.launch.request import variables
    from gptoss_plugins.launch.size import size_here

    inner = look_at(ctx, words)
    chosen, _ = variables(env)
    command = command_of(inner, size_here(inner, processes))
    if dry_run:
        before = ["env", *(f"{name}={value}" for name, value in chosen)] if chosen else []
        click.echo(shlex.join([*before, *command]))
    else:
        os.execve(
            command[0], command, {**os.environ, **dict(chosen)}
        )  # signals and the exit code are the launcher's
