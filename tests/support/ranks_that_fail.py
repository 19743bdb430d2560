"""A rank of two: python -m torch.distributed.run --nproc_per_node=2 ranks_that_fail.py KIND."""

import os
import signal
import time
import warnings

warnings.simplefilter("ignore")

import click
import torch
import torch.distributed as dist

from gptoss_convert.errors import UsageError
from gptoss_convert.layout import Layout
from gptoss_convert.program import Program
from gptoss_plugins.gpt_model.world import world_of


@click.command(cls=Program, invoke_without_command=True)
@click.argument("kind")
def main(kind: str) -> None:
    """Ten sums of both ranks, and then what KIND says."""
    device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    tp = 4 if kind == "too few" else 2
    with world_of(Layout(tp=tp), device) as place:
        rank, x = dist.get_rank(), torch.ones(3, device=place)
        for _ in range(10):
            dist.all_reduce(x)
        if kind == "all fail":
            raise UsageError("all ranks say this")
        if rank == 1:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "leaves":
                os._exit(0)
            elif kind == "stands still":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif kind == "fails":
                raise UsageError("one rank says this")
            elif kind == "breaks":
                raise ValueError("connected to nothing")
        elif kind == "rank 0 stands still":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "slow":
            time.sleep(4)
        dist.all_reduce(x)
    click.echo(f"rank {rank} is done")


if __name__ == "__main__":
    main()
