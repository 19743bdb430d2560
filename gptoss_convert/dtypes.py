"""Data types by their safetensors names (``BF16``), their sizes, and their torch twins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

# safetensors' name -> (bytes per element, torch's name)
_TABLE = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
_BY_TORCH_NAME = {torch_name: name for name, (_, torch_name) in _TABLE.items()}
_SPELLINGS = {"bf16": "BF16", "fp16": "F16", "half": "F16", "fp32": "F32", "float": "F32"}

FLOATS = ("BF16", "F16", "F32", "F64")


def narrowest(dtypes: Iterable[str]) -> str:
    """The smallest floating-point type that holds every value of all of these; BF16 for none."""
    kinds = set(dtypes) or {"BF16"}
    if len(kinds) == 1:
        return kinds.pop()
    return "F64" if "F64" in kinds else "F32"


def itemsize(dtype: str) -> int:
    """Bytes per element of a safetensors dtype name."""
    return _TABLE[dtype][0]


def known(dtype: str) -> bool:
    """Whether ``dtype`` is a safetensors dtype name this project can read."""
    return dtype in _TABLE


def torch_name(dtype: str) -> str:
    """``BF16`` -> ``bfloat16``, as configs and Megatron spell it."""
    return _TABLE[dtype][1]


def torch_dtype(dtype: str) -> torch.dtype:
    """``BF16`` -> ``torch.bfloat16``."""
    import torch

    return getattr(torch, _TABLE[dtype][1])  # type: ignore[no-any-return]


def from_torch_name(name: str) -> str:
    """``bfloat16`` or ``torch.bfloat16`` -> ``BF16``; also the short spellings of flags (``bf16``)."""
    plain = name.removeprefix("torch.").lower()
    try:
        return _SPELLINGS.get(plain) or _BY_TORCH_NAME[plain]
    except KeyError:
        raise UsageError(f"unknown data type {name!r}; use bfloat16, float16 or float32") from None
