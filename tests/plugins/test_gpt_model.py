"""GPT-OSS as a GPTModel against transformers: logits, gradients, names, and what must be refused.

The comparison is worth what it can detect, so every feature is also broken on purpose.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from gptoss_convert.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

# megatron-core warns at import that Transformer Engine and Apex are missing.
pytestmark = pytest.mark.filterwarnings("ignore")

SUPPORT = Path(__file__).parents[1] / "support"
LENGTH = 150  # beyond the window (9) and beyond YaRN's original length (64)
SQUARE = {"intermediate_size": 48, "num_hidden_layers": 4}
LAYERS, EXPERTS, HIDDEN, WIDTH, HEADS, VOCAB = 6, 8, 48, 36, 10, 134
QKV = (10 + 2 * 2) * 14


@pytest.fixture(scope="module")
def tiny() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SUPPORT / "tiny_gptoss.py")))


@pytest.fixture(scope="module")
def gpt() -> Iterator[Any]:
    """The package, in a world of one CPU."""
    from gptoss_plugins.gpt_model import build

    build.initialize_parallel(device="cpu")
    yield build
    build.shut_down_parallel()


@pytest.fixture(scope="module")
def case(tiny: SimpleNamespace) -> SimpleNamespace:
    """transformers' model, its logits, and the same model in Megatron's terms."""
    return make_case(tiny)


def make_case(tiny: SimpleNamespace, **sizes: Any) -> SimpleNamespace:
    hf = tiny.tiny_model(**sizes)
    config = hf.config.to_dict()
    ids = tiny.prompt(config["vocab_size"], LENGTH)
    return SimpleNamespace(
        hf=hf,
        ids=ids,
        logits=hf(ids).logits.detach(),
        config=config,
        fields=tiny.megatron_fields(config),
        tensors=tiny.megatron_tensors(config, {k: v.data for k, v in hf.named_parameters()}),
    )


def pieces(model: Any) -> list[Any]:
    """The model's parameters as a checkpoint sees them: views with a name and a place."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    shards = model.sharded_state_dict()
    apply_factories(shards)
    flat = [p for v in shards.values() for p in (v if isinstance(v, list) else [v])]
    return [piece for piece in flat if isinstance(piece, ShardedTensor)]


@torch.no_grad()
def fill(model: Any, tensors: dict[str, Tensor]) -> Any:
    for piece in pieces(model):
        piece.data.copy_(tensors[piece.key][piece.global_slice()])
    return model.eval()


def build(gpt: Any, case: SimpleNamespace, tensors: Any = None, **fields: Any) -> Any:
    model = gpt.build_gpt_model(case.fields | fields, dtype=torch.float32)
    return fill(model, tensors or case.tensors)


def run(model: Any, ids: Tensor, **options: Any) -> Tensor:
    device = next(model.parameters()).device
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    return model(ids.to(device), positions, options.pop("attention_mask", None), **options)


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.cpu() - theirs).norm() / theirs.norm()).item()


# --- the same numbers as transformers ------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, SQUARE], ids=["all-different", "square-experts"])
def test_logits_are_those_of_transformers(gpt: Any, tiny: Any, sizes: dict[str, int]) -> None:
    case = make_case(tiny, **sizes)
    logits = run(build(gpt, case), case.ids)
    assert error(logits, case.logits) < 1e-5
    assert torch.equal(logits.argmax(-1), case.logits.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"window_size": [9, 0]}, id="window one too wide"),
        pytest.param({"window_size": [7, 0]}, id="window one too narrow"),
        pytest.param({"window_attn_skip_freq": [0, 1] * 3}, id="window on the wrong layers"),
        pytest.param({"window_attn_skip_freq": None}, id="window everywhere"),
        pytest.param({"softmax_type": "vanilla"}, id="no sinks"),
        pytest.param({"softmax_type": "off-by-one"}, id="sinks of zero"),
        pytest.param({"activation_func_clamp_value": None}, id="no clamp"),
        pytest.param({"glu_linear_offset": 0.0}, id="no offset on up"),
        pytest.param({"moe_router_pre_softmax": True}, id="softmax before top-k"),
        pytest.param({"moe_router_topk": 2}, id="one expert less"),
        pytest.param({"yarn_correction_range_round_to_int": True}, id="YaRN rounded"),
        pytest.param({"yarn_original_max_position_embeddings": 128}, id="YaRN's length"),
        pytest.param({"yarn_rotary_scaling_factor": 31.0}, id="YaRN's factor"),
        pytest.param({"yarn_mscale": 1.0, "yarn_mscale_all_dim": 1.0}, id="no YaRN mscale"),
        pytest.param({"rotary_base": 10000.0}, id="rotary base"),
        pytest.param({"layernorm_epsilon": 1e-2}, id="epsilon"),
    ],
)
def test_a_wrong_field_shows(gpt: Any, case: SimpleNamespace, fields: dict[str, Any]) -> None:
    assert error(run(build(gpt, case, **fields), case.ids), case.logits) > 1e-2


