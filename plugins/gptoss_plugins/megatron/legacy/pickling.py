"""The pickle of a ``torch.save`` file whose tensors are not there yet.

Same values, same bytes: nothing is remembered by its address (``fast``), as pickles do otherwise.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptoss_plugins.megatron.torchzip import STORAGE, strides

if TYPE_CHECKING:
    from gptoss_convert.types import TensorSpec


@dataclass(frozen=True)
class Promise:
    """Stands for a tensor that will be in a record of its own, ``data/<key>``."""

    key: str
    spec: TensorSpec


@dataclass(frozen=True)
class _Storage:
    promise: Promise


class _Pickler(pickle.Pickler):
    """Writes promises as torch writes tensors."""

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        import torch

        spec = value.promise.spec
        return (
            "storage",
            getattr(torch, STORAGE[spec.dtype]),
            value.promise.key,
            "cpu",
            spec.numel,
        )

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Promise):
            return NotImplemented
        from torch._utils import _rebuild_tensor_v2

        shape = value.spec.shape
        hooks: OrderedDict[str, Any] = OrderedDict()
        return _rebuild_tensor_v2, (_Storage(value), 0, shape, strides(shape), False, hooks)


def dumps(value: Any) -> bytes:
    """Pickle a value with promises in it, in the protocol that torch.save uses."""
    out = io.BytesIO()
    pickler = _Pickler(out, protocol=2)
    pickler.fast = True
    pickler.dump(value)
    return out.getvalue()
