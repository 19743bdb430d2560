"""Copying out of transposed views, at which plain strided copies are several times slower.

By a compiled kernel where numba is installed and there is enough to copy, else by numpy.
"""

from __future__ import annotations

import functools
import itertools
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1 << 16  # elements; with fewer a strided copy is as good
_COMPILED = 64  # copies after which loading numba, half a second, is worth it
_STEPS = (1, 2)  # between the elements of a column, in elements
_copied = itertools.count()


def copy(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)``, for a target of the source's shape and dtype.

    Fast where the target is contiguous, elements have two bytes, and those of a column of the
    source, ``source[:, a]`` or ``source[:, a, b]``, stand side by side in memory, or with one
    between them.
    """
    if source.device.type != "cpu":
        target.copy_(source)
    elif source.numel() < _LEAST or source.itemsize != 2 or not target.is_contiguous():
        _plain(target, source)
    elif source.dim() > 2 and source.stride(0) > max(_STEPS):
        for to, part in zip(target.unbind(0), source.unbind(0), strict=True):
            copy(to, part)
    elif source.dim() < 2 or source.stride(0) not in _STEPS or source.is_contiguous():
        _plain(target, source)
    else:
        _transposed(target, source)


def _transposed(target: Tensor, source: Tensor) -> None:
    if next(_copied) >= _COMPILED and _has_numba():
        from gptoss_convert.transpose.compiled import copy_columns

        copy_columns(_integers(target), _integers(source))
        return
    from gptoss_convert.transpose.words import copy_words, find_words

    if (found := find_words(source)) is None:
        _plain(target, source)
        return
    _plain(target[: found.head], source[: found.head])
    copy_words(_integers(target[found.head : found.stop]), found)
    _plain(target[found.stop :], source[found.stop :])


@functools.cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


def _plain(target: Tensor, source: Tensor) -> None:
    """By numpy: torch would spread it over threads, and they wait for the next one at full speed."""
    import numpy as np

    np.copyto(_integers(target), _integers(source))


def _integers(tensor: Tensor) -> Any:
    """As numpy's integers: it knows no bfloat16."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.itemsize]).numpy()
