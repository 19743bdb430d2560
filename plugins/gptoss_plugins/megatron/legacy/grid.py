"""Which ranks have a file, and which layout a folder of such files is of."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gptoss_convert.errors import CheckpointError, PlanError, UsageError
from gptoss_convert.layout import Layout, Rank, pieces
from gptoss_plugins.megatron.legacy.names import (
    EMBEDDING,
    FILE,
    FINAL_NORM,
    rank_folder,
    rank_numbers,
)
from gptoss_plugins.megatron.legacy.rankfile import RankFile, read
from gptoss_plugins.parallel import gptoss_convert_resharders

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from gptoss_convert.layout import Parameter, Piece

SIZES = {  # fields of Layout, as Megatron-LM's arguments are called
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_MOST_RANKS = 1 << 16


def ranks_with_files(layout: Layout) -> dict[str, Rank]:
    """Folder -> the rank it is of, for all that differ.

    Raises:
        UsageError: ranks that hold different experts' parts would have one name.

    """
    found: dict[str, Rank] = {}
    for rank in layout.coordinates():
        folder = rank_folder(layout, rank)
        if found.setdefault(folder, rank).etp != rank.etp:
            raise UsageError(
                f"--etp {layout.etp} with --tp {layout.tp} and --ep {layout.ep}: {folder} would be "
                f"the file of two ranks with different parts of the experts, because this format's "
                f"names do not count expert tensor parallelism; choose an --etp that divides --tp, "
                f"or --format torch_dist"
            )
    return found


def pieces_of(parameter: Parameter, layout: Layout) -> tuple[Piece, ...]:
    """The pieces that Megatron-LM's ranks have of a parameter."""
    cuts = {resharder.name: resharder for resharder in gptoss_convert_resharders()}
    return pieces(parameter, layout, cuts)


@dataclass(frozen=True)
class Grid:
    """All files of a checkpoint, and their layout.

    Attributes:
        layout: of the files; layers by chunk as the files have them.
        files: which rank each file is of.
        knows_etp: whether the arguments in the files say how experts are cut.

    """

    layout: Layout
    files: Mapping[Rank, RankFile]
    knows_etp: bool

    def with_etp(self, etp: int, problems: list[str]) -> Grid:
        """The same for an expert tensor parallel size that the files do not tell."""
        layout = replace(self.layout, etp=etp)
        by_place = {(r.tp, r.pp, r.ep): file for r, file in self.files.items()}
        return Grid(layout, dict(_placed(layout, by_place, problems)), knows_etp=True)


def read_grid(folder: Path) -> Grid:
    """Read every rank's file in an iteration's folder.

    Raises:
        CheckpointError: naming all files that are missing, damaged, or of another layout.

    """
    numbers = {path.name: rank_numbers(path.name) for path in folder.glob("mp_rank_*")}
    known = {name: found for name, found in sorted(numbers.items()) if found}
    if not known:
        raise CheckpointError(
            f"{folder}: has no mp_rank_TT folder; copy the whole checkpoint again"
        )
    files, problems = _read_all(folder, list(known))
    if problems:
        raise PlanError(str(folder), problems)
    if len({len(found) for found in known.values()}) != 1:
        raise CheckpointError(
            f"{folder}: has files of two layouts ({', '.join(_examples(known))}); remove the stale "
            f"ones"
        )
    sizes = _declared(files)
    places = _places(folder, known, files, sizes)
    layout = _layout(folder, places, sizes)
    by_place = {place: files[name] for name, place in places.items()}
    placed = dict(_placed(layout, by_place, problems))
    layout = replace(layout, vpp=_chunks(placed.values(), problems))
    if layout.vpp > 1 and layout.pp == 1:
        problems.append(f"{FILE}: several chunks on one pipeline stage; write the checkpoint again")
    if problems:
        raise PlanError(str(folder), problems)
    layout = replace(layout, stages=_stages(layout, placed))
    return Grid(layout, placed, knows_etp=bool(sizes))


def _read_all(folder: Path, names: Sequence[str]) -> tuple[dict[str, RankFile], list[str]]:
    files, problems = {}, []
    for name in names:
        try:
            files[name] = read(folder / name / FILE)
        except CheckpointError as error:
            problems.append(str(error).removeprefix(f"{folder}/"))
    return files, problems


def _examples(known: Mapping[str, tuple[int, ...]]) -> list[str]:
    return sorted({len(found): name for name, found in known.items()}.values())


def _declared(files: Mapping[str, RankFile]) -> dict[str, int]:
    """The sizes of the layout that the files' arguments tell; {} if there are none.

    Raises:
        PlanError: the files disagree.

    """
    problems, first = [], next(iter(files))
    wanted = _sizes(files[first].args)
    for name, file in files.items():
        if (found := _sizes(file.args)) != wanted:
            differ = {k: v for k, v in found.items() if wanted.get(k) != v} or "nothing"
            problems.append(
                f"{name}/{FILE}: its args say {differ}, and those of {first} do not; they are of "
                f"two checkpoints, copy them again"
            )
    if problems:
        raise PlanError(str(files[first].path.parents[1]), problems)
    return wanted


