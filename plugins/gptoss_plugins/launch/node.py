"""The launcher of a node: torchrun, except that SIGTERM is the ranks' own affair.

    python -m gptoss_plugins.launch.node ARGUMENTS OF TORCHRUN

torchrun by itself kills its ranks 30 seconds after SIGTERM, however long they need for a checkpoint, and
then fails. This passes the signal on, waits for as long as they take, and ends as they end: with 0 if
they do, or else with the exit code of the first that failed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_OTHERS = "SIGINT,SIGHUP,SIGQUIT"  # on which torchrun ends its ranks as it likes
_ALONE = ("1", "1:1")
_TOGETHER = 10  # seconds for other nodes to fail for the same reason, before srun ends them all
_LEVEL = "TORCH_CPP_LOG_LEVEL"
_SIGNAL = 128  # an exit code above it is a signal's number, as shells have it
_PARENT = 1  # field of /proc/PID/stat behind the name, counted from the state


def launch(arguments: Sequence[str]) -> int:
    """Run the node's ranks.

    Args:
        arguments: as torchrun takes them.

    Returns:
        the exit code.

    """
    with _quiet():
        importlib.import_module("torch")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # the ranks say themselves, and shorter, what is wrong
    parsed = run.parse_args(list(arguments))
    parsed.signals_to_handle = _OTHERS  # an older torch does not know it
    signal.signal(signal.SIGTERM, _pass_on)
    try:
        try:
            run.run(parsed)
        finally:  # the ranks are done; srun, which ends all nodes when one fails, changes no exit code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except ChildFailedError as error:
        if parsed.nnodes not in _ALONE:
            time.sleep(_TOGETHER)
        return _code_of(error)
    except SignalException as error:
        return _SIGNAL + int(error.sigval)
    except RendezvousError as error:
        print(
            f"error: the nodes' launchers did not find each other at {parsed.rdzv_endpoint} ({error}); "
            f"look whether all of them started, and whether the others can reach the first",
            file=sys.stderr,
        )
        return 1
    return 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is imported in it warns of nothing from C++: of the nodes' store, which goes with the first
    node that is done, by pages. The ranks' own warnings stay.
    """
    if _LEVEL in os.environ:
        yield
        return
    os.environ[_LEVEL] = "ERROR"
    try:
        yield
    finally:
        del os.environ[_LEVEL]


def _pass_on(number: int, _: object) -> None:
    children = list(_children())
    if not children:  # the nodes are still looking for each other
        sys.exit(_SIGNAL + number)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


def _children() -> Iterator[int]:
    """Ids of this process's children."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[_PARENT]) == os.getpid():
                yield int(stat.parent.name)


def _code_of(error: object) -> int:
    """The first failed rank's exit code; what a signal ended has nobody else to say so."""
    rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
    code = int(failure.exitcode)
    if code >= 0:
        return code
    print(f"error: rank {rank} was ended by {failure.signal_name()}", file=sys.stderr)
    return _SIGNAL - code


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
