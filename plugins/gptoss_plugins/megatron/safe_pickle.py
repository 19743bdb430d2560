"""Reading the pickles of a Megatron checkpoint without executing anything.

Every global a pickle may ask for is on a list here and is answered with an inert stand-in of ours;
anything else is refused. No class of torch or Megatron is imported or called, so a stranger's
pickle can at most build a tree of plain values.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptoss_convert.dtypes import from_torch_name, known
from gptoss_convert.errors import CheckpointError, UsageError
from gptoss_plugins.megatron.pickle_limits import require_bounded

if TYPE_CHECKING:
    from collections.abc import Callable

_STORAGES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}


class Inert:
    """Stands for an object of another library: what it was built from, and its state."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update((k, v) for k, v in part.items() if isinstance(k, str))

    def __repr__(self) -> str:  # without what is in it, which may have no end
        return type(self).__name__


class Mapped(dict[Any, Any]):
    """A dict whose attributes, such as the ``_metadata`` of a module's state, are of no use here."""

    def __setstate__(self, state: Any) -> None:
        """Forget them."""


@dataclass(frozen=True)
class TensorRecord:
    """What a pickle says of a tensor: sizes and strides in elements, and which storage it is in."""

    dtype: str
    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _StorageRecord:
    dtype: str
    key: str


def _sizes(numbers: Any) -> tuple[int, ...]:
    """A shape, or what else has a few numbers, none of which passes C's largest."""
    found = tuple(numbers)
    if len(found) > 64 or not all(type(n) is int and abs(n) < 1 << 63 for n in found):
        raise ValueError("a shape that is none")
    return found


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRecord:
    if not isinstance(storage, _StorageRecord):
        raise ValueError("a tensor without a storage")
    (start,), sizes, steps = _sizes((offset,)), _sizes(shape), _sizes(strides)
    if len(sizes) != len(steps):
        raise ValueError("a tensor with other strides than dims")
    return TensorRecord(storage.dtype, storage.key, start, sizes, steps)


def _rebuild_typed(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRecord:
    """A tensor of a type that has no storage class of its own; the type comes last but one or two."""
    found = _rebuild(storage, offset, shape, strides)
    dtype = next((value for value in rest if isinstance(value, str)), None)
    if dtype is None or not known(dtype):
        raise ValueError("a tensor without an element type")
    return TensorRecord(dtype, found.key, found.offset, found.shape, found.strides)


def _data_of(tensor: Any, *_: Any) -> TensorRecord:
    """A parameter: its data."""
    if not isinstance(tensor, TensorRecord):
        raise ValueError("a parameter without a tensor")
    return tensor


def _of_type(rebuild: Any, _: Any, arguments: Any, *__: Any) -> TensorRecord:
    """A tensor of a subclass: as a tensor. Only our own stand-ins can be called."""
    if not isinstance(rebuild, _Function) or rebuild.answer not in _REBUILDS:
        raise ValueError("a tensor that is rebuilt in an unknown way")
    found: TensorRecord = rebuild(*arguments)
    return found


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, as the second pickle protocol stores them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin1")


def _named(*names: Any) -> str:
    """``cuda:0``, or the name of a memory layout."""
    if not all(isinstance(name, str | int) for name in names):
        raise ValueError("a device or layout without a name")
    return ":".join(map(str, names))


class _Function:
    """A function that a pickle may call, but not give attributes, as it may any object."""

    __slots__ = ("answer",)

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    def __call__(self, *arguments: Any) -> Any:
        return self.answer(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a function with a state")


_REBUILDS = (_rebuild, _rebuild_typed, _data_of)


_DCP = "torch.distributed.checkpoint.metadata"
_INERT = {
    (_DCP, "Metadata"),
    (_DCP, "TensorStorageMetadata"),
    (_DCP, "TensorProperties"),
    (_DCP, "ChunkStorageMetadata"),
    (_DCP, "BytesStorageMetadata"),
    (_DCP, "MetadataIndex"),
    (_DCP, "StorageMeta"),
    (_DCP, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    *(  # megatron-core keeps the writers' plans in .metadata
        ("torch.distributed.checkpoint.planner", name)
        for name in (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        )
    ),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("datetime", "timedelta"),
    ("signal", "Signals"),
    # What per-rank checkpoints hold besides weights: states of random generators, FP8 scales of
    # Transformer Engine, and functions among the arguments.
    ("_io", "BytesIO"),
    ("functools", "partial"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
    ("torch._C", "_VariableFunctionsClass"),
    *(("builtins", name) for name in ("bytearray", "complex", "getattr", "object", "range")),
    *(("builtins", name) for name in ("bool", "bytes", "float", "int", "list", "str", "tuple")),
}
_FUNCTIONS = ("torch.nn.functional", "torch.nn.init", "torch._C._nn")  # named, never called
_OLD_NAMES = {"__builtin__": "builtins"}  # of modules, in the second pickle protocol
_TYPES: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): Mapped,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "slice"): slice,
    ("builtins", "dict"): dict,
}
_FUNCTIONS_CALLED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "defaultdict"): lambda *_: Mapped(),
    ("torch", "Size"): _sizes,
    ("torch", "device"): _named,
    ("torch.serialization", "_get_layout"): _named,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _data_of,
    ("torch._utils", "_rebuild_parameter_with_state"): _data_of,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("_codecs", "encode"): _encoded,
}
_ANSWERS: dict[tuple[str, str], Any] = {
    **_TYPES,
    **{name: _Function(answer) for name, answer in _FUNCTIONS_CALLED.items()},
}


def _stand_in(module: str, name: str) -> Any:
    """The answer to a global, or None if it is not on the list."""
    module, name = _OLD_NAMES.get(module, module), {"xrange": "range"}.get(name, name)
    if "." in name:  # what a module has imported, such as os.system, by a detour
        return None
    if (module, name) in _ANSWERS:
        return _ANSWERS[module, name]
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return _STORAGES[name]
    if (module, name) in _INERT or module.split(".")[0] == "megatron" or module in _FUNCTIONS:
        return type("".join(c for c in name if c.isprintable())[:99], (Inert,), {})
    if module == "torch":
        try:
            return from_torch_name(name)
        except UsageError:
            return None
    return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where
        self._known: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            answer = _stand_in(module, name)
            if answer is None:
                raise CheckpointError(
                    f"{self._where}: its pickle asks for {module}.{name}, which no checkpoint "
                    f"needs; do not use this file"
                )
            self._known[module, name] = answer
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, _ = pid
        texts = all(isinstance(part, str) for part in (kind, dtype, key))
        if not texts or kind != "storage" or not known(dtype):
            raise ValueError("an unknown persistent object")
        return _StorageRecord(dtype, key)


def load(data: bytes, where: str) -> Any:
    """Unpickle into plain values and inert stand-ins.

    Raises:
        CheckpointError: the pickle is damaged, or asks for something not on the list.

    """
    try:
        require_bounded(data)
        return _Unpickler(data, where).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(
            f"{where}: is no readable pickle ({type(error).__name__}: {error}); the file is damaged, fetch it again"
        ) from None


def load_tensor_record(data: bytes, where: str) -> TensorRecord:
    """Unpickle what must be one tensor."""
    record = load(data, where)
    if not isinstance(record, TensorRecord):
        raise CheckpointError(
            f"{where}: holds {type(record).__name__} where a tensor is due; fetch it again"
        )
    return record
