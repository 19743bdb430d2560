"""Per-rank checkpoints against megatron-core's models, for every rank of many layouts.

A model is built for each rank, its file is loaded into it strictly, and every parameter must be
the rank's part of the whole; then models hold those parts and are saved as Megatron-LM saves them,
and what is read must be the whole again. Ranks are for show (one process, groups that exchange
nothing) but in ``gloo`` mode, which forks real ones. Prints a JSON object: layout -> what is wrong.

What a rank's part is, what its folder is called and what is in its file is said here once more, in
Megatron-LM's words (megatron/training/checkpointing.py), without the package's own code.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import io
import itertools
import json
import multiprocessing
import random
import re
import sys
import tempfile
import types
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

warnings.filterwarnings("ignore")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.transformer.enums import AttnBackend
from rank_models import MODELS, Sizes, groups, pretend
from safetensors.torch import load_file
from tiny_gptoss import megatron_tensors
from torch import Tensor

from gptoss_convert.convert import prepare_import
from gptoss_convert.layout import Layout
from gptoss_convert.opening import Choice, open_source
from gptoss_convert.plan import parameters
from gptoss_convert.registry import default_registry
from gptoss_convert.testing import make_tensors, write_hf_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZES = Sizes(layers=4, groups=4, experts=8, width=6)
DIALECTS = ("te-grouped", "te-sequential", "local-sequential", "local-grouped")
CUT_BY_ROWS = ("linear_qkv.weight", "linear_qkv.bias", "softmax_offset")
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def even_layouts() -> list[Layout]:
    """Those of the issue, the pipelines by turns with several chunks on a stage."""
    every = itertools.product((1, 2, 4), (1, 2), (1, 2, 4))
    return [Layout(tp, pp, 1 + (pp > 1 and (tp + ep) % 2), ep) for tp, pp, ep in every]


WITH_ETP = [Layout(2, ep=2, etp=2), Layout(4, 2, ep=4, etp=2)]


def hugging_face(folder: Path) -> dict[str, Tensor]:
    """Write a checkpoint in float32, and say what Megatron's whole tensors are, layers first."""
    config = SIZES.config() | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    family = default_registry().models()["gpt-oss"]
    write_hf_folder(folder, config, make_tensors(family, config, "F32"), shards=1)
    (file,) = folder.glob("*.safetensors")
    return megatron_tensors(config, load_file(file))


def name_of_file(folder: Path, iteration: int) -> Path:
    """As ``get_checkpoint_name`` has it."""
    name = f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}"
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{mpu.get_pipeline_model_parallel_rank():03d}"
    if mpu.get_expert_model_parallel_world_size() > 1:
        name += f"_{mpu.get_expert_model_parallel_rank():03d}"
    return folder / f"iter_{iteration:07d}" / name / "model_optim_rng.pt"


