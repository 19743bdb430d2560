"""Pickles that would do something, in every place where a pickle can stand; and those without end."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss_convert.errors import CheckpointError
from gptoss_plugins.megatron import metadata, safe_pickle
from gptoss_plugins.megatron.metadata import Contents, Stored, StoredChunk, Tensor

LONG = "GPTOSS_FUZZ_SECONDS" in os.environ
ITER = "iter_0000000"
RANK = f"{ITER}/mp_rank_01"


class Evil:
    """Unpickled by a trusting reader, it makes a file."""

    def __init__(self, path: Path, how: str) -> None:
        self._call: tuple[Callable[..., Any], tuple[Any, ...]] = {
            "mknod": (os.mknod, (str(path),)),
            "system": (os.system, (f"touch {path}",)),
            "eval": (eval, (f"__import__('os').mknod({str(path)!r})",)),
            "popen": (subprocess.Popen, (["touch", str(path)],)),
        }[how]

    def __reduce__(self) -> Any:
        return self._call


def by_a_detour(path: Path) -> bytes:
    """``os.mknod`` as an attribute of a module whose name is on the list."""
    call = b"\x80\x04\x8c\x13megatron.core.utils\x8c\x08os.mknod\x93"
    text = str(path).encode()
    return call + b"X" + struct.pack("<I", len(text)) + text + b"\x85R."


def zipped(pickled: bytes, *, packed: bool = False) -> bytes:
    """As torch.save puts a pickle into its archive; or compressed, as it never does."""
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", kind) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", bytes(64))
    return out.getvalue()


def unzipped(pickled: bytes) -> bytes:
    """As torch.save wrote before 1.6: magic number, protocol, machine, and then the object."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in head) + pickled + pickle.dumps([], 2)


# ---- the places


def edit(root: Path, change: Callable[[Contents], Contents]) -> None:
    path = root / ITER / ".metadata"
    path.write_bytes(metadata.dump(change(metadata.load(root / ITER))))


def added(root: Path, file: str, data: bytes, *, tensor: str = "", obj: str = "") -> None:
    """A further data file, and what .metadata says is in it."""
    (root / ITER / file).write_bytes(data)
    at = Stored(file, 0, len(data))

    def change(contents: Contents) -> Contents:
        tensors, objects = dict(contents.tensors), dict(contents.objects)
        if tensor:
            spec = tensors["decoder.final_layernorm.weight"].spec
            chunk = StoredChunk((0,), spec.shape, at)
            tensors[tensor] = Tensor(spec, (chunk,))
        if obj:
            objects[obj] = at
        return Contents(tensors, objects)

    edit(root, change)


def no_config(root: Path, *more: str) -> None:
    for name in ("huggingface/config.json", *more):
        (root / ITER / name).unlink()


def in_metadata(root: Path, data: bytes, archive: Any) -> None:
    (root / ITER / ".metadata").write_bytes(data)


def in_common(root: Path, data: bytes, archive: Any) -> None:
    no_config(root, "run_config.yaml")
    (root / ITER / "common.pt").write_bytes(archive(data))


def in_common_object(root: Path, data: bytes, archive: Any) -> None:
    no_config(root, "run_config.yaml", "common.pt")
    added(root, "__c.distcp", archive(data), obj="common_state/shard_0_1")


def in_train_state(root: Path, data: bytes, archive: Any) -> None:
    tensor = io.BytesIO()
    torch.save(torch.zeros(64), tensor)
    added(root, "__o.distcp", tensor.getvalue(), tensor="optimizer.state.exp_avg.x")
    for path in (root / ITER / "train_state.pt", root / "latest_train_state.pt"):
        path.write_bytes(archive(data))


def in_weight(root: Path, data: bytes, archive: Any) -> None:
    added(root, "__w.distcp", archive(data), tensor="decoder.final_layernorm.weight")


def in_optimizer(root: Path, data: bytes, archive: Any) -> None:
    added(root, "__o.distcp", archive(data), tensor="optimizer.state.exp_avg.x")


def in_rng_state(root: Path, data: bytes, archive: Any) -> None:
    tensor = io.BytesIO()
    torch.save(torch.zeros(64), tensor)
    added(root, "__o.distcp", tensor.getvalue(), tensor="optimizer.state.exp_avg.x")
    added(root, "__r.distcp", archive(data), obj="rng_state/shard_0_1")


