"""The batch script of a job: what sbatch is told, what the command gets, and what happens at its end.

Every value stands in it quoted, so that it reaches the command as it was, whatever is in it.
"""

from __future__ import annotations

import re
import shlex
import sys
from typing import TYPE_CHECKING

import gptoss_convert
from gptoss_convert.errors import UsageError
from gptoss_plugins.launch.size import counted
from gptoss_plugins.train.recipes import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from gptoss_plugins.launch.inner import Inner
    from gptoss_plugins.launch.request import Request
    from gptoss_plugins.launch.size import Size

_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+=,*-]+")  # what sbatch reads as it stands
# What the seed's scripts set besides, by kind of data. One rank packs while the others wait.
_ALSO: Mapping[str, Mapping[str, str]] = {
    "pretrain": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    "sft": {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "7200"},
}
_INDENT = "    "

# Waits for the step, however often a signal interrupts that, and ends as it ended.
_END = """\
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
status=$?
"""
_TOLD = """\
ahead='' told=''
trap 'ahead=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # the time limit is near: tell the steps
trap 'told=yes' TERM                                         # scancel, preemption: Slurm has told them
"""
# Slurm takes a preempted job that saves and ends for a finished one. And a lost node breaks the ranks'
# connections long before Slurm misses it.
_AGAIN = """\
lost() { # whether a node is gone; a job that goes on failing is not its fault
    ((${SLURM_RESTART_COUNT:-0} < 10)) &&
        ! timeout 60 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" true
}
preempted() { scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; }
if [[ $ahead ]] || preempted || { ((status)) && [[ ! $told ]] && lost; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
"""
# The last task of an array has the array's number, which to Slurm's programs means all of its tasks.
_JOB, _TASK = '"$SLURM_JOB_ID"', '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
_OVER = """\
if [[ $ahead$told ]]; then echo "told to stop; launch again to go on" >&2; fi
"""


def render(inner: Inner, size: Size, request: Request, folder: Path) -> str:
    """The script.

    Args:
        inner: the command.
        size: what it gets.
        request: what else was asked for.
        folder: where the command runs.

    Raises:
        UsageError: a value cannot be written down.

    """
    options = "".join(f"#SBATCH {option}\n" for option in _options(inner, size, request, folder))
    told, again = _TOLD, _AGAIN
    if request.array:
        told, again = (text.replace(_JOB, _TASK) for text in (told, again))
    parts = [
        f"#!/usr/bin/env bash\n{_comment(inner, size)}{options}set -u\n",
        _environment(inner, request),
        _command(inner, request),
        _launcher(inner, size, request),
        told,
        _step(inner, size, request, folder)
        + _END
        + (again if request.requeue else _OVER)
        + 'exit "$status"\n',
    ]
    return "\n".join(part for part in parts if part)


def _quoted(word: str) -> str:
    """For bash; sbatch takes no script with a line that ends as DOS has it, be it within quotes."""
    return shlex.quote(word).replace("\r", "'$'\\r''")


def _comment(inner: Inner, size: Size) -> str:
    gpus = f" of {counted(size.gpus, 'GPU')}" if size.gpus else ""
    if inner.kind == "ranks":
        what = f"{counted(size.world, 'rank')}; the layout ({inner.layout}) takes {inner.need}"
    elif size.world > 1:
        what = f"{size.world} processes that share the folder"
    else:
        what = "one process"
    return (
        f"# By gptoss-convert {gptoss_convert.__version__}, launch slurm.\n"
        f"# {counted(size.nodes, 'node')}{gpus}: {what}\n"
    )


def _options(inner: Inner, size: Size, request: Request, folder: Path) -> Iterator[str]:
    log = "%A_%a.log" if request.array else "%j.log"
    said: dict[str, object] = {
        "job-name": request.name,
        "nodes": size.nodes,
        "ntasks-per-node": size.processes if inner.kind == "shares" else 1,
        "gpus-per-node": size.gpus or None,
        "cpus-per-task": request.cpus_per_task,
        "exclusive": request.exclusive,
        "mem": 0 if request.exclusive else None,  # all of it
        "time": request.time,
        "partition": request.partition,
        "account": request.account,
        "array": request.array,
        "chdir": str(folder),
        "output": f"{str(request.job_dir).replace('%', '%%')}/{log}",
        "open-mode": "append",  # a job that starts again goes on in its log
        "requeue" if request.requeue else "no-requeue": True,
        "signal": f"B:USR1@{request.ahead}",
    }
    for name, value in said.items():
        if value is True:
            yield f"--{name}"
        elif value is not None and value is not False:
            yield f"--{name}={_for_sbatch(name, str(value))}"
    for word in request.further:
        name, equals, value = word.removeprefix("--").partition("=")
        yield f"--{name}={_for_sbatch(name, value)}" if equals else f"--{name}"


