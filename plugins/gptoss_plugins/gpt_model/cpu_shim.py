"""Lets megatron-core's multi-process paths run where there is no CUDA.

megatron-core asks for CUDA by name in its collectives, its pipeline schedules and its optimizer.
Inside ``cuda_means_cpu()`` such requests are answered by the CPU: a ``TorchFunctionMode`` (public
API) rewrites ``device="cuda"`` in every torch call, and a few functions of ``torch.cuda`` that raise
without a driver are replaced for as long as the block lasts. Nothing in megatron-core is touched.
For CPUs only: a GPU program run inside it would be a CPU program.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CPU = torch.device("cpu")
_STREAM_METHODS = (
    "wait",
    "wait_event",
    "wait_stream",
    "synchronize",
    "query",
    "record",
    "record_event",
)


def _names_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


class _CpuForCuda(TorchFunctionMode):
    """Sends factory calls, ``.to("cuda")`` and ``.cuda()`` to the CPU; types are called CUDA's."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {k: CPU if _names_cuda(v) else v for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.to:
            args = tuple(CPU if _names_cuda(a) else a for a in args)
        found = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(found, str):  # which optimizers look at
            return found.replace("torch.", "torch.cuda.")
        return found


class _Idle:
    """A stream, or an event, on a machine that has neither: everything is done already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in _STREAM_METHODS:
            raise AttributeError(name)
        return lambda *_, **__: self


_ANSWERS: dict[str, Any] = {
    "current_device": lambda: CPU,
    "synchronize": lambda *_, **__: None,
    "empty_cache": lambda: None,
    "Stream": _Idle,
    "Event": _Idle,
    "current_stream": _Idle,
    "default_stream": _Idle,
    "stream": lambda _: contextlib.nullcontext(),
    "set_stream": lambda _: None,
    "get_rng_state": lambda *_, **__: torch.get_rng_state(),
    "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    "manual_seed": torch.manual_seed,
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
}


@contextlib.contextmanager
def cuda_means_cpu(*, factories: bool = True) -> Iterator[None]:
    """The block in which CUDA is another word for the CPU.

    Args:
        factories: whether also where a torch call names the device, which pipeline schedules and
            optimizers do. To look at every call costs small operations a third of their time.

    """
    with contextlib.ExitStack() as stack:
        for name, answer in _ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name in ("get_rng_state", "set_rng_state"):  # by its own module, to recompute layers
            stack.enter_context(mock.patch.object(torch.cuda.random, name, _ANSWERS[name]))
        if factories:
            stack.enter_context(_CpuForCuda())
        yield