def part_of(whole: dict[str, Tensor], name: str, first: int) -> Tensor:
    """What this rank's parameter of that name has to be; ``first``: layer its chunk begins with."""
    tp, ep = (mpu.get_tensor_model_parallel_rank(), mpu.get_expert_model_parallel_rank())
    tps, eps = (
        mpu.get_tensor_model_parallel_world_size(),
        mpu.get_expert_model_parallel_world_size(),
    )
    if name in VOCABULARY:
        rows = -(-SIZES.vocabulary // tps) * tps
        return F.pad(whole[name], (0, 0, 0, rows - SIZES.vocabulary)).chunk(tps)[tp]
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return whole[name]
    key = layer[2].replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    expert = re.search(r"\.local_experts\.(\d+)", key)
    key = re.sub(r"\.experts(\.local_experts\.\d+)?\.", ".experts.experts.", key)
    tensor = whole[f"decoder.layers.{key}"][first + int(layer[1])]
    if ".experts." in key:
        mine = experts_part(key, tensor.chunk(eps)[ep])
        return mine[int(expert[1])] if expert else mine
    if key.endswith(CUT_BY_ROWS):
        return tensor.chunk(tps)[tp]
    return tensor.chunk(tps, dim=1)[tp] if key.endswith("linear_proj.weight") else tensor


def experts_part(key: str, experts: Tensor) -> Tensor:
    """Of ``[experts, ...]`` what expert tensor parallelism leaves to this rank."""
    rank, count = (
        mpu.get_expert_tensor_parallel_rank(),
        mpu.get_expert_tensor_parallel_world_size(),
    )
    if "linear_fc1" in key:
        return torch.cat([half.chunk(count, 1)[rank] for half in experts.chunk(2, 1)], 1)
    return experts.chunk(count, 2)[rank] if key.endswith("weight") else experts


def chunks_of(kind: str, layout: Layout) -> Iterator[tuple[Any, int]]:
    """This rank's models, and the layer each begins with."""
    rows = -(-SIZES.vocabulary // layout.tp) * layout.tp
    each = SIZES.layers // (layout.pp * layout.vpp)
    for number in range(layout.vpp):
        stage = number if layout.vpp > 1 else None
        first = (number * layout.pp + mpu.get_pipeline_model_parallel_rank()) * each
        yield MODELS[kind](SIZES, layout, rows, stage), first


def loaded(folder: Path, whole: dict[str, Tensor], kind: str, layout: Layout) -> list[str]:
    """Load this rank's file strictly; the parameters that are not what they have to be."""
    path = name_of_file(folder, 0)
    state = torch.load(path, weights_only=False)
    torch.serialization.add_safe_globals([argparse.Namespace])  # as megatron-core does
    torch.load(path, weights_only=True)
    wrong = []
    assert state["checkpoint_version"] == 3.0
    assert state["args"].tensor_model_parallel_size == layout.tp
    for number, (model, first) in enumerate(chunks_of(kind, layout)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        key = f"model{number}" if layout.vpp > 1 else "model"
        model.load_state_dict(state[key], strict=True)
        for name, parameter in model.named_parameters():
            if not torch.equal(parameter.data, part_of(whole, name, first)):
                wrong.append(f"{path.parent.name}/{name}")
    return wrong


class Mode(enum.Enum):
    """Stands for the enums among Megatron-LM's arguments, of modules nobody has here."""

    ONE = 1


Mode.__module__ = "megatron.training.imagined"
sys.modules[Mode.__module__] = types.ModuleType(Mode.__module__)
vars(sys.modules[Mode.__module__])["Mode"] = Mode


def save(folder: Path, whole: dict[str, Tensor], kind: str, layout: Layout) -> None:
    """What ``save_checkpoint`` writes on this rank, ``--ckpt-format torch``."""
    state: dict[str, Any] = {
        "args": arguments(layout),
        "checkpoint_version": 3.0,
        "iteration": 7,
    }
    for number, (model, first) in enumerate(chunks_of(kind, layout)):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(part_of(whole, name, first))
        key = f"model{number}" if layout.vpp > 1 else "model"
        state[key] = model.state_dict_for_save_checkpoint()
    state["optimizer"] = {
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}},
            "param_groups": [{"lr": np.float64(0.1), "betas": (0.9, 0.95), "params": [0]}],
        },
        "grad_scaler": {},
        "fp32_from_fp16_params": [[torch.nn.Parameter(torch.ones(3))]],
    }
    state["opt_param_scheduler"] = {"max_lr": 0.1, "num_steps": 7, "lr_decay_style": "cosine"}
    state["rng_state"] = [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        }
    ]
    state["num_floating_point_operations_so_far"] = 1 << 70
    path = name_of_file(folder, 7)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def arguments(layout: Layout) -> argparse.Namespace:
    """A few of some eight hundred, one of each kind."""
    return argparse.Namespace(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_layers=SIZES.layers,
        params_dtype=torch.float32,
        attention_backend=AttnBackend.auto,
        mode=Mode.ONE,
        activation_func=F.silu,
        gelu=F.gelu,
        relu=torch.relu,
        init_method=functools.partial(torch.nn.init.normal_, mean=0.0, std=0.02),
        blob=io.BytesIO(b"\0\xff"),
        betas=(0.9, 0.95),
        data_path=["a", "b"],
        device=torch.device("cpu"),
        path=Path("/somewhere"),
        steps=range(3),
        numbers=np.arange(3),
        scale=np.float32(2),
        ordered=OrderedDict(a=1),
    )