def _for_sbatch(name: str, value: str) -> str:
    """A value as sbatch unquotes it in a script: it is no shell."""
    if not value.isprintable():
        raise UsageError(f"--{name}: {value!r} has characters that cannot stand in a script")
    if _PLAIN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _environment(inner: Inner, request: Request) -> str:
    """What the submission's environment sets goes before, and ``--env`` before that."""
    defaults: Mapping[str, str] = {}
    if inner.config is not None:
        defaults = {**ENVIRONMENT, **_ALSO[inner.config.dataset.kind]}
    lines = [
        f'export {name}="${{{name}-{value}}}"'
        for name, value in sorted(defaults.items())
        if name not in dict(request.env)
    ]
    lines += [f"export {name}={_quoted(value)}" for name, value in request.env]
    if request.cpus_per_task:
        lines.append('export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"')
    return "".join(f"{line}\n" for line in lines)


def _command(inner: Inner, request: Request) -> str:
    quote = _numbered if request.array else _quoted
    return _array("command", (quote(word) for word in inner.words))


def _numbered(word: str) -> str:
    """A word in which %a is the number of the task, and %% a %, as in sbatch's names of files."""
    parts = re.split("(%[a%])", word)
    shown = {"%a": '"$SLURM_ARRAY_TASK_ID"', "%%": "%"}
    return "".join(shown.get(part) or _quoted(part) for part in parts if part) or "''"


def _launcher(inner: Inner, size: Size, request: Request) -> str:
    python = "python" if request.container_image else shlex.quote(sys.executable)
    if inner.kind != "ranks":
        return f"launcher=({python} -m gptoss_convert)\n"
    words = [
        f"{python} -m gptoss_plugins.launch.node",
        f'--nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node={size.processes}',
        '--rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv_backend=c10d',
        '--rdzv_endpoint="$first:$((10000 + SLURM_JOB_ID % 20000))"',
        "-m gptoss_convert",
    ]
    head = 'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
    return head + _array("launcher", words)


def _step(inner: Inner, size: Size, request: Request, folder: Path) -> str:
    """The step in the background, because bash hears no signal while it runs something else."""
    words = ["srun"]
    if inner.kind == "ranks":
        words.append("--kill-on-bad-exit=1")  # the others would wait for it
    words.append("--cpu-bind=none")  # a launcher's ranks share the node's cores
    if request.container_image:
        words.append(f"\\\n{_INDENT}--container-image={_quoted(request.container_image)}")
        words.append(f"\\\n{_INDENT}--container-mounts={_quoted(_mounts(request, folder))}")
        words.append(f"\\\n{_INDENT}--container-workdir={_quoted(str(folder))}")  # else the image's
        if names := [*(name for name, _ in request.env), *request.passed]:
            words.append(
                f"\\\n{_INDENT}--container-env={','.join(names)}"
            )  # before the image's own
        words.append(f"\\\n{_INDENT[:-1]}")
    words += ['"${launcher[@]}"', '"${command[@]}"', "&"]
    return " ".join(words) + "\n"


def is_mounted(path: Path, request: Request, folder: Path) -> bool:
    """Whether what a command writes outlives its container."""
    ends = [mount.split(":")[:2][-1] for mount in _mounts(request, folder).split(",")]
    return any((folder / path).is_relative_to(end) for end in ends)


def _mounts(request: Request, folder: Path) -> str:
    """What was asked for, and the folder of the command: what is in no mount goes with the container."""
    if re.search("[,:]", str(folder)) or folder == folder.parent:
        raise UsageError(
            f"{folder}: cannot be mounted into a container by its name; launch from another folder"
        )
    asked = request.container_mounts
    return f"{asked},{folder}:{folder}" if asked else f"{folder}:{folder}"


def _array(name: str, words: Iterator[str] | list[str]) -> str:
    return f"{name}=(\n" + "".join(f"{_INDENT}{word}\n" for word in words) + ")\n"