def _broken(name: str, tensor: Tensor) -> Tensor:
    """The tensor as a plausible mistake of a converter would store it."""
    if name.endswith("linear_fc2.weight"):
        return tensor.transpose(-1, -2)
    if name.endswith("linear_fc1.weight"):
        return torch.cat(tensor.chunk(2, dim=-2)[::-1], dim=-2)
    return tensor.flip(-1)


@torch.no_grad()
@pytest.mark.parametrize(
    "key",
    ["linear_fc2.weight", "linear_fc1.weight", "softmax_offset", "linear_qkv.bias", "router.bias"],
)
def test_a_wrong_tensor_shows(gpt: Any, tiny: Any, key: str) -> None:
    case = make_case(tiny, **SQUARE)  # where a transposed down_proj has the right shape
    wrong = {k: _broken(k, v) if k.endswith(key) else v for k, v in case.tensors.items()}
    assert error(run(build(gpt, case, wrong), case.ids), case.logits) > 1e-2


def test_gradients_are_those_of_transformers(gpt: Any, tiny: Any, case: SimpleNamespace) -> None:
    hf, model = tiny.tiny_model(), build(gpt, case).train()
    labels = case.ids.roll(-1, dims=1)
    for logits in (hf(case.ids).logits, run(model, case.ids)):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    theirs = tiny.megatron_tensors(case.config, {k: v.grad for k, v in hf.named_parameters()})
    for parameter in model.parameters():
        parameter.data = parameter.grad
    for piece in pieces(model):
        assert error(piece.data, theirs[piece.key][piece.global_slice()]) < 1e-4, piece.key


# --- the other ways through attention ------------------------------------------------------------


@torch.no_grad()
def test_blocks_of_queries_change_nothing(gpt: Any, case: SimpleNamespace) -> None:
    model = build(gpt, case)
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.query_block = 32
    assert error(run(model, case.ids), case.logits) < 1e-5


@torch.no_grad()
def test_hidden_padding_changes_nothing(gpt: Any, case: SimpleNamespace) -> None:
    padded = torch.cat([case.ids.flip(0)[:, :20], case.ids], dim=1)
    hide = torch.zeros(1, 1, 1, LENGTH + 20, dtype=torch.bool)
    hide[..., :20] = True
    logits = run(build(gpt, case), padded, attention_mask=hide)[:, 20:]
    assert error(logits, case.logits) < 1e-5  # rotary positions count by their distance alone


@torch.no_grad()
def test_token_by_token_with_a_cache(gpt: Any, case: SimpleNamespace) -> None:
    from megatron.core.inference.contexts import StaticInferenceContext

    model, start = build(gpt, case), LENGTH - 12
    context = StaticInferenceContext(max_batch_size=len(case.ids), max_sequence_length=LENGTH)
    options = {"inference_context": context, "runtime_gather_output": True}
    for first, last in [(0, start), *((n, n + 1) for n in range(start, LENGTH))]:
        logits = run(model, case.ids[:, first:last], **options)
        assert error(logits[:, -1], case.logits[:, last - 1]) < 1e-5
        context.sequence_len_offset += last - first
        context.enable_decode_mode()


# --- names and types -----------------------------------------------------------------------------


def test_checkpoint_names_and_shapes(gpt: Any, case: SimpleNamespace) -> None:
    layers = {
        "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": (QKV, HIDDEN),
        "self_attention.linear_qkv.bias": (QKV,),
        "self_attention.linear_proj.weight": (HIDDEN, HEADS * 14),
        "self_attention.linear_proj.bias": (HIDDEN,),
        "self_attention.core_attention.softmax_offset": (HEADS,),
        "pre_mlp_layernorm.weight": (HIDDEN,),
        "mlp.router.weight": (EXPERTS, HIDDEN),
        "mlp.router.bias": (EXPERTS,),
        "mlp.experts.experts.linear_fc1.weight": (EXPERTS, 2 * WIDTH, HIDDEN),
        "mlp.experts.experts.linear_fc1.bias": (EXPERTS, 2 * WIDTH),
        "mlp.experts.experts.linear_fc2.weight": (EXPERTS, HIDDEN, WIDTH),
        "mlp.experts.experts.linear_fc2.bias": (EXPERTS, HIDDEN),
    }
    assert {piece.key: tuple(piece.global_shape) for piece in pieces(build(gpt, case))} == {
        "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        "output_layer.weight": (VOCAB, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
        **{f"decoder.layers.{name}": (LAYERS, *shape) for name, shape in layers.items()},
    }


