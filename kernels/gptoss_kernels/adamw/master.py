"""A float32 weight as a bfloat16 and the 16 bits that it lacks.

The upper half of a float32's bits is a bfloat16, cut off. The lower half, as int16, is negative from
one half of the upper's last place on: then the upper half goes up by one, which makes it the
nearest bfloat16 (of two as near, the one away from zero), and the sign says to take that back. So
every pair of halves is one float32. (Transformer Engine's optimizers keep weights like that, too.)

NaN alone does not come back with the bits it had: cut off or rounded up it could become a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAN = 0x7FC0  # upper half


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 of any shape -> the nearest bfloat16, and the int16 remainder, contiguous.

    Raises:
        ValueError: the tensor is not float32.

    """
    if master.dtype != torch.float32:
        raise ValueError(f"a master weight is float32, not {master.dtype}")
    lower, upper = master.detach().unsqueeze(-1).view(torch.int16).unbind(-1)
    rounded = upper - (lower >> 15)  # the shift gives -1 or 0
    nan = master.isnan()
    param = rounded.masked_fill_(nan, _NAN).contiguous().view(torch.bfloat16)
    return param, lower.masked_fill(nan, 0).contiguous()


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 that ``split`` was given, contiguous.

    Raises:
        ValueError: the two are not bfloat16 and int16 of one shape.

    """
    if (param.dtype, remainder.dtype) != (torch.bfloat16, torch.int16):
        raise ValueError(f"halves are bfloat16 and int16, not {param.dtype} and {remainder.dtype}")
    if param.shape != remainder.shape:
        raise ValueError(f"halves {list(param.shape)} and {list(remainder.shape)} differ in shape")
    upper = param.detach().view(torch.int16) + (remainder >> 15)
    return torch.stack((remainder, upper), -1).view(torch.float32).squeeze(-1)
