"""Megatron-LM's file per rank: against megatron-core's models, torch's own reader and writer."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from gptoss_convert import TensorSpec
from gptoss_convert.blockio import BlockReader, BlockWriter
from gptoss_convert.convert import export_checkpoint, import_checkpoint
from gptoss_convert.errors import CheckpointError, MismatchError, UsageError
from gptoss_convert.layout import Layout
from gptoss_convert.opening import Choice, open_source
from gptoss_convert.registry import default_registry
from gptoss_convert.reshard import prepare_reshard
from gptoss_plugins.megatron import ziprecords
from gptoss_plugins.megatron.items import Item, ItemFile
from gptoss_plugins.megatron.legacy import names, rankfile
from gptoss_plugins.megatron.legacy.grid import ranks_with_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SUPPORT = Path(__file__).parents[1] / "support"
# Sizes that layouts divide, and a vocabulary that they do not: 131 rows.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
}
LAYOUTS = {  # every kind of parallelism alone and all together, by the dialect it is written in
    "te-grouped": Layout(2, 2, 2, 4, 1),
    "te-sequential": Layout(tp=4, vocab_multiple=16),
    "local-sequential": Layout(2, ep=2, etp=2),
    "local-grouped": Layout(pp=2, stages=(3, 1)),
}
FILE = "model_optim_rng.pt"


@pytest.fixture(scope="module")
def hf(write_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("legacy") / "hf", **SIZES)


@pytest.fixture(scope="module")
def stacked(hf: Path) -> Path:
    """The checkpoint as torch_dist, for reading only."""
    import_checkpoint(hf, hf.parent / "torch_dist")
    return hf.parent / "torch_dist"


@pytest.fixture(scope="module")
def written(hf: Path) -> dict[str, Path]:
    """The checkpoint per rank, by dialect; for reading only."""
    for dialect, layout in LAYOUTS.items():
        write(hf, hf.parent / dialect, layout, dialect)
    return {dialect: hf.parent / dialect for dialect in LAYOUTS}


def write(hf: Path, folder: Path, layout: Layout, dialect: str | None = None) -> Path:
    choice = Choice(format="torch")
    import_checkpoint(hf, folder, layout=layout, dialect=dialect, choice=choice)
    return folder / "iter_0000000"


@pytest.fixture
def ranks(written: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint of eight files to damage."""
    return Path(shutil.copytree(written["te-grouped"], tmp_path / "ranks")) / "iter_0000000"


