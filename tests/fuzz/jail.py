"""Commands in children that have little memory and little time, and whose every effect is told.

This file, run as a script, is a server that has torch loaded and forks a child per command. It
stands apart from the one of test_crash.py, which ends runs at a step and looks at nothing else.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

MEMORY = 2 << 30  # bytes of address space that a command may take beyond what Python and torch have
SECONDS = 60
# What a run would otherwise import in every child.
LOADED = (
    "torch",
    "yaml",
    "safetensors.torch",
    "gptoss_convert.inspection",
    "gptoss_convert.planning",
    "gptoss_convert.progress",
    "gptoss_convert.report",
    "gptoss_plugins.huggingface.sink",
    "gptoss_plugins.huggingface.source",
    "gptoss_plugins.megatron.sink",
    "gptoss_plugins.megatron.source",
    "gptoss_plugins.megatron.legacy.sink",
    "gptoss_plugins.megatron.legacy.source",
    "gptoss_kernels.mxfp4",
)
# Python's names (docs.python.org/3/library/audit_events.html) for what runs a stranger's code.
RUNS = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system")
FORBIDDEN = (*RUNS, "pickle.find_class", "socket.connect", "subprocess.Popen", "webbrowser.open")
# Those that change the disk, each with its first argument the path.
CHANGES = ("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink")


def serve(log: Path) -> None:
    """Answer commands, a JSON line each, until standard input ends."""
    sys.modules["numba"] = None  # type: ignore[assignment]  # it reads pickles, of what it compiled
    from gptoss_convert.registry import Registry

    for name in LOADED:
        importlib.import_module(name)
    Registry().commands()
    for line in sys.stdin:
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line), log)
        status = _wait(pid, started + SECONDS)
        seconds = time.monotonic() - started
        print(
            json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": seconds}), flush=True
        )


def _wait(pid: int, until: float) -> int:
    ended = os.pidfd_open(pid)
    if not select.select([ended], [], [], max(0.0, until - time.monotonic()))[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(ended)
    return os.waitpid(pid, 0)[1]


def _child(argv: list[str], log: Path) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from gptoss_convert.cli import main

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    told = os.open(log / "events", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    sys.addaudithook(lambda event, arguments: _tell(told, event, arguments))
    sys.argv = ["gptoss-convert", *argv]
    code: Any = 70
    try:
        main(argv, prog_name="gptoss-convert")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell(told: int, event: str, arguments: tuple[Any, ...]) -> None:
    """Write an event down; this way it stays even if the command dies."""
    if event in FORBIDDEN:
        line = ("forbidden", f"{event} {arguments!r}"[:500])
    elif event in CHANGES or (
        event == "open" and arguments[2] & os.O_ACCMODE and not isinstance(arguments[0], int)
    ):
        line = ("changed", str(arguments[0]))
    else:
        return
    os.write(told, (json.dumps(line) + "\n").encode())


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