def in_extra_state(root: Path, data: bytes, archive: Any) -> None:
    (root / ITER / "__extra_state.distcp").write_bytes(archive(data).ljust(4096, b"\0"))


def in_rank(root: Path, data: bytes, archive: Any) -> None:
    (root / RANK / "model_optim_rng.pt").write_bytes(archive(data))


def in_rank_optimizer(root: Path, data: bytes, archive: Any) -> None:
    (root / RANK / "distrib_optim.pt").write_bytes(archive(data))


PLACES: dict[Any, str] = {  # and the form of checkpoint
    in_metadata: "torch_dist",
    in_common: "torch_dist",
    in_common_object: "torch_dist",
    in_train_state: "torch_dist",
    in_weight: "torch_dist",
    in_optimizer: "torch_dist",
    in_rng_state: "torch_dist",
    in_extra_state: "torch_dist",
    in_rank: "torch",
    in_rank_optimizer: "torch",
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_nothing_is_executed(
    place: Any, forms: dict[str, Path], tmp_path: Path, attempt: Any
) -> None:
    proof, trace = tmp_path / "proof", tmp_path / "trace"
    pickle.loads(pickle.dumps(Evil(proof, "mknod")))
    assert proof.exists(), "this payload would not have shown anything"
    source = tmp_path / "source"
    handing = ("export", "reshard")
    for how, archive, tried in (
        ("mknod", zipped, ("inspect", "plan", *handing)),
        ("system", unzipped, handing),
    ):
        shutil.copytree(forms[PLACES[place]], source)
        place(source, pickle.dumps({"args": Evil(trace, how), "model": {}}, 2), archive)
        done = attempt(
            PLACES[place],
            source,
            lambda c, tried=tried: LONG or (c[0] in tried and "--json" in c),
        )
        refused = [ended for ended in done if ended.code]
        if place is not in_extra_state and place is not in_rank_optimizer:  # which no one reads
            assert refused
            told = "which no checkpoint needs" if archive is zipped else "torch.save had before 1.6"
            if place is not in_metadata:
                assert any(told in ended.stderr for ended in refused), refused[0].stderr
        assert not trace.exists()
        shutil.rmtree(source)


def test_a_module_s_modules_are_not_reached(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(CheckpointError, match=r"megatron\.core\.utils\.os\.mknod, which no"):
        safe_pickle.load(by_a_detour(trace), "x")
    assert not trace.exists()


@pytest.mark.slow
def test_megatron_core_is_handed_no_pickle_of_a_stranger(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    """megatron-core would execute them; what it is given instead says the same."""
    pytest.importorskip("megatron.core")
    from megatron.core import dist_checkpointing

    from gptoss_plugins.gpt_model.own_pickles import with_own_pickles

    source = Path(shutil.copytree(forms["torch_dist"], tmp_path / "source"))
    before = dist_checkpointing.load_tensors_metadata(str(source / ITER))
    with with_own_pickles(source / ITER) as copy:
        after = dist_checkpointing.load_tensors_metadata(str(copy))
        said = dist_checkpointing.load_content_metadata(str(copy))
    assert {k: v.global_shape for k, v in after.items()} == {
        k: v.global_shape for k, v in before.items()
    }
    assert said == dist_checkpointing.load_content_metadata(str(source / ITER))
    data, trace = pickle.dumps({"args": Evil(tmp_path / "trace", "mknod")}, 2), tmp_path / "trace"
    torch.save({"args": Evil(trace, "mknod")}, source / ITER / "common.pt")
    refused = pytest.raises(CheckpointError, match="which no checkpoint needs")
    with refused, with_own_pickles(source / ITER):
        pass
    in_metadata(source, data, zipped)
    with refused, with_own_pickles(source / ITER):
        pass
    assert not trace.exists()


# ---- pickles without end


DEEP = 1_000_000
GROWING = b"\x80\x04)\x94" + b"".join(
    b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(60)
)  # every tuple holds the one before it twice
ENDLESS = {
    "a tuple in a tuple": b"\x80\x04}" + b")" + b"\x85" * DEEP + b"K\x01s.",
    "tuples of tuples as a key": b"\x80\x04}" + GROWING[2:] + b"K\x01s.",
    "tuples of tuples in a set": b"\x80\x04\x8f(" + GROWING[2:] + b"\x90.",
    "tuples of tuples by DUP": b"\x80\x04})" + b"2\x86" * 60 + b"K\x01s.",
    "tuples kept past a BUILD": b"\x80\x04})" + b"2\x86Nb" * 60 + b"K\x01s.",
    "an entry far out in the memo": b"\x80\x04]r\xff\xff\xff\x7f.",
    "an entry far out, as text": b"\x80\x00(lp2147483000\n.",
    "text that is not there": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "bytes that are not there": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".",
    "a number of many digits": b"\x80\x00L" + b"9" * 100_000 + b"L\n.",
    "no end": b"\x80\x04" + b"]0" * 1000,
    "nothing": b"",
    "a shape of many dims": b"\x80\x02ctorch\nSize\n((" + b"K\x01" * 99 + b"ttR.",
    "a shape of shapes": b"\x80\x02ctorch\nSize\n))\x85\x85R.",
    "a function with attributes": b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00xK\x01sb.",
    "a function with defaults": (
        b"\x80\x02c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__)s\x86b."
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_pickle_is_refused_at_once(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"^x: is no readable pickle"):
        safe_pickle.load(ENDLESS[name], "x")
    assert time.monotonic() - started < 10


def test_what_picklers_write_is_within_the_limits() -> None:
    """Every protocol, what is shared and what holds itself included."""
    again: list[Any] = [1]
    again.append(again)
    shared = (0.9, 0.95)
    value = {
        "text": "x" * 300,
        "bytes": b"y" * 70_000,
        ("a", ("b", 2)): [shared] * 100,
        "sets": [{1, 2}, frozenset([3])],
        "numbers": [2**100, -5, None, True, 1.5],
        "random": (3, tuple(range(625)), None),
        "again": again,
    }
    for protocol in range(6):
        found = safe_pickle.load(pickle.dumps(value, protocol), "x")
        assert found.pop("again")[1][1][1][0] == 1
        assert found == {name: part for name, part in value.items() if name != "again"}


# ---- archives that lie


def patched(data: bytes, at: int, kind: str, value: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(kind, out, at % len(out), value)
    return bytes(out)


PLAIN = zipped(pickle.dumps({"args": None}, 2))
DIRECTORY = PLAIN.index(b"PK\1\2")
END = PLAIN.rindex(b"PK\5\6")
LIES = {
    "a bomb": zipped(pickle.dumps("0" * 200_000_000, 4), packed=True),
    "a compressed pickle": zipped(pickle.dumps({"args": None}, 2), packed=True),
    "a directory past the end": patched(PLAIN, END + 16, "<I", 1 << 31),
    "a directory of 4 GiB": patched(PLAIN, END + 12, "<I", 0xFFFFFFFE),
    "64-bit sizes that are not there": patched(PLAIN, END + 16, "<I", 0xFFFFFFFF),
    "many records": patched(PLAIN, END + 10, "<H", 0xFFFE),
    "a record past the end": patched(PLAIN, DIRECTORY + 42, "<I", 1 << 31),
    "a record of 4 GiB": patched(PLAIN, DIRECTORY + 24, "<I", 0xFFFFFFFE),
    "a record whose name is long": patched(PLAIN, DIRECTORY + 28, "<H", 0xFFFF),
    "a record in another": patched(PLAIN, DIRECTORY + 42, "<I", 10),
    "no archive": b"PK\3\4" + bytes(1000),
    "an end alone": PLAIN[END:],
    "nothing": b"",
    "text": b"<!DOCTYPE html>" * 100,
}


@pytest.mark.parametrize("name", LIES)
def test_an_archive_that_lies(
    name: str, forms: dict[str, Path], tmp_path: Path, attempt: Any
) -> None:
    for place in (in_common, in_rank, in_weight):
        source = Path(shutil.copytree(forms[PLACES[place]], tmp_path / "source"))
        place(source, b"", lambda _: LIES[name])
        done = attempt(PLACES[place], source, lambda c: c[0] == "export" and "mxfp4" not in c)
        assert any(ended.code for ended in done)
        shutil.rmtree(source)
