"""gptoss-convert: checkpoints between Hugging Face and Megatron-Core, compiled from plugins."""

from gptoss_convert.errors import ConvertError
from gptoss_convert.hookspecs import hookimpl
from gptoss_convert.ops import QKV, Concat, Copy, Drop, Experts, PadVocab, Transpose
from gptoss_convert.types import (
    Codec,
    Finding,
    Format,
    ModelFamily,
    Recipe,
    Resharder,
    Rule,
    Shard,
    Spoiled,
    TensorSpec,
    Validator,
)

__version__ = "0.1.0"
__all__ = [
    "QKV",
    "Codec",
    "Concat",
    "ConvertError",
    "Copy",
    "Drop",
    "Experts",
    "Finding",
    "Format",
    "ModelFamily",
    "PadVocab",
    "Recipe",
    "Resharder",
    "Rule",
    "Shard",
    "Spoiled",
    "TensorSpec",
    "Transpose",
    "Validator",
    "hookimpl",
]
