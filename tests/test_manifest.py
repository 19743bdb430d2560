"""``manifest.json`` of everything we write, and finding any bit of it that flips."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from xxhash import xxh3_128_hexdigest

from gptoss_convert import blockio
from gptoss_convert.checksums import Span, Summing, listening
from gptoss_convert.convert import (
    Choice,
    export_checkpoint,
    import_checkpoint,
    prepare_export,
    prepare_import,
)
from gptoss_convert.crew import Crew, as_crew
from gptoss_convert.damage import check_manifest
from gptoss_convert.errors import CheckpointError
from gptoss_convert.execute import Executor
from gptoss_convert.filesums import sums_in
from gptoss_convert.layout import Layout
from gptoss_convert.manifest import MANIFEST, read_manifest
from gptoss_convert.reshard import prepare_reshard
from gptoss_convert.staging import unfinished
from gptoss_convert.types import Finding
from gptoss_plugins.megatron import metadata

Tree = Callable[[Path], dict[str, str]]
MADE = ["torch_dist", "torch", "bf16", "mxfp4", "resharded"]
ITERATION = "iter_0000000"


@pytest.fixture(scope="module")
def made(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each kind that is written, by name; for reading only."""
    folder = tmp_path_factory.mktemp("made")
    found = {name: folder / name for name in MADE}
    layout = Layout(tp=2, ep=5)
    import_checkpoint(originals["mxfp4"], found["torch_dist"])
    import_checkpoint(
        originals["mxfp4"], found["torch"], layout=layout, choice=Choice(format="torch")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptoss_plugins.huggingface.sink.SHARD_BYTES", 300_000)
        export_checkpoint(found["torch_dist"], found["bf16"])
    export_checkpoint(found["torch_dist"], found["mxfp4"], export_dtype="mxfp4")
    resharding = prepare_reshard(
        found["torch"], choice=Choice(format="torch_dist"), dialect="per-layer"
    )
    resharding.run(found["resharded"])
    return found


@pytest.fixture(params=MADE)
def copied(request: pytest.FixtureRequest, made: dict[str, Path], tmp_path: Path) -> Path:
    """Each of them in turn, to damage."""
    return Path(shutil.copytree(made[request.param], tmp_path / "copied"))


def files_of(folder: Path) -> set[str]:
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return found - {MANIFEST}


def damage(folder: Path) -> list[tuple[str, str]]:
    found = list(check_manifest(folder))
    assert all(f.severity == "error" and f.remedy for f in found)
    return [(f.where, f.what) for f in found]


def flip(path: Path, at: int, bit: int = 3) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


# ---- what it says


def test_every_file_and_tensor_is_listed(copied: Path) -> None:
    files = read_manifest(copied).files
    assert files.keys() == files_of(copied)
    for name, told in files.items():
        data = (copied / name).read_bytes()
        assert (told.nbytes, told.digest) == (len(data), xxh3_128_hexdigest(data))
        for span, digest in told.tensors.items():
            assert digest == xxh3_128_hexdigest(data[span.offset : span.end])
    with_tensors = {name for name, told in files.items() if told.tensors}
    assert with_tensors == {
        name
        for name in files
        if name.endswith((".distcp", ".safetensors", "model_optim_rng.pt"))
        and "extra_state" not in name
    }
    assert damage(copied) == []


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_ranges_are_those_of_the_tensors(made: dict[str, Path]) -> None:
    """As safetensors and torch find them."""
    seen = 0
    for name in ("bf16", "mxfp4"):
        for file, told in read_manifest(made[name]).files.items():
            stored = load_file(made[name] / file) if told.tensors else {}
            assert {span.name for span in told.tensors} == stored.keys()
            data = (made[name] / file).read_bytes()
            for span in told.tensors:
                assert data[span.offset : span.end] == raw(stored[span.name])
                seen += 1
    for file, told in read_manifest(made["torch"]).files.items():
        if not file.endswith("model_optim_rng.pt"):
            continue
        path = made["torch"] / file
        model = torch.load(path, weights_only=False)["model"]
        tensors = {f"model.{n}": t for n, t in model.items() if t is not None}
        assert {span.name for span in told.tensors} == tensors.keys()
        data = path.read_bytes()
        for span in told.tensors:
            assert data[span.offset : span.end] == raw(tensors[span.name])
            seen += 1
    assert seen > 300


@pytest.mark.parametrize("name", ["torch_dist", "resharded"])
def test_ranges_are_those_of_the_chunks(made: dict[str, Path], name: str) -> None:
    """As torch finds them by ``.metadata``."""
    folder, files = made[name] / ITERATION, read_manifest(made[name]).files
    called: dict[metadata.Stored, set[str]] = {}  # several, where tensors share their bytes
    for key, tensor in metadata.load(folder).tensors.items():
        for chunk in tensor.chunks:
            called.setdefault(chunk.at, set()).add(f"{key}{list(chunk.offsets)}")
    listed = {
        (Path(file).name, span)
        for file, told in files.items()
        if file.endswith(".distcp")
        for span in told.tensors
    }
    assert len(listed) == len(called)
    for at, names in called.items():
        data = (folder / at.file).read_bytes()
        stored = torch.load(io.BytesIO(data[at.offset : at.offset + at.length]), weights_only=True)
        (span,) = (span for file, span in listed if file == at.file and span.name in names)
        assert data[span.offset : span.end] == raw(stored)


def test_where_it_comes_from(originals: dict[str, Path], made: dict[str, Path]) -> None:
    told = {name: dict(read_manifest(folder).origin) for name, folder in made.items()}
    own = xxh3_128_hexdigest((made["torch_dist"] / MANIFEST).read_bytes())
    source = told["bf16"]["source"]
    assert source == {"name": "torch_dist", "digest": own, "digest_of": "manifest"}
    assert told["torch_dist"]["source"]["name"] == originals["mxfp4"].name
    assert told["torch_dist"]["source"]["digest_of"] == "headers"
    assert told["torch_dist"]["source"] == told["torch"]["source"]
    assert told["mxfp4"]["options"]["encoding"]["codec"] == "mxfp4"
    assert told["mxfp4"]["scales"] == {
        "name": "quantization",
        "digest": own,
        "digest_of": "manifest",
    }
    assert [told[n]["direction"] for n in MADE] == [
        "import", "import", "export", "export", "reshard",
    ]  # fmt: skip
    layout = told["torch"]["options"]["layout"]
    assert (layout["tp"], layout["ep"], told["torch"]["options"]["format"]) == (2, 5, "torch")
    for folder in made.values():
        assert str(folder.parent) not in (folder / MANIFEST).read_text()


def test_the_source_is_known_by_its_content(hf: Path, tmp_path: Path, tree: Tree) -> None:
    """Not by when its files were written, nor by where they are; and not by a stale manifest."""
    import_checkpoint(hf, tmp_path / "a")
    elsewhere = shutil.copytree(hf, tmp_path / "elsewhere" / hf.name)
    for path in elsewhere.iterdir():
        os.utime(path, (1, 1))
    import_checkpoint(elsewhere, tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    config = json.loads((elsewhere / "config.json").read_bytes())
    (elsewhere / "config.json").write_text(json.dumps({**config, "sliding_window": 11}))
    import_checkpoint(elsewhere, tmp_path / "c")
    sources = [read_manifest(tmp_path / n).origin["source"]["digest"] for n in "ac"]
    assert sources[0] != sources[1]
    (tmp_path / "a" / ITERATION / "run_config.yaml").write_bytes(b"{}")
    export_checkpoint(tmp_path / "a", tmp_path / "d")
    assert read_manifest(tmp_path / "d").origin["source"]["digest_of"] == "headers"


# ---- it is the same however it came about


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_any_number_of_workers(
    originals: dict[str, Path], made: dict[str, Path], tmp_path: Path, tree: Tree, workers: int
) -> None:
    import_checkpoint(originals["mxfp4"], tmp_path / "torch_dist", workers=workers)
    assert tree(tmp_path / "torch_dist") == tree(made["torch_dist"])


def test_several_processes(
    originals: dict[str, Path], made: dict[str, Path], tmp_path: Path, tree: Tree
) -> None:
    for rank in (2, 0, 1):
        with as_crew(Crew(rank, 3)):
            prepare_import(originals["mxfp4"]).run(tmp_path / "out")
    assert MANIFEST in tree(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(made["torch_dist"])


class Killed(BaseException):
    pass


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> None:
    convert, calls = Executor._convert, iter(range(999))

    def die(self: Executor, *arguments: Any) -> None:
        if next(calls) == step:
            raise Killed
        convert(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "_convert", die)
        with pytest.raises(Killed):
            run()


@pytest.mark.parametrize("lost", [False, True])
def test_going_on(
    originals: dict[str, Path],
    made: dict[str, Path],
    tmp_path: Path,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
    lost: bool,
) -> None:
    """Checksums of finished files are kept; a file without them is made again."""
    target = tmp_path / "out"

    def run() -> Any:
        return prepare_import(originals["mxfp4"]).run(target, workers=1)

    stop_at(30, monkeypatch, run)
    (staging,) = unfinished(target)
    before = {p.name: p.stat().st_ino for p in staging.rglob("*.distcp")}
    assert len(before) >= 2
    notes = sorted(staging.glob(".sums-*"))
    assert len(notes) > len(before)  # one is of the kept scales
    name = "__1_0.distcp"
    if lost:
        (staging / f".sums-{name}.json").unlink()
    assert run().resumed
    after = {p.name: p.stat().st_ino for p in target.rglob("*.distcp")}
    assert {n for n in before if before[n] != after[n]} == ({name} if lost else set())
    assert tree(target) == tree(made["torch_dist"])


def test_a_process_waits_for_lost_notes(
    originals: dict[str, Path], made: dict[str, Path], tmp_path: Path, tree: Tree
) -> None:
    """A part without its note is one that its process is going to make again."""
    target = tmp_path / "out"
    with as_crew(Crew(0, 2)):
        prepare_import(originals["mxfp4"]).run(target)
    (staging,) = unfinished(target)
    next(staging.glob(".sums-*")).unlink()
    for rank, finished in ((1, False), (0, True)):
        with as_crew(Crew(rank, 2)):
            assert prepare_import(originals["mxfp4"]).run(target).finished == finished
    assert tree(target) == tree(made["torch_dist"])


def test_files_whose_writing_nobody_saw_are_read(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a third party's sink that writes in a way of its own."""
    monkeypatch.setattr(blockio, "current_listener", lambda: None)
    prepare_export(made["torch_dist"], export_dtype="mxfp4").run(tmp_path / "out")
    seen, read = (read_manifest(f).files for f in (made["mxfp4"], tmp_path / "out"))
    assert {n: (f.nbytes, f.digest) for n, f in read.items()} == {
        n: (f.nbytes, f.digest) for n, f in seen.items()
    }
    assert not any(f.tensors for f in read.values())
    flip(tmp_path / "out" / "model.safetensors", 5000)
    assert damage(tmp_path / "out") == [("model.safetensors", "is damaged")]


def test_a_file_that_changes_behind_our_back(tmp_path: Path) -> None:
    known = {}
    with listening(lambda path, total: known.update({path.name: total})):
        blockio.write_file(tmp_path / "a", b"abc")
    (tmp_path / ".note-b").write_bytes(b"x")
    assert sums_in(tmp_path, known, (".note-",)) == known
    (tmp_path / "a").write_bytes(b"abcd")
    with pytest.raises(CheckpointError, match="a: changed after it was written"):
        sums_in(tmp_path, known)


def test_blocks_may_be_cut_anywhere() -> None:
    numbers = random.Random(5)
    data = numbers.randbytes(5000)
    spans = [Span("a", 0, 10), Span("b", 10, 0), Span("c", 10, 2000), Span("d", 4000, 1000)]
    spans.append(Span("e", 5000, 0))
    for _ in range(50):
        sums, at = Summing(spans), 0
        while at < len(data):
            count = numbers.choice([1, 9, 700, 4096])
            sums.update(data[at : at + count])
            at += count
        total = sums.total()
        assert (total.nbytes, total.digest) == (5000, xxh3_128_hexdigest(data))
        assert list(total.tensors.items()) == [
            (span, xxh3_128_hexdigest(data[span.offset : span.end])) for span in spans
        ]
    with pytest.raises(RuntimeError, match="f is not whole"):
        Summing([Span("f", 0, 1)]).total()


# ---- what it finds


def places(folder: Path, numbers: random.Random) -> Iterator[tuple[str, int]]:
    """Bytes to flip: in every tensor, and in every file at its ends and somewhere between them."""
    for name, told in sorted(read_manifest(folder).files.items()):
        tensors = list(told.tensors)
        for span in numbers.sample(tensors, min(12, len(tensors))):
            yield name, numbers.randrange(span.offset, span.end)
        if told.nbytes:
            yield from ((name, at) for at in (0, told.nbytes - 1, numbers.randrange(told.nbytes)))


def test_any_flipped_bit_is_found_and_named(copied: Path) -> None:
    numbers = random.Random(6)
    files = read_manifest(copied).files
    for name, at in places(copied, numbers):
        bit = numbers.randrange(8)
        flip(copied / name, at, bit)
        spans = [s for s in files[name].tensors if s.offset <= at < s.end]
        outside = " outside of its tensors, in its header or framing"
        what = f"is damaged{outside if files[name].tensors else ''}"
        if spans:
            (span,) = spans
            where = f"bytes {span.offset} to {span.end}"
            what = f"tensor {span.name} is damaged, somewhere in {where}"
        assert damage(copied) == [(name, what)]
        flip(copied / name, at, bit)
    assert damage(copied) == []


def test_several_at_once(made: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made["bf16"], tmp_path / "bf16")
    name, told = next(f for f in read_manifest(folder).files.items() if len(f[1].tensors) > 3)
    one, _, three, *_ = told.tensors
    flip(folder / name, one.offset)
    flip(folder / name, three.end - 1)
    flip(folder / name, 0)
    assert [what.split(" is ")[0] for _, what in damage(folder)] == [
        f"tensor {one.name}", f"tensor {three.name}",
    ]  # fmt: skip


def test_any_flipped_bit_of_the_manifest(made: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made["bf16"], tmp_path / "bf16")
    data, numbers = (folder / MANIFEST).read_bytes(), random.Random(7)
    chosen = numbers.sample(range(len(data)), 200)
    for at in (*range(40), *chosen, *range(len(data) - 60, len(data))):
        flip(folder / MANIFEST, at, numbers.randrange(8))
        with pytest.raises(CheckpointError, match=f"{MANIFEST}: is damaged, or no manifest"):
            check_manifest(folder)
        (folder / MANIFEST).write_bytes(data)
    for count in (0, 1, 100, len(data) - 1):
        (folder / MANIFEST).write_bytes(data[:count])
        with pytest.raises(CheckpointError, match="is damaged"):
            check_manifest(folder)


def test_missing_extra_cut_and_long(copied: Path, tmp_path: Path) -> None:
    names = sorted(read_manifest(copied).files)
    (copied / names[0]).unlink()
    (copied / names[1]).unlink()
    (copied / names[1]).mkdir()
    (copied / "more").mkdir()
    (copied / "more" / ".hidden").write_bytes(b"x")
    (copied / "link").symlink_to(tmp_path)
    cut, long = names[2], names[3]
    size = (copied / cut).stat().st_size
    os.truncate(copied / cut, size - 1)
    with open(copied / long, "ab") as file:
        file.write(b"xy")
    was = (copied / long).stat().st_size - 2
    extra = "was not written with the rest"
    assert damage(copied) == [
        (names[0], "is missing"),
        (names[1], "is missing"),
        (cut, f"is cut short: {size - 1} bytes, and {size} were written"),
        (long, f"is too long: {was + 2} bytes, and {was} were written"),
        ("link", extra),
        ("more/.hidden", extra),
    ]


def test_progress_and_an_early_end(made: dict[str, Path]) -> None:
    seen: list[int] = []
    folder = made["torch_dist"]
    assert list(check_manifest(folder, workers=1, progress=seen.append)) == []
    assert sum(seen) == sum(f.nbytes for f in read_manifest(folder).files.values())
    check_manifest(folder).close()  # type: ignore[attr-defined]


def test_a_disk_that_does_not_give_a_file_back(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    found = list(check_manifest(made["bf16"]))
    assert {f.where for f in found} == files_of(made["bf16"])
    assert found[0] == Finding(
        "error",
        "chat_template.jinja",
        "cannot be read: Input/output error",
        "check its permissions and the disk",
    )


# ---- manifests from strangers

DIGEST = "0" * 32
FILE = {"bytes": 3, "digest": DIGEST, "tensors": []}


def sealed(value: Any) -> bytes:
    """As ours are, whatever they say."""
    body = json.dumps(value, indent=1).removesuffix("\n}").encode()
    return body + f',\n "seal": "{xxh3_128_hexdigest(body)}"\n}}\n'.encode()


def saying(**changes: Any) -> bytes:
    said = {"schema": "gptoss-convert.manifest/1", "algorithm": "xxh3-128", "files": {}}
    return sealed({**said, **changes})


def placing(*places: Any) -> bytes:
    tensors = [{"name": "t", "place": place, "digest": DIGEST} for place in places]
    return saying(files={"a": {**FILE, "tensors": tensors}})


HOSTILE = {
    "no JSON": b"\x89PNG",
    "no object": b"[]",
    "another tool's": json.dumps({"name": "app", "version": 3}).encode(),
    "another schema": saying(schema="gptoss-convert.manifest/2"),
    "another algorithm": saying(algorithm="md5"),
    "no files": saying(files=None),
    "a list of files": saying(files=[FILE]),
    "a file that is none": saying(files={"a": 3}),
    "above": saying(files={"../a": FILE}),
    "above, later": saying(files={"a/../../b": FILE}),
    "absolute": saying(files={"/etc/passwd": FILE}),
    "spelled otherwise": saying(files={"a//b": FILE}),
    "dotted": saying(files={"./a": FILE}),
    "a folder": saying(files={"a/": FILE}),
    "the folder": saying(files={".": FILE}),
    "nothing": saying(files={"": FILE}),
    "zero": saying(files={"a\0b": FILE}),
    "itself": saying(files={MANIFEST: FILE}),
    "less than nothing": saying(files={"a": {**FILE, "bytes": -1}}),
    "half a byte": saying(files={"a": {**FILE, "bytes": 1.5}}),
    "a truth": saying(files={"a": {**FILE, "bytes": True}}),
    "too much": saying(files={"a": {**FILE, "bytes": 1 << 63}}),
    "no size": saying(files={"a": {"digest": DIGEST, "tensors": []}}),
    "no digest": saying(files={"a": {**FILE, "digest": None}}),
    "a short digest": saying(files={"a": {**FILE, "digest": "00"}}),
    "no tensors": saying(files={"a": {**FILE, "tensors": {}}}),
    "past the end": placing([1, 3]),
    "overlapping": placing([0, 2], [1, 1]),
    "twice": placing([0, 0], [0, 0]),
    "before the beginning": placing([-1, 1]),
    "nowhere": placing(None),
    "three numbers": placing([0, 1, 2]),
    "without a name": saying(
        files={"a": {**FILE, "tensors": [{"place": [0, 1], "digest": DIGEST}]}}
    ),
    "deep": sealed({"a": 1})[:0] + b"[" * 100_000,
    "no text": b'{"\xff": 1' + sealed({"a": 1})[8:],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_manifests_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / MANIFEST).write_bytes(HOSTILE[kind])
    with pytest.raises(CheckpointError, match="is damaged, or no manifest of ours") as refused:
        check_manifest(tmp_path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500 + len(str(tmp_path))


def test_deep_and_doubled_json_under_a_seal(tmp_path: Path) -> None:
    bodies = [
        b'{"files": ' + b"[" * 100_000 + b"]" * 100_000,
        b'{"files": {}, "files": {}',
        b'{"files": {"\xff": 1}',
        b'{"files": 1' + b"0" * 9999,
    ]
    for body in bodies:
        seal = f',\n "seal": "{xxh3_128_hexdigest(body)}"\n}}\n'.encode()
        (tmp_path / MANIFEST).write_bytes(body + seal)
        with pytest.raises(CheckpointError, match="is damaged, or no manifest of ours"):
            check_manifest(tmp_path)


def test_no_manifest_and_one_too_large(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing, so there is nothing to check against"):
        check_manifest(tmp_path)
    with open(tmp_path / MANIFEST, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="would be many; remove it"):
        check_manifest(tmp_path)


def test_names_do_not_draw_on_the_terminal(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(saying(files={"\x1b[2Ja": FILE}))
    assert damage(tmp_path) == [("\\x1b[2Ja", "is missing")]


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """Opening one would wait for ever."""
    os.mkfifo(tmp_path / "a")
    (tmp_path / MANIFEST).write_bytes(saying(files={"a": FILE}))
    assert damage(tmp_path) == [("a", "is missing")]
