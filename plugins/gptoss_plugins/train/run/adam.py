"""AdamW where megatron-core's distributed optimizer expects Transformer Engine's, and in less memory.

A bfloat16 weight keeps the lower 16 bits of its float32 master weight beside it: 2 bytes in place of 4,
and nothing is lost. Moments are float32 or bfloat16. See ``gptoss_kernels.adamw``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from megatron.core import optimizer as megatron
from megatron.core.optimizer import distrib_optimizer as distributed

from gptoss_kernels import adamw
from gptoss_plugins.train.run import optimizer_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam(torch.optim.Optimizer):
    """What megatron-core's precision-aware distributed optimizer asks of its inner optimizer.

    Gradients are ``param.decoupled_grad``. States of a param: ``exp_avg``, ``exp_avg_sq`` and
    ``master_param``: the remainder of a bfloat16 param, a float32 one itself. In checkpoints the
    latter is float32, and moments are as they are kept, which can change from run to run.

    Attributes:
        grad_scale: what gradients are multiplied with in the next step: to clip them costs no pass.

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> None:
        groups = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "step": 0}
        super().__init__(params, groups)
        self._dtypes = dict(zip(_MOMENTS, (exp_avg_dtype, exp_avg_sq_dtype), strict=True))
        self.grad_scale = 1.0

    def initialize_state(self, param: Tensor) -> None:
        """Moments of zero; the master weight is the param."""
        state = self.state[param]
        for name, dtype in self._dtypes.items():
            state[name] = torch.zeros_like(param, dtype=dtype)
        half = param.dtype == torch.bfloat16
        state["master_param"] = torch.zeros_like(param, dtype=torch.int16) if half else param

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all params that have a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                gradient = getattr(param, "decoupled_grad", None)
                if gradient is None or not param.numel():
                    continue
                if not self.state[param]:
                    self.initialize_state(param)
                self._change(param, gradient, group)

    def _change(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        adamw.step_(
            param,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["master_param"] if param.dtype == torch.bfloat16 else None,
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=group["step"],
            grad_scale=self.grad_scale,
        )

    def stored_dtype(self, name: str) -> torch.dtype:
        """Of a state in checkpoints: a master weight is whole there."""
        return torch.float32 if name == "master_param" else self._dtypes[name]

    def stored_state(self, param: Tensor, name: str, run: slice) -> Tensor:
        """Some elements of a state as checkpoints have it."""
        if not self.state[param]:
            self.initialize_state(param)
        found: Tensor = self.state[param][name].detach()[run]
        is_split = name == "master_param" and param.dtype == torch.bfloat16
        return adamw.join(param.detach()[run], found) if is_split else found

    @torch.no_grad()
    def set_scaled_state(self, param: Tensor, name: str, value: Tensor) -> None:
        """Take over a state of a checkpoint; with the master weight comes the param's."""
        if not self.state[param]:
            self.initialize_state(param)
        if name in _MOMENTS:
            self.state[param][name].copy_(value)
        elif name == "master_param":
            self.set_master(param, slice(None), value)

    @torch.no_grad()
    def set_master(self, param: Tensor, run: slice, value: Tensor) -> None:
        """Some elements of a master weight, and of the param with it."""
        if param.dtype == torch.bfloat16:
            half, remainder = adamw.split(value.to(param.device, torch.float32))
            param[run].copy_(half)
            self.state[param]["master_param"][run].copy_(remainder)
        else:
            param[run].copy_(value)

    @torch.no_grad()
    def forget_masters(self) -> None:
        """The params were changed by somebody else: they are the master weights."""
        for param, state in self.state.items():
            if state and param.dtype == torch.bfloat16:
                state["master_param"].zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Rates and the count of steps; tensors are read in place, or come by ``set_master``."""
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in loaded.items() if name != "params"})
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param)


class PreciseConfig(megatron.OptimizerConfig):  # type: ignore[misc]  # megatron-core is untyped
    """megatron-core's, precision-aware without Transformer Engine, for which it asks at once."""

    def __post_init__(self) -> None:
        self.use_precision_aware_optimizer = True
        self.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        self.store_param_remainders = False  # it is ours to know


@contextlib.contextmanager
def in_place_of_transformer_engines() -> Iterator[None]:
    """Inside, megatron-core makes distributed optimizers of :class:`Adam`, saves and loads them as
    :mod:`.optimizer_state` says.
    """
    answers: dict[str, Any] = {
        "USING_PYTORCH_OPTIMIZER": False,
        "Adam": Adam,
        "is_te_min_version": lambda _: False,
    }
    inside: dict[str, Any] = {"Adam": Adam, "HAVE_APEX_OR_TE": True}
    methods: dict[str, Any] = {
        name: getattr(optimizer_state, name)
        for name in (
            "sharded_param_state_fully_reshardable",
            "load_parameter_state_from_fully_reshardable",
        )
    }
    with (
        mock.patch.multiple(megatron, **answers),
        mock.patch.multiple(distributed, **inside),
        mock.patch.multiple(distributed.DistributedOptimizer, **methods),
    ):
        yield