def files_of(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path for path in sorted(folder.rglob(FILE))}


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a file, as torch writes it, with something else in it."""
    state = load(path)
    edit(state)
    torch.save(state, path)


def weights(folder: Path) -> dict[str, bytes]:
    """Every file of a torch_dist checkpoint that holds tensors."""
    return {path.name: path.read_bytes() for path in folder.glob("iter_*/*.distcp")}


def reshard_to(source: Path, target: Path, **options: Any) -> Path:
    prepare_reshard(source, **options).run(target)
    return target


# --- against megatron-core -------------------------------------------------------------------


def against_megatron(mode: str) -> dict[str, list[str]]:
    quick = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "legacy_ranks.py"), mode],
        env=os.environ | quick,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.stdout.startswith("{"), done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_layout_loads_strictly_and_what_megatron_saves_is_read() -> None:
    found = against_megatron("show")
    assert len(found) == 18 + 2
    assert not any(found.values()), found


@pytest.mark.distributed
def test_real_ranks() -> None:
    found = against_megatron("gloo")
    assert len(found) == 2
    assert not any(found.values()), found


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", LAYOUTS)
def test_back_to_torch_dist_and_to_hugging_face(
    written: dict[str, Path], stacked: Path, hf: Path, tmp_path: Path, content: Any, dialect: str
) -> None:
    back = reshard_to(written[dialect], tmp_path / "back")
    assert content(back) == content(stacked)
    export_checkpoint(written[dialect], tmp_path / "hf")
    from safetensors.torch import load_file

    def tensors(folder: Path) -> dict[str, Tensor]:
        return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}

    ours, theirs = tensors(tmp_path / "hf"), tensors(hf)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_from_ranks_to_ranks(written: dict[str, Path], tmp_path: Path, content: Any) -> None:
    """Any layout from any other, the same bytes as from the origin."""
    there = reshard_to(
        written["te-sequential"],
        tmp_path / "there",
        layout=LAYOUTS["local-sequential"],
        dialect="local-sequential",
        choice=Choice(format="torch"),
    )
    ours, theirs = content(there), content(written["local-sequential"])
    assert ours == theirs


def test_bytes_do_not_depend_on_the_process(hf: Path, tmp_path: Path, tree: Any) -> None:
    write(hf, tmp_path / "here", Layout(2, ep=2))
    script = (
        "from gptoss_convert.convert import import_checkpoint as i, Choice\n"
        "from gptoss_convert.layout import Layout\nimport sys\n"
        "i(sys.argv[1], sys.argv[2], layout=Layout(2, ep=2), choice=Choice(format='torch'),"
        " workers=3)"
    )
    env = os.environ | {"PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", script, str(hf), str(tmp_path / "there")]
    subprocess.run(command, check=True, env=env)
    assert tree(tmp_path / "here") == tree(tmp_path / "there")


# --- what is in the files -----------------------------------------------------------------------


def test_files_and_arguments(written: dict[str, Path]) -> None:
    folder = written["te-grouped"]
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "0"
    assert list(files_of(folder)) == [
        f"mp_rank_{ep % 2:02d}_{pp:03d}_{ep:03d}"
        for pp, ep in sorted(
            ((p, e) for p in (0, 1) for e in range(4)), key=lambda x: (x[1] % 2, x)
        )
    ]
    state = load(files_of(folder)["mp_rank_01_001_003"])
    assert list(state) == ["args", "checkpoint_version", "iteration", "model0", "model1"]
    assert isinstance(state["args"], argparse.Namespace)
    wanted = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1,
        "num_virtual_stages_per_pipeline_rank": 2,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1,
        "transformer_impl": "transformer_engine",
        "moe_grouped_gemm": True,
        "padded_vocab_size": 132,
        "make_vocab_size_divisible_by": 1,
        "ckpt_format": "torch",
        "params_dtype": torch.bfloat16,
    }
    args = vars(state["args"])
    assert {name: args[name] for name in wanted} == wanted
    torch.serialization.add_safe_globals([argparse.Namespace])  # as megatron-core does
    again = torch.load(files_of(folder)["mp_rank_01_001_003"], weights_only=True)
    assert vars(again["args"]) == args
    mapped = torch.load(files_of(folder)["mp_rank_01_001_003"], weights_only=False, mmap=True)
    for number in ("model0", "model1"):
        for name, tensor in state[number].items():
            assert tensor is None or torch.equal(tensor, mapped[number][name])


def test_uneven_stages_are_told_in_megatrons_words(written: dict[str, Path]) -> None:
    args = load(files_of(written["local-grouped"])["mp_rank_00_001"])["args"]
    assert args.pipeline_model_parallel_layout == "Ettt|tL"
    assert (args.transformer_impl, args.moe_grouped_gemm) == ("local", True)


def test_names_of_transformer_engine(written: dict[str, Path]) -> None:
    """As TEGroupedMLP and SequentialMLP over TE's linears have them (megatron-core's sources)."""
    layer = "decoder.layers.0."
    outside = {"embedding.word_embeddings.weight"}
    attention = {
        *(f"self_attention.linear_qkv.{x}" for x in ("layer_norm_weight", "weight", "bias")),
        *(f"self_attention.linear_proj.{x}" for x in ("weight", "bias")),
        "self_attention.core_attention.softmax_offset",
        *(
            f"self_attention.{x}._extra_state"
            for x in ("linear_qkv", "linear_proj", "core_attention")
        ),
        *(f"pre_mlp_layernorm.{x}" for x in ("weight", "_extra_state")),
        *(f"mlp.router.{x}" for x in ("weight", "bias")),
    }
    linears = [f"linear_fc{n}" for n in (1, 2)]
    grouped = {
        f"mlp.experts.{x}.{kind}"
        for x in linears
        for kind in ("weight0", "weight1", "bias0", "bias1")
    } | {f"mlp.experts.{x}._extra_state" for x in linears}
    first = load(files_of(written["te-grouped"])["mp_rank_00_000_000"])["model0"]
    assert set(first) == outside | {layer + name for name in attention | grouped}
    sequential = {
        f"mlp.experts.local_experts.{e}.{x}.{kind}"
        for e in range(8)
        for x in linears
        for kind in ("weight", "bias", "_extra_state")
    }
    whole = load(files_of(written["te-sequential"])["mp_rank_00"])["model"]
    assert {n.removeprefix(layer) for n in whole if n.startswith(layer)} == attention | sequential
    ends = {n for n in whole if not n.startswith("decoder.layers.")}
    final = {f"decoder.final_layernorm.{x}" for x in ("weight", "_extra_state")}
    assert ends == outside | final | {"output_layer.weight", "output_layer._extra_state"}


def test_vocabulary_is_padded_with_zeros(written: dict[str, Path], hf: Path) -> None:
    """Of 131 rows, to 192 for four ranks of 48; the last has none that are not padding."""
    from safetensors.torch import load_file

    every = {k: v for f in hf.glob("*.safetensors") for k, v in load_file(f).items()}
    rows = [
        load(path)["model"]["output_layer.weight"]
        for path in files_of(written["te-sequential"]).values()
    ]
    assert [len(part) for part in rows] == [48] * 4
    whole = torch.cat(rows)
    assert torch.equal(whole[:131], every["lm_head.weight"])
    assert not whole[131:].any()


def test_experts_cut_by_rows_and_inputs(written: dict[str, Path], stacked: Path) -> None:
    """Expert tensor parallelism, piece by piece."""
    whole: Any = open_source(stacked, "megatron")
    experts = "decoder.layers.3.mlp.experts."
    fc1 = whole.read(experts + "linear_fc1.weight{E}")
    fc2 = whole.read(experts + "linear_fc2.weight{E}")
    bias1, bias2 = (whole.read(f"{experts}linear_fc{n}.bias{{E}}") for n in (1, 2))
    found = files_of(written["local-sequential"])
    assert list(found) == [f"mp_rank_{t:02d}_{e:03d}" for t in (0, 1) for e in (0, 1)]
    width = fc2.shape[2]
    for number, (place, path) in enumerate(found.items()):
        etp, ep, half = number // 2, number % 2, width // 2
        model = load(path)["model"]
        gate = slice(etp * half, (etp + 1) * half)
        up = slice(width + etp * half, width + (etp + 1) * half)
        for local in range(4):
            one, at = f"{experts}local_experts.{local}.", ep * 4 + local
            want = torch.cat([fc1[at, gate], fc1[at, up]])
            assert torch.equal(model[one + "linear_fc1.weight"], want), place
            want = torch.cat([bias1[at, gate], bias1[at, up]])
            assert torch.equal(model[one + "linear_fc1.bias"], want), place
            assert torch.equal(model[one + "linear_fc2.weight"], fc2[at, :, gate]), place
            assert torch.equal(model[one + "linear_fc2.bias"], bias2[at]), place


def test_tied_embeddings_stand_on_the_last_stage_too(write_tiny: Any, tmp_path: Path) -> None:
    hf = write_tiny(tmp_path / "hf", **SIZES, tie_word_embeddings=True)
    folder = write(hf, tmp_path / "ranks", Layout(2, 2))
    for tp in (0, 1):
        first, last = (load(folder / f"mp_rank_{tp:02d}_{pp:03d}" / FILE)["model"] for pp in (0, 1))
        assert "output_layer.weight" not in first
        assert torch.equal(first["embedding.word_embeddings.weight"], last["output_layer.weight"])
    import_checkpoint(hf, tmp_path / "whole")
    back = reshard_to(folder, tmp_path / "back")
    assert weights(back) == weights(tmp_path / "whole")

    def drift(state: dict[str, Any]) -> None:
        state["model"]["output_layer.weight"][3, 5] += 1

    change(folder / "mp_rank_01_001" / FILE, drift)
    with pytest.raises(MismatchError, match=r"mp_rank_01_000.* and .*mp_rank_01_001"):
        reshard_to(folder, tmp_path / "again")


# --- what others write -------------------------------------------------------------------------


def as_trained(state: dict[str, Any]) -> None:
    """A state as Transformer Engine and wrappers of the model leave it."""
    for key in [key for key in state if key.startswith("model")]:
        model = OrderedDict((f"module.{name}", value) for name, value in state[key].items())
        states = [name for name in model if name.endswith("_extra_state")]
        for number, name in enumerate(states):
            model[name] = (
                io.BytesIO(b"\0\1"),
                torch.zeros(7, dtype=torch.uint8),
                None,
                torch.zeros(3, dtype=torch.float8_e4m3fn),
            )[number % 4]
        embedding = "module.embedding.word_embeddings.weight"
        if embedding in model:
            model[embedding] = torch.nn.Parameter(model[embedding])
        state[key] = model


def test_states_of_fp8_and_wrappers(ranks: Path, stacked: Path, tmp_path: Path) -> None:
    for path in files_of(ranks).values():
        change(path, as_trained)
    assert weights(reshard_to(ranks, tmp_path / "back")) == weights(stacked)


def test_any_strides_and_shared_storages(ranks: Path, stacked: Path, tmp_path: Path) -> None:
    def restride(state: dict[str, Any]) -> None:
        for key in [key for key in state if key.startswith("model")]:
            for name, value in state[key].items():
                if value is not None and value.dim() == 2:
                    state[key][name] = value.t().contiguous().t()
                elif value is not None:
                    state[key][name] = torch.stack([value, value], -1)[..., 1]

    for path in files_of(ranks).values():
        change(path, restride)
    assert weights(reshard_to(ranks, tmp_path / "back")) == weights(stacked)


@pytest.mark.parametrize("dialect", LAYOUTS)
def test_without_arguments_the_files_tell(
    written: dict[str, Path], stacked: Path, tmp_path: Path, dialect: str
) -> None:
    folder = Path(shutil.copytree(written[dialect], tmp_path / "ranks"))
    for path in files_of(folder).values():
        change(path, lambda state: state.pop("args"))
    assert weights(reshard_to(folder, tmp_path / "back")) == weights(stacked)


def test_without_companions_arguments_tell_the_model(
    ranks: Path, stacked: Path, tmp_path: Path
) -> None:
    shutil.rmtree(ranks / "huggingface")
    assert weights(reshard_to(ranks, tmp_path / "back")) == weights(stacked)


def test_the_optimizer_is_seen_and_refused(ranks: Path, tmp_path: Path) -> None:
    (ranks / "mp_rank_00_000_000" / "distrib_optim.pt").write_bytes(b"never read")
    source: Any = open_source(ranks, "megatron")
    assert source.has_training_state
    assert source.describe()["optimizer_state"]
    with pytest.raises(UsageError, match="--no-optimizer"):
        prepare_reshard(ranks)
    prepare_reshard(ranks, optimizer=False)


@pytest.mark.parametrize("dialect", LAYOUTS)
def test_inspect(written: dict[str, Path], run_cli: Any, dialect: str) -> None:
    if dialect != "te-grouped":
        source: Any = open_source(written[dialect], "megatron")
        assert source.describe()["dialect"] == dialect
        return
    done = run_cli("inspect", written[dialect], "--json")
    facts = json.loads(done.stdout)
    assert (facts["format"], facts["problems"]) == ("torch", [])
    assert facts["layout"]["parallel"] == "tp 2, pp 2, vpp 2, ep 4"
    assert facts["layout"]["layers_by_stage"] == [1, 1, 1, 1]


@pytest.mark.parametrize("where", ["", "iter_0000000"])
def test_one_format_answers(written: dict[str, Path], stacked: Path, where: str) -> None:
    registry = default_registry()
    for folder, name in ((written["te-grouped"], "torch"), (stacked, "torch_dist")):
        assert registry.format_of(folder / where).name == name  # type: ignore[union-attr]


def test_release_is_an_iteration(ranks: Path, stacked: Path, tmp_path: Path) -> None:
    ranks.rename(ranks.parent / "release")
    (ranks.parent / "latest_checkpointed_iteration.txt").write_text("release")
    assert weights(reshard_to(ranks.parent, tmp_path / "back")) == weights(stacked)


# --- what is refused ---------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        prepare_reshard(folder)
    return str(caught.value)


def test_missing_files_are_all_named(ranks: Path) -> None:
    for name in ("mp_rank_01_001_003", "mp_rank_00_000_002"):
        shutil.rmtree(ranks / name)
    text = refusal(ranks)
    assert text.count("is missing") == 2
    assert f"mp_rank_01_001_003/{FILE}: is missing" in text


def test_cut_files_are_all_named(ranks: Path) -> None:
    for path in list(files_of(ranks).values())[:2]:
        path.write_bytes(path.read_bytes()[:-100])
    assert refusal(ranks).count("is no whole torch.save file") == 2


def test_missing_tensors_are_all_named(ranks: Path) -> None:
    change(
        files_of(ranks)["mp_rank_01_000_001"],
        lambda state: [
            state["model1"].pop(f"decoder.layers.0.{name}")
            for name in ("mlp.router.bias", "self_attention.linear_qkv.weight")
        ],
    )
    text = refusal(ranks)
    assert "2 problems" in text
    assert f"mp_rank_01_000_001/{FILE}: has no decoder.layers.2.mlp.router.bias" in text


def test_wrong_shapes_are_told(ranks: Path) -> None:
    def cut(state: dict[str, Any]) -> None:
        name = "decoder.layers.0.self_attention.linear_proj.weight"
        state["model0"][name] = state["model0"][name][:, :-1].clone()

    change(files_of(ranks)["mp_rank_00_001_002"], cut)
    assert "in shape [64, 63] where" in refusal(ranks)


def test_replicas_must_agree(ranks: Path, tmp_path: Path) -> None:
    def drift(state: dict[str, Any]) -> None:
        state["model0"]["decoder.layers.0.mlp.router.weight"][-1, -1] += 1

    change(files_of(ranks)["mp_rank_01_000_003"], drift)
    with pytest.raises(MismatchError, match=r"mlp\.router\.weight: differs between") as caught:
        reshard_to(ranks, tmp_path / "back")
    assert "mp_rank_00_000_000" in str(caught.value)
    assert "mp_rank_01_000_003" in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_grouped_gemm_is_refused(ranks: Path) -> None:
    def old(state: dict[str, Any]) -> None:
        state["model0"]["decoder.layers.0.mlp.experts.weight1"] = torch.zeros(2, 2)

    change(files_of(ranks)["mp_rank_00_000_000"], old)
    assert "legacy GroupedMLP" in refusal(ranks)


def test_two_checkpoints_in_one_folder(ranks: Path) -> None:
    shutil.copytree(ranks / "mp_rank_00_000_000", ranks / "mp_rank_00")
    assert "files of two layouts" in refusal(ranks)
    shutil.rmtree(ranks / "mp_rank_00")
    path = files_of(ranks)["mp_rank_01_001_003"]
    change(path, lambda state: setattr(state["args"], "expert_model_parallel_size", 8))
    assert "they are of two checkpoints" in refusal(ranks)


@pytest.mark.parametrize(
    ("field", "size"), [("tensor_model_parallel_size", 0), ("expert_model_parallel_size", 1 << 40)]
)
def test_layouts_that_cannot_be(ranks: Path, field: str, size: int) -> None:
    for path in files_of(ranks).values():
        change(path, lambda state: setattr(state["args"], field, size))
    assert "tell of a layout that cannot be" in refusal(ranks)


def test_names_that_may_mean_either(written: dict[str, Path], tmp_path: Path) -> None:
    """One file with the whole model, and no args: stage 0 of one, or expert rank 0 of one."""
    folder = Path(shutil.copytree(written["te-sequential"], tmp_path / "ranks")) / "iter_0000000"
    for name in list(files_of(folder))[1:]:
        shutil.rmtree(folder / name)
    (folder / "mp_rank_00").rename(folder / "mp_rank_00_000")
    change(folder / "mp_rank_00_000" / FILE, lambda state: state.pop("args"))
    assert "may count pipeline stages or expert ranks" in refusal(folder)


def test_no_rank_at_all(ranks: Path) -> None:
    for path in files_of(ranks).values():
        shutil.rmtree(path.parent)
    (ranks / "mp_rank_x").mkdir()
    assert "has no mp_rank_TT folder" in refusal(ranks)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_is_executed(ranks: Path, tmp_path: Path) -> None:
    change(
        files_of(ranks)["mp_rank_00_000_000"],
        lambda state: state.update(optimizer=Evil(tmp_path / "owned")),
    )
    assert "which no checkpoint needs" in refusal(ranks)
    assert not (tmp_path / "owned").exists()


def test_layouts_that_file_names_cannot_tell() -> None:
    with pytest.raises(UsageError, match="choose an --etp that divides --tp"):
        ranks_with_files(Layout(ep=2, etp=2))
    assert len(ranks_with_files(Layout(4, 2, ep=2, etp=2))) == 2 * 4


# --- crash --------------------------------------------------------------------------------------


def test_a_killed_run_goes_on(
    stacked: Path, tmp_path: Path, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished files stay, the one under way is made again, and all bytes are the same."""
    options: dict[str, Any] = {"layout": Layout(4, ep=2), "choice": Choice(format="torch")}
    want = tree(reshard_to(stacked, tmp_path / "whole", **options))
    done: list[str] = []
    close = ItemFile.close

    def stop(self: ItemFile) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append("")
        close(self)

    with monkeypatch.context() as patch:
        patch.setattr(ItemFile, "close", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_reshard(stacked, **options).run(tmp_path / "ranks", workers=1)
    (left,) = tmp_path.glob(".ranks.incomplete-*")
    assert len(list(left.rglob(FILE))) == 2
    result = prepare_reshard(stacked, **options).run(tmp_path / "ranks", workers=1)
    assert result.resumed
    assert tree(tmp_path / "ranks") == want


# --- archives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0xFFFFFFFF, 700, 64])
def test_archives_past_four_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """With the limit lowered, sizes, offsets and the directory go into 64-bit fields."""
    monkeypatch.setattr(ziprecords, "WIDE", limit)
    tensors = {f"x{n}": torch.arange(n * 40, dtype=torch.float32).view(n, 40) for n in (1, 2, 5)}
    slots = {
        name: [rankfile.Slot("model", name, TensorSpec(tuple(t.shape), "F32"))]
        for name, t in tensors.items()
    }
    items = rankfile.lay_out(slots, {"iteration": 3}, {"model": ["x._extra_state"]})
    writer = BlockWriter(tmp_path / "f", items[rankfile.END][0].end)
    file = ItemFile(writer, items, {name: found[0].spec for name, found in slots.items()})
    for name, tensor in tensors.items():
        for row in range(len(tensor)):
            file.write(name, slice(row, row + 1), tensor[row : row + 1])
    file.close()
    assert zipfile.ZipFile(tmp_path / "f").namelist()[-1] == "archive/data/2"
    state = torch.load(tmp_path / "f", weights_only=True)
    assert state["iteration"] == 3
    assert state["model"]["x._extra_state"] is None
    found = rankfile.read(tmp_path / "f")
    for name, tensor in tensors.items():
        assert torch.equal(state["model"][name], tensor)
        assert found.locate(found.chunks[0][name][None]).start % 64 == 0


def test_a_file_of_holes_past_four_gigabytes(tmp_path: Path) -> None:
    """Really that long: a tensor larger than a 32-bit size, and one behind it."""
    sizes = {"large": TensorSpec(((1 << 30) + 16, 2), "F32"), "small": TensorSpec((3,), "F32")}
    slots = {name: [rankfile.Slot("model", name, spec)] for name, spec in sizes.items()}
    items = rankfile.lay_out(slots, {}, {"model": []})
    with open(tmp_path / "f", "wb") as file:
        for found in items.values():
            for item in found:
                file.seek(item.offset)
                file.write(item.head)
                file.seek(item.data_bytes, os.SEEK_CUR)
                file.write(item.tail)
        (large,), (small,) = items["large"], items["small"]
        file.seek(large.offset + len(large.head) + large.data_bytes - 4)
        file.write(torch.tensor([2.5]).numpy().tobytes())
        file.seek(small.offset + len(small.head))
        file.write(torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes())
    state = torch.load(tmp_path / "f", weights_only=True, mmap=True)["model"]
    assert state["small"].tolist() == [1, 2, 3]
    assert state["large"][-1].tolist() == [0, 2.5]
    found = rankfile.read(tmp_path / "f")
    start = found.locate(found.chunks[0]["small"][None]).start
    assert start > 1 << 32
    assert BlockReader(tmp_path / "f").peek(start, 4) == b"\0\0\x80\x3f"


def test_only_promised_bytes_are_padded(tmp_path: Path) -> None:
    """Zeros follow only where they are due; anything else missing is an error."""
    items = {
        "none": [Item(0, b"a", 0, 3, b"b")],
        "some": [Item(8, b"c", 4, 2)],
        "last": [Item(15, b"d", 0, 1)],
    }
    specs = {"none": TensorSpec((3,), "U8"), "some": TensorSpec((6,), "U8")}
    file = ItemFile(BlockWriter(tmp_path / "f", 17), items, specs | {"last": specs["none"]})
    file.write("some", slice(0, 1), torch.tensor([7], dtype=torch.uint8))
    file.write("some", slice(1, 4), torch.tensor([8, 9, 10], dtype=torch.uint8))
    file.close()
    assert (tmp_path / "f").read_bytes() == b"a\0\0\0b\0\0\0c\7\x08\x09\x0a\0\0d\0"
    short = ItemFile(BlockWriter(tmp_path / "g", 17), items, specs)
    short.write("some", slice(0, 1), torch.tensor([7], dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="before all of it was written"):
        short.close()
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("name", "canonical", "expert"),
    [
        ("module.module.decoder.layers.12.input_layernorm.weight", names._FUSED_NORM, None),
        ("decoder.layers.12.mlp.experts.linear_fc2.bias31", "mlp.experts.linear_fc2.bias{E}", 31),
        (
            "decoder.layers.12.mlp.experts.local_experts.7.linear_fc1.weight",
            "mlp.experts.linear_fc1.weight{E}",
            7,
        ),
        (
            "decoder.layers.12.mlp.experts.linear_fc1.weight",
            "mlp.experts.linear_fc1.weight{E}",
            None,
        ),
    ],
)
def test_names(name: str, canonical: str, expert: int | None) -> None:
    found = names.stored(name)
    assert found is not None
    assert found.at(3) == f"decoder.layers.15.{canonical}"
    assert (found.layer, found.expert) == (12, expert)
