"""The records that plugins hand to the core. All are frozen, and importing them imports no torch."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from gptoss_convert import ops
from gptoss_convert.dtypes import itemsize

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from gptoss_convert.layout import Layout, Parameter, Share
    from gptoss_convert.loss import Loss
    from gptoss_convert.plan import ConversionPlan, Group
    from gptoss_convert.scratch import Scratch
    from gptoss_convert.spoiled import Residue

Config = Mapping[str, Any]
Side = Literal["hf", "megatron"]


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before a byte of it is read.

    Attributes:
        shape: sizes, outermost first.
        dtype: safetensors' name of the element type, such as ``BF16``.

    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without any framing."""
        return self.numel * itemsize(self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Shard(enum.Enum):
    """How tensor parallelism cuts a Megatron tensor (below its expert axis, if it has one)."""

    REPLICATED = "replicated"
    COLUMN = "column"  # along the output rows, dim 0
    ROW = "row"  # along the inputs, dim 1
    GATED = "gated"  # along dim 0 of each half of [gate; up]


@dataclass(frozen=True)
class Rule:
    """One line of a mapping table, good for every layer.

    Attributes:
        hf: the Hugging Face tensors and the shapes they must have, in the order the op takes
            them; ``{L}`` in a name stands for the layer. The shape is that of the *logical*
            tensor, after a codec has decoded it.
        megatron: the Megatron parameter; ``{L}`` is the layer, and a trailing ``{E}`` says that
            dim 0 is the expert axis (E parameters, one per expert). Empty for ``Drop``.
        op: the invertible rewrite between the two.
        shard: how tensor parallelism cuts the Megatron tensor.
        also: other names under which Megatron keeps the same tensor; written beside the first,
            and any one of them will do when reading.
        quantizable: whether the Hugging Face tensors are the ones that a quantized checkpoint
            stores in its codec's form.

    """

    hf: Mapping[str, tuple[int, ...]]
    megatron: str
    op: ops.Op = ops.COPY
    shard: Shard = Shard.REPLICATED
    also: tuple[str, ...] = ()
    quantizable: bool = False


@dataclass(frozen=True)
class ModelFamily:
    """A family of models: which checkpoints it knows, its mapping table, its config both ways.

    Attributes:
        name: as in ``--model NAME``.
        architectures: the ``architectures`` entries of ``config.json`` it answers to.
        fields: config fields it needs, with their types; absent ones are reported together.
        rules: ``config -> Rules`` (config is Hugging Face's ``config.json``).
        megatron_config: ``config ->`` megatron-core's ``TransformerConfig`` and ``GPTModel``
            fields, as plain JSON values; ``num_layers`` must be among them.
        hf_config: the inverse, for checkpoints that carry no ``config.json``.
        unquantized: the modules that no codec touches, as ``modules_to_not_convert`` in a
            ``quantization_config`` names them.

    """

    name: str
    architectures: frozenset[str]
    rules: Callable[[Config], Iterable[Rule]]
    megatron_config: Callable[[Config], dict[str, Any]]
    hf_config: Callable[[Config], dict[str, Any]]
    fields: Mapping[str, type | tuple[type, ...]] = field(default_factory=dict)
    unquantized: tuple[str, ...] = ()


class Spoiled(NamedTuple):
    """What decodes to values that are not finite, and so cannot be had back from them.

    Attributes:
        infinite, nan: how many values.
        where: bool, of the first part's shape without its last dim: which of its rows they are in.

    """

    infinite: int
    nan: int
    where: Tensor


@dataclass(frozen=True)
class Codec:
    """A quantized storage form: several stored parts stand for one logical tensor.

    The first five fields read it; a codec that also writes has ``encode``, ``parts`` and
    ``declare``. docs/codecs.md builds one.

    Attributes:
        name: as in ``--codec NAME`` and ``--export-dtype NAME``.
        suffixes: the parts of ``X`` are stored as ``X + suffix``, in this order.
        matches: whether a ``config.json`` declares this codec.
        spec: part specs -> logical spec; raises ``ValueError`` (one sentence) if they do not fit.
        decode: ``decode(parts, out=None) -> Tensor``; ``out`` is a flat tensor of the logical
            dtype and size that may be used for the result. May return a view.
        encode: ``encode(tensor, hints=None, out=None) -> parts``; None if the codec cannot write.
            ``tensor`` has the logical row-major order in any shape whose first sizes are the
            logical ones, and any strides; ``out`` are tensors that may be used for the parts.
            Raises :class:`~gptoss_convert.errors.EncodeError` for values it cannot hold.
        sliceable: dim 0 of the logical tensor is dim 0 of every part, so that rows can be
            decoded and encoded on their own.
        parts: logical spec -> part specs, the inverse of ``spec``; raises ``ValueError``.
        declare: the modules that stay unquantized -> ``quantization_config`` for ``config.json``.
        hints: suffixes of the parts of a *source* without which ``encode`` could not give its
            bytes back. Import keeps them beside the Megatron checkpoint; ``encode`` gets them as
            ``hints`` if there are any, and must not let them change a value.
        options: what a user may set (``--codec-option NAME=VALUE``), with the values to choose
            from, the default first; those that are set go to ``decode`` and ``encode`` as keywords.
        check: called with the options that are set; raises ``ValueError`` if they cannot be met
            on this machine.
        decode_contiguous: like ``decode``, for when the tensor is written as it is: contiguous in
            logical order. Without it ``decode``'s result is copied where it is a view.
        measure: ``measure(tensor, parts) -> Loss``, what encoding lost; without it the parts are
            decoded and compared element by element.
        settle: called with ``cpu`` or ``cuda``, where it works, and all options; those among them
            that leave it a choice (``auto``), with what it chooses there, for the report.
        load: called with ``cpu`` or ``cuda``, ``encodes=`` (or it will decode) and the options that
            are set, in a thread of its own while the first tensors are read: imports and compiles
            what takes long. What it raises is not told; the first use will say.
        spoiled: parts -> what of them decodes to infinity or NaN, or None if nothing does, which
            has to be cheap to see. The user is told, and the bytes are kept beside what ``hints``
            keeps. Then ``encode`` may get ``originals=``, called for the first part as it was
            stored, right where ``spoiled`` said so, or None; bytes that still mean what is in the
            tensor are to come back.

    """

    name: str
    suffixes: tuple[str, ...]
    matches: Callable[[Config], bool]
    spec: Callable[[Sequence[TensorSpec]], TensorSpec]
    decode: Callable[..., Tensor]
    encode: Callable[..., Sequence[Tensor]] | None = None
    sliceable: bool = True
    parts: Callable[[TensorSpec], Sequence[TensorSpec]] | None = None
    declare: Callable[[Sequence[str]], Mapping[str, Any]] | None = None
    hints: tuple[str, ...] = ()
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    check: Callable[..., None] | None = None
    decode_contiguous: Callable[..., Tensor] | None = None
    measure: Callable[[Tensor, Sequence[Tensor]], Loss] | None = None
    settle: Callable[..., Mapping[str, str]] | None = None
    load: Callable[..., None] | None = None
    spoiled: Callable[[Sequence[Tensor]], Spoiled | None] | None = None

    @property
    def writes(self) -> bool:
        """Whether it can encode."""
        return self.encode is not None and self.parts is not None and self.declare is not None


@runtime_checkable
class TensorSource(Protocol):
    """A checkpoint to read from: specs are free, tensors cost I/O. Used by several threads."""

    @property
    def path(self) -> Path:
        """The folder, for messages."""

    @property
    def config(self) -> Config | None:
        """Hugging Face's config of the model, or None where the checkpoint carries none."""

    @property
    def megatron_config(self) -> Config | None:
        """Megatron's fields, where the checkpoint carries them and no Hugging Face config."""

    def hints(self, codec: str) -> TensorSource | None:
        """Where the hints of a codec can be read by their stored names, if they may be here."""

    @property
    def files(self) -> Mapping[str, Path]:
        """Companions of a Hugging Face checkpoint (config, tokenizer, ...): name -> file."""

    def describe(self) -> Mapping[str, Any]:
        """How the checkpoint is laid out, as plain values, for ``inspect``."""

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every model tensor by its Hugging Face or Megatron parameter name."""

    def check(self) -> None:
        """Raise CheckpointError unless all bytes are there; called before a conversion starts."""

    def fingerprint(self) -> str:
        """Changes when the stored bytes may have changed; guards resuming."""

    def read(self, name: str, rows: slice | None = None, scratch: Scratch | None = None) -> Tensor:
        """The tensor, or ``rows`` of its dim 0. Memory may be taken from ``scratch``."""


@dataclass(frozen=True)
class TrainingState:
    """What training left in a checkpoint besides weights; only its own format can carry it.

    Attributes:
        format, dialect: of the checkpoint; "" if nothing can carry it.
        folder: of the iteration.

    """

    format: str
    dialect: str
    folder: Path


@runtime_checkable
class MegatronSource(TensorSource, Protocol):
    """A Megatron checkpoint."""

    @property
    def number(self) -> int:
        """Of its iteration."""

    @property
    def attachments(self) -> Mapping[str, Path]:
        """Files of the iteration that go wherever the weights go: name in its folder -> file."""

    @property
    def state(self) -> TrainingState | None:
        """An optimizer's state and what goes with it, or None."""

    def arrange(self, parameters: Mapping[str, Parameter]) -> None:
        """Learn how the model's parameters are cut; called before ``specs`` and ``read``."""


class GroupWriter(Protocol):
    """Writes one group of a sink: output by output in the plan's order, each from its first row on."""

    def write(self, name: str, rows: slice, tensor: Tensor) -> None:
        """Take ``rows`` of dim 0 of output ``name``; row-major order counts, not the shape."""

    def close(self) -> None:
        """Make the group durable under its final name."""

    def abort(self) -> None:
        """Give up; leave nothing under the final name."""


class TensorSink(Protocol):
    """A checkpoint being written into a staging folder. Groups are independent of each other."""

    @property
    def groups(self) -> Sequence[Group]:
        """What can be written apart, in order; known before the first byte."""

    @property
    def nbytes(self) -> int:
        """Upper bound of the disk space the finished checkpoint takes, in bytes."""

    @property
    def buffer_bytes(self) -> int:
        """Memory one open group holds, in bytes."""

    def done(self, group: Group) -> bool:
        """Whether the group is already complete on disk (from an earlier run)."""

    def open(self, group: Group) -> GroupWriter:
        """Start writing a group."""

    def finish(self) -> None:
        """Write what makes the folder a checkpoint, the mark of completeness last."""


@runtime_checkable
class MegatronSink(TensorSink, Protocol):
    """A Megatron checkpoint being written, which can keep what its weights do not tell."""

    def keep(self, residues: Mapping[str, Residue]) -> None:
        """Put aside, by stored name, bytes of a quantized source; called before ``finish``."""


@dataclass(frozen=True)
class Format:
    """A way to store a checkpoint in a folder.

    Attributes:
        name: as in ``--format NAME``.
        side: whose parameter names it holds, ``hf`` or ``megatron``.
        detect: whether a folder holds this format; must not read tensors or execute anything.
        open: folder -> source.
        create: (staging folder, plan) -> sink; touches no disk before ``open``.
        resolve: (name, revision, headers only) -> local folder, for names that are no folders
            (a hub id); None if the format has no such names.
        dialects: ways to name things that it can write (``--dialect``), the default first.
        preferred: whether it is written where the user names no format of its side.

    """

    name: str
    side: Side
    detect: Callable[[Path], bool]
    open: Callable[[Path], TensorSource]
    create: Callable[[Path, ConversionPlan], TensorSink]
    resolve: Callable[[str, str | None, bool], Path] | None = None
    dialects: tuple[str, ...] = ()
    preferred: bool = False


@dataclass(frozen=True)
class Resharder:
    """One axis of a parallel layout: which rank on it has what of a parameter.

    ``layout.split`` and ``layout.join`` put the axes together; both directions follow from ``cut``.

    Attributes:
        name: the axis, a field of ``Layout``: ``tp``, ``pp``, ``ep`` or ``etp``.
        cut: what each rank of the axis has, ranks that have nothing left out; raises ``UsageError``
            (``stages.must_divide``) if the layout does not divide the parameter.

    """

    name: str
    cut: Callable[[Parameter, Layout], Sequence[Share]]


@dataclass(frozen=True)
class Finding:
    """What a validator has to say: how bad, where, what it means, and how to mend it."""

    severity: Literal["error", "warning", "info"]
    where: str
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Pair:
    """A piece of a tensor of one checkpoint, and the same piece of another.

    Attributes:
        name: the Hugging Face name.
        layer: which layer, or None outside the layers.
        shape: of the whole tensor.
        first: in any shape of the right row-major order; experts, if it has any, are dim 0. Of
            projections with several experts the next dims are ``[in, out]`` where both checkpoints are
            Hugging Face's, else ``[out, in]``, or ``[2, out/2, in]`` with gates before ups.
        second: likewise, in the same shape; None if there is no other checkpoint.
        equal: whether both are the same numbers.
        in_hf_order: whether the dims are as Hugging Face has them.

    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    first: Tensor
    second: Tensor | None
    equal: bool
    in_hf_order: bool


@dataclass(frozen=True)
class Validator:
    """A check that runs with every conversion, or with ``verify``; an ``error`` finding stops it.

    Attributes:
        name: for messages and ``--json``.
        stage: ``plan``: ``check(plan)``, before the first byte. ``tensor``: ``check(plan, name,
            rows, tensor)``, on every piece that is written. ``checkpoint``: ``check(plan,
            folder)``, on the finished folder before it is put in place. With ``verify``, ``model``:
            ``check(first, second)``, of two :class:`~gptoss_convert.logical.Logical` checkpoints, the
            second of them None if there is one only; ``values``: ``check(pair)``, on every
            :class:`Pair` of pieces.
        check: yields findings.

    """

    name: str
    stage: Literal["plan", "tensor", "checkpoint", "model", "values"]
    check: Callable[..., Iterable[Finding]]


@dataclass(frozen=True)
class Recipe:
    """A named training configuration.

    Attributes:
        name: such as ``gpt_oss_20b_sft_config``.
        summary: one line for listings.
        build: keyword arguments -> configuration as plain JSON values. Parameters that it names
            can be given on the command line, as ``peft=null``. For ``train`` the configuration is
            sections of fields, such as ``{"train": {"train_iters": 100}}`` (docs/recipes.md).

    """

    name: str
    summary: str
    build: Callable[..., Mapping[str, Any]]