def read_back(folder: Path, whole: dict[str, Tensor], layout: Layout) -> list[str]:
    """What our reader gives that is not the whole."""
    source: Any = open_source(folder, "megatron")
    family = default_registry().models()["gpt-oss"]
    known = parameters(family, SIZES.config(), "tiny")
    source.arrange(known)
    source.check()
    wrong = [] if dataclasses.replace(source.grid.layout, stages=()) == layout else ["layout"]
    seen = set()
    for name, spec in source.specs().items():
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        seen.add(name)
        key = name.replace(".mlp.experts.", ".mlp.experts.experts.").removesuffix("{E}")
        if layer:
            key = re.sub(r"layers\.\d+\.", "layers.", key)
        want = whole[key][int(layer[1])] if layer else whole[key]
        middle = max(1, len(want) // 3)
        for rows in (slice(0, middle), slice(middle, len(want)), slice(0, len(want))):
            if not torch.equal(source.read(name, rows), want[rows]):
                wrong.append(f"{name} {rows} {spec}")
    further = {name for name in known if name.endswith("mlp.linear_fc1.layer_norm_weight")}
    return wrong + sorted(set(known) - further - seen)


def show(folder: Path) -> dict[str, list[str]]:
    """Every layout, rank by rank in this process."""
    whole = hugging_face(folder / "hf")
    found: dict[str, list[str]] = {}
    for number, layout in enumerate([*even_layouts(), *WITH_ETP]):
        # Experts with biases have no ETP in ours; megatron-core's are made all the same.
        dialect = DIALECTS[number % 4] if layout.etp == 1 else "local-sequential"
        written, saved = folder / f"written{number}", folder / f"saved{number}"
        prepare_import(
            folder / "hf", choice=Choice(format="torch"), layout=layout, dialect=dialect
        ).run(written, workers=1)
        kind = ("ours", "stock")[number % 2] if layout.etp == 1 else "stock"
        wrong = read_back(written, whole, layout)
        files = {path.parent.name for path in written.glob("iter_*/mp_rank_*/*.pt")}
        for rank in range(layout.world):
            with pretend(rank, layout):
                if layout.etp == 1:
                    wrong += loaded(written, whole, "ours", layout)
                if dialect == "local-sequential":
                    wrong += loaded(written, whole, "stock", layout)
                files.discard(name_of_file(written, 0).parent.name)
                save(saved, whole, kind, layout)
        (saved / "latest_checkpointed_iteration.txt").write_text("7")
        wrong += [f"{name} is no rank's" for name in sorted(files)]
        found[f"{layout}, {dialect}, {kind}"] = wrong + read_back(saved, whole, layout)
    return found


GLOO = ((Layout(2, 2, ep=2), "local-sequential", "stock"), (Layout(2, ep=4), "te-grouped", "ours"))


def join(rank: int, folder: Path, whole: dict[str, Tensor]) -> None:
    """One of four real ranks: load ours, save Megatron-LM's."""
    torch.set_num_threads(1)
    for number, (layout, _, kind) in enumerate(GLOO):
        store = dist.FileStore(str(folder / f"store{number}"), layout.world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.world)
        with groups(layout):
            wrong = loaded(folder / f"written{number}", whole, kind, layout)
            save(folder / f"saved{number}", whole, kind, layout)
        dist.barrier()
        dist.destroy_process_group()
        (folder / f"wrong{number}-{rank}").write_text(json.dumps(wrong))


def gloo(folder: Path) -> dict[str, list[str]]:
    """Two layouts with real ranks."""
    whole = hugging_face(folder / "hf")
    for number, (layout, dialect, _) in enumerate(GLOO):
        prepare_import(
            folder / "hf", choice=Choice(format="torch"), layout=layout, dialect=dialect
        ).run(folder / f"written{number}", workers=1)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=join, args=(n, folder, whole)) for n in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(200)
    found = {}
    for number, (layout, dialect, kind) in enumerate(GLOO):
        reports = sorted(folder.glob(f"wrong{number}-*"))
        wrong = [problem for path in reports for problem in json.loads(path.read_text())]
        wrong += [] if len(reports) == 4 else ["a rank died"]
        found[f"{layout}, {dialect}, {kind}"] = wrong + read_back(
            folder / f"saved{number}", whole, layout
        )
    return found


MODES: dict[str, Callable[[Path], dict[str, list[str]]]] = {"show": show, "gloo": gloo}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=MODES)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = MODES[parser.parse_args().mode](Path(folder))
    print(json.dumps(found))
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