def test_extra_states_are_those_of_stock_modules(gpt: Any, case: SimpleNamespace) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    shards = build(gpt, case).sharded_state_dict().values()
    found = {shard.unique_key for shard in shards if isinstance(shard, ShardedObject)}
    assert found == {
        f"decoder.layers.self_attention.{linear}._extra_state/shard_{n}_{LAYERS}"
        for linear in ("linear_qkv", "linear_proj")
        for n in range(LAYERS)
    } | {
        f"decoder.layers.mlp.experts.experts.{linear}._extra_state/shard_{n}.{e}_{LAYERS}.{EXPERTS}"
        for linear in ("linear_fc1", "linear_fc2")
        for n in range(LAYERS)
        for e in range(EXPERTS)
    }


def test_experts_are_one_chunk_each_and_load_in_place(gpt: Any, case: SimpleNamespace) -> None:
    shards = build(gpt, case).sharded_state_dict()
    factory = shards["decoder.layers.3.mlp.experts.linear_fc1.weight"]
    parts = factory.build()
    assert {tuple(part.data.shape) for part in parts} == {(WIDTH, HIDDEN)}
    assert len(parts) == 2 * EXPERTS
    views = [part.data for part in parts]
    assert factory.merge_fn(views).data_ptr() == factory.data.data_ptr()
    assert torch.equal(factory.merge_fn([view.clone() for view in views]), factory.data)


def test_rotary_frequencies_keep_their_precision(gpt: Any, case: SimpleNamespace) -> None:
    model = gpt.build_gpt_model(case.fields, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    angles, factor = model.rotary_pos_emb(LENGTH)
    theirs = case.hf.model.rotary_emb
    assert factor == pytest.approx(theirs.attention_scaling)
    torch.testing.assert_close(
        angles[-1, 0, 0, :7], (LENGTH - 1) * theirs.inv_freq, rtol=1e-6, atol=0
    )


def test_random_weights_are_drawn_per_expert(gpt: Any, case: SimpleNamespace) -> None:
    model = gpt.build_gpt_model(case.fields, dtype=torch.float32, random_weights=True)
    weight = model.decoder.layers[0].mlp.experts.linear_fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert len({expert.sum().item() for expert in weight}) == EXPERTS


# --- configs -------------------------------------------------------------------------------------


def test_a_run_config_is_understood(gpt: Any, case: SimpleNamespace) -> None:
    from gptoss_plugins.gpt_model.config import make_config

    extra = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "activation_func": {
            "_call_": False,
            "_target_": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
        },
        "params_dtype": {"_call_": False, "_target_": "torch.bfloat16"},
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "position_embedding_type": "yarn",
        "tensor_model_parallel_size": 8,
    }
    config = make_config(case.fields | extra, dtype=torch.float32, device=torch.device("cpu"))
    assert config.window_size == (8, 0)
    assert (config.params_dtype, config.tensor_model_parallel_size) == (torch.float32, 1)


def test_all_problems_of_a_config_are_told_at_once(gpt: Any, case: SimpleNamespace) -> None:
    fields = case.fields | {"normalization": "LayerNorm", "activation_func": "gelu"}
    del fields["rotary_base"], fields["kv_channels"]
    with pytest.raises(ConfigError) as caught:
        gpt.build_gpt_model(fields)
    for name in ("normalization", "activation_func", "rotary_base", "kv_channels"):
        assert re.search(rf"\b{name} is ", str(caught.value))


@pytest.mark.parametrize(
    "field",
    [
        {"window_size": [8, 1]},
        {"window_size": [-1, 0]},
        {"window_attn_skip_freq": [1, 0]},
    ],
)
def test_impossible_windows_are_refused(gpt: Any, case: SimpleNamespace, field: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        gpt.build_gpt_model(case.fields | field)


# --- a GPU, where there is one -------------------------------------------------------------------


@pytest.fixture
def cuda(gpt: Any) -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    gpt.shut_down_parallel()
    yield gpt.initialize_parallel(device="cuda")
    gpt.shut_down_parallel()
    gpt.initialize_parallel(device="cpu")


@pytest.mark.gpu
@torch.no_grad()
def test_logits_on_cuda(gpt: Any, case: SimpleNamespace, cuda: torch.device) -> None:
    model = gpt.build_gpt_model(case.fields, dtype=torch.float32, device=cuda)
    assert error(run(fill(model, case.tensors), case.ids), case.logits) < 1e-5


@pytest.mark.gpu
def test_one_kernel_for_all_experts(cuda: torch.device) -> None:
    from gptoss_plugins.gpt_model.experts import grouped_product

    counts = torch.tensor([5, 0, 30, 2])
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 64), (4, 48, 64)]
    x, weight = (torch.randn(s, generator=generator, requires_grad=True) for s in shapes)
    twins = [t.detach().to(cuda, torch.bfloat16).requires_grad_() for t in (x, weight)]
    for one, device in (((x, weight), "cpu"), (twins, cuda)):
        y = grouped_product(*one, counts)
        y.backward(torch.ones(37, 48, dtype=y.dtype, device=device))
        assert error(y.detach().float(), grouped_product(x, weight, counts).detach()) < 1e-2
    for mine, theirs in zip(twins, (x, weight), strict=True):
        assert error(mine.grad.float(), theirs.grad) < 1e-2
