"""Running a codec forwards: pieces of tensors in, parts written, losses summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert.dtypes import torch_dtype
from gptoss_convert.errors import ConvertError, EncodeError, PluginError, blame
from gptoss_convert.loss import Loss, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from gptoss_convert.plan import Output
    from gptoss_convert.scratch import Scratch
    from gptoss_convert.types import Codec, GroupWriter, TensorSpec

    Originals = Callable[[], Tensor | None]


class Encoder:
    """Encodes the outputs of one group.

    A writer takes tensors one behind the other, but every piece makes rows of all parts. So the
    first part, by far the largest, goes out as it comes, and the others wait until it is whole.

    Args:
        writer: takes the parts.
        waiting: memory for the parts that wait.

    Attributes:
        losses: what encoding lost, by logical name.

    """

    def __init__(self, writer: GroupWriter, waiting: Scratch) -> None:
        self._writer, self._memory = writer, waiting
        self._waiting: dict[str, Tensor] = {}
        self.losses: dict[str, Loss] = {}

    def write(
        self,
        output: Output,
        rows: slice,
        tensor: Tensor,
        hints: Sequence[Tensor] | None,
        scratch: Scratch,
        originals: Originals | None = None,
    ) -> None:
        """Encode ``rows`` of dim 0 of an output, which come in order, and write what can go.

        Raises:
            ConvertError: the codec cannot hold a value, or broke its contract.

        """
        codec = output.codec
        assert codec is not None
        lead = (rows.stop - rows.start, *output.spec.shape[1:-1])
        if tensor.shape[: len(lead)] != lead:  # an op may leave any shape of the right order
            tensor = tensor.reshape(*lead, output.spec.shape[-1])
        places = [(name, spec, _rows_of(spec, rows, codec)) for name, spec in output.parts]
        memory = [_empty(spec, place, scratch) for _, spec, place in places]
        parts = _encode(codec, output, rows, tensor, hints, memory, originals)
        loss = self.losses.get(output.name, Loss()) + measure(codec, tensor, parts)
        self.losses[output.name] = loss
        self._writer.write(output.parts[0][0], places[0][2], parts[0])
        if rows.start == 0:
            self._memory.reset()
            self._waiting = {
                name: _empty(spec, slice(0, spec.shape[0]), self._memory)
                for name, spec in output.parts[1:]
            }
        for (name, _, place), part in zip(places[1:], parts[1:], strict=True):
            self._waiting[name][place] = part
        if rows.stop == output.spec.shape[0]:
            for name, part in self._waiting.items():
                self._writer.write(name, slice(0, len(part)), part)


def _encode(
    codec: Codec,
    output: Output,
    rows: slice,
    tensor: Tensor,
    hints: Sequence[Tensor] | None,
    memory: Sequence[Tensor],
    originals: Originals | None,
) -> Sequence[Tensor]:
    assert codec.encode is not None
    more = {"originals": originals} if codec.spoiled and originals else {}
    with blame(f"codec {codec.name}"):
        try:
            parts = codec.encode(tensor, hints, memory, **more)
        except EncodeError as error:
            place = f"{output.name}[{rows.start + error.row}]"
            raise ConvertError(f"{place}: {error}") from error
    for (name, spec), part, room in zip(output.parts, parts, memory, strict=True):
        if part.shape != room.shape or part.dtype != room.dtype:
            raise PluginError(
                f"{name}: codec {codec.name} made {part.dtype} {list(part.shape)} where it "
                f"promised {spec.dtype} {list(room.shape)}; report it to its plugin"
            )
    return parts


def _rows_of(spec: TensorSpec, rows: slice, codec: Codec) -> slice:
    """The rows of a part that a piece makes."""
    return rows if codec.sliceable else slice(0, spec.shape[0])


def _empty(spec: TensorSpec, rows: slice, scratch: Scratch) -> Tensor:
    """Memory for rows of a part."""
    count = rows.stop - rows.start
    nbytes = spec.nbytes // spec.shape[0] * count
    return scratch.take(nbytes).view(torch_dtype(spec.dtype)).view(count, *spec.shape[1:])
