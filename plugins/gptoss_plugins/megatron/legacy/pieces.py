"""Which tensors of which files make a parameter; every misfit is found before any is reported."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gptoss_convert.errors import UsageError
from gptoss_convert.layout import Parameter, Piece, Rank
from gptoss_convert.types import Shard, TensorSpec
from gptoss_plugins.megatron.legacy.grid import Grid, pieces_of
from gptoss_plugins.megatron.legacy.joining import Joined, Part, Shared, same_form
from gptoss_plugins.megatron.legacy.names import EMBEDDING, FILE, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gptoss_plugins.megatron.legacy.rankfile import RankFile, StoredTensor

Holders = dict[Rank, Part]


class Finder:
    """Finds every parameter of a model in a grid of files.

    Attributes:
        problems: what does not fit, each ``<where>: <what is wrong>; <what to do>``.

    """

    def __init__(self, grid: Grid, parameters: Mapping[str, Parameter]) -> None:
        self.problems: list[str] = []
        self._grid, self._parameters = grid, parameters

    def found(self) -> dict[str, Joined]:
        """All that the files hold, by canonical name; what the model does not have as it is."""
        layers, have = self._layers(), sum(self._grid.layout.stages)
        if layers != have:
            self.problems.append(
                f"{FILE}: the files hold {have} layers in all where the config has {layers}; copy "
                f"the whole checkpoint again, or name the right config"
            )
            return {}
        holders = self._holders()
        if not self._grid.knows_etp:
            etp = _expert_parts(holders, self._parameters)
            self._grid = self._grid.with_etp(etp, self.problems)
            holders = self._holders()
        copies = holders.pop(OUTPUT, {}) if OUTPUT not in self._parameters else {}
        joined = {}
        for name, parts in holders.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                joined[name] = Joined(name, next(iter(parts.values())).spec, ())
            elif found := self._joined(parameter, parts, copies if name == EMBEDDING else {}):
                joined[name] = found
        return joined

    def _layers(self) -> int:
        return next((p.layers for p in self._parameters.values() if p.layer is not None), 0)

    def _holders(self) -> dict[str, Holders]:
        """Canonical name -> the ranks that have something of it."""
        found: dict[str, Holders] = {}
        chunks = {(c.pp, c.number): c.first for c in self._grid.layout.chunks(self._layers())}
        for rank, file in self._grid.files.items():
            for number, chunk in enumerate(file.chunks):
                for experts in chunk.values():
                    name = next(iter(experts.values())).stored.at(chunks[rank.pp, number])
                    if part := self._part(file, experts):
                        found.setdefault(name, {})[rank] = part
        return found

    def _part(self, file: RankFile, experts: Mapping[int | None, StoredTensor]) -> Part | None:
        if None in experts and len(experts) == 1:
            return Part(file, (experts[None],), apart=False)
        numbers = sorted(number for number in experts if number is not None)
        tensors = tuple(experts[number] for number in numbers)
        first = next(iter(experts.values()))
        if numbers != list(range(len(experts))) or len({t.spec for t in tensors}) != 1:
            self.problems.append(
                f"{_where(file)}: its experts are not all of one kind from {first.name} on; write "
                f"the checkpoint again"
            )
            return None
        return Part(file, tensors, apart=True)

    def _joined(self, parameter: Parameter, parts: Holders, copies: Holders) -> Joined | None:
        """A parameter's pieces, each with every file that has it."""
        first = next(iter(parts.values()))
        if len(first.spec.shape) != len(parameter.shape):
            self._misfit(first, parameter.name, parameter.shape)
            return None
        if parameter.padded:  # the table is as long as the files have it, padding and all
            rows = first.spec.shape[0] * self._grid.layout.tp
            parameter = replace(parameter, shape=(rows, *parameter.shape[1:]))
        try:
            cut = pieces_of(parameter, self._grid.layout)
        except UsageError:
            self.problems.append(
                f"{parameter.name}: cannot be cut as the files are ({self._grid.layout}); the "
                f"config is another model's"
            )
            return None
        pieces = [Shared(p.box, tuple(self._shares(parameter, p, parts, copies))) for p in cut]
        if not all(piece.parts for piece in pieces):
            return None
        if not same_form([part for piece in pieces for part in piece.parts]):
            self.problems.append(
                f"{parameter.name}: is stored in several types, or by modules of several kinds, in "
                f"different files; copy the whole checkpoint again"
            )
            return None
        return Joined(parameter.name, TensorSpec(parameter.shape, first.spec.dtype), tuple(pieces))

    def _shares(
        self, parameter: Parameter, piece: Piece, parts: Holders, copies: Holders
    ) -> Iterator[Part]:
        """The parts of all ranks that have a piece, if they are what they have to be."""
        holders = [(r, parts.get(r), f) for r, f in self._grid.files.items() if piece.is_on(r)]
        holders += [
            (r, p, p.file) for r, p in copies.items() if piece.owner.get("tp", r.tp) == r.tp
        ]
        for _, part, file in holders:
            if part is None:
                self.problems.append(
                    f"{_where(file)}: has no {parameter.name}, which the layout "
                    f"({self._grid.layout}) gives it; copy the file again"
                )
            elif part.spec.shape != piece.shape:
                self._misfit(part, parameter.name, piece.shape)
            else:
                yield part

    def _misfit(self, part: Part, name: str, wanted: tuple[int, ...]) -> None:
        self.problems.append(
            f"{_where(part.file)}: has {name} in shape {list(part.spec.shape)} where the config and "
            f"the layout ({self._grid.layout}) make it {list(wanted)}; one of them is another "
            f"model's"
        )


def _where(file: RankFile) -> str:
    return f"{file.path.parent.name}/{FILE}"


def _expert_parts(holders: Mapping[str, Holders], parameters: Mapping[str, Parameter]) -> int:
    """How many parts experts are cut into, from the rows that a file has of them; 1 if none do."""
    for name, parts in holders.items():
        parameter = parameters.get(name)
        if parameter and parameter.has_experts and parameter.shard in (Shard.GATED, Shard.COLUMN):
            rows = next(iter(parts.values())).spec.shape[1:2]
            return max(1, parameter.shape[1] // max((*rows, 1)))
    return 1