def _sizes(args: Mapping[str, Any]) -> dict[str, int]:
    """Sizes by field of Layout. Experts are cut like the rest where nothing else is said."""
    found = {field: args.get(name) for field, name in SIZES.items()}
    if not isinstance(found["tp"], int) or not isinstance(found["pp"], int):
        return {}
    usual = {"tp": 1, "pp": 1, "ep": 1, "etp": found["tp"]}
    return {field: size if isinstance(size, int) else usual[field] for field, size in found.items()}


Place = tuple[int, int, int]  # tp, pp, ep


def _places(
    folder: Path,
    known: Mapping[str, tuple[int, ...]],
    files: Mapping[str, RankFile],
    sizes: Mapping[str, int],
) -> dict[str, Place]:
    """Which rank every folder is of; one number behind the first is a stage's or an expert rank's."""
    count = len(next(iter(known.values())))
    if count == 3:
        return {name: (n[0], n[1], n[2]) for name, n in known.items()}
    if count == 1:
        return {name: (n[0], 0, 0) for name, n in known.items()}
    if _second_is_stage(folder, files, sizes):
        return {name: (n[0], n[1], 0) for name, n in known.items()}
    return {name: (n[0], 0, n[1]) for name, n in known.items()}


def _second_is_stage(folder: Path, files: Mapping[str, RankFile], sizes: Mapping[str, int]) -> bool:
    """What the second number counts: as args say, else every stage has part of the layers' ends."""
    if sizes:
        return sizes["pp"] > 1 or sizes["ep"] == 1
    has = {
        tuple(any(end in chunk for chunk in file.chunks) for end in (EMBEDDING, FINAL_NORM))
        for file in files.values()
    }
    if has == {(True, True)} and len(files) > 1:
        return False
    if (True, True) not in has:
        return True
    raise CheckpointError(
        f"{folder}: the second number in its names may count pipeline stages or expert ranks, and "
        f"neither args nor contents tell which; copy the whole checkpoint again"
    )


def _layout(folder: Path, places: Mapping[str, Place], sizes: Mapping[str, int]) -> Layout:
    tp, pp, ep = (max(numbers) + 1 for numbers in zip(*places.values(), strict=True))
    found = {"tp": tp, "pp": pp, "ep": ep, "etp": 1, **sizes}
    if min(found.values()) < 1 or math.prod(found.values()) > _MOST_RANKS:
        told = ", ".join(f"{name} {size}" for name, size in found.items())
        raise CheckpointError(
            f"{folder}: its {'args' if sizes else 'names'} tell of a layout that cannot be "
            f"({told}); copy the checkpoint again"
        )
    return Layout(found["tp"], found["pp"], ep=found["ep"], etp=found["etp"])


def _placed(
    layout: Layout, files: Mapping[Place, RankFile], problems: list[str]
) -> Iterator[tuple[Rank, RankFile]]:
    """Each file with its rank; those that are missing or too many are noted as problems."""
    try:
        wanted = {(r.tp, r.pp, r.ep): r for r in ranks_with_files(layout).values()}
    except UsageError:
        problems.append(
            f"{FILE}: the files are of tp {layout.tp}, ep {layout.ep}, etp {layout.etp}, where "
            f"ranks with different experts share a name, so that some are lost; save it as "
            f"torch_dist"
        )
        return
    for place, rank in wanted.items():
        if place not in files:
            problems.append(
                f"{rank_folder(layout, rank)}/{FILE}: is missing, and the layout ({layout}) has "
                f"it; copy the whole checkpoint again"
            )
    for place, file in files.items():
        tp, pp, ep = place
        if place in wanted:
            yield wanted[place], file
        elif layout.etp == 1 and tp < layout.tp and pp < layout.pp and ep < layout.ep:
            yield Rank(tp, pp, ep, 0), file
        else:
            problems.append(
                f"{file.path.parent.name}/{FILE}: is of no rank of the layout ({layout}) that the "
                f"files' args tell; remove it if it is another checkpoint's"
            )


def _chunks(files: Any, problems: list[str]) -> int:
    """How many chunks every stage has."""
    counts = {len(file.chunks): file for file in files}
    if len(counts) > 1:
        names = " and ".join(f"{n} in {f.path.parent.name}" for n, f in sorted(counts.items()))
        problems.append(f"{FILE}: has not as many chunks in every file ({names}); copy it again")
    return max(counts, default=1)


def _stages(layout: Layout, files: Mapping[Rank, RankFile]) -> tuple[int, ...]:
    """Layers of every chunk, in the order of the layers: as many as any rank of the stage has."""
    sizes = dict.fromkeys(((v, p) for v in range(layout.vpp) for p in range(layout.pp)), 0)
    for rank, file in files.items():
        for number, chunk in enumerate(file.chunks):
            layers = [
                tensor.stored.layer
                for experts in chunk.values()
                for tensor in experts.values()
                if tensor.stored.layer is not None
            ]
            place = (number, rank.pp)
            sizes[place] = max(sizes[place], max(layers, default=-1) + 1)
    return tuple(sizes.values())
