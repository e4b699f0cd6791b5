"""Attention modules of vLLM's models, run fused and by their own forward, on the CPU."""

import dataclasses
import functools
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from processes import MODEL
from vllm.config import LoRAConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.mistral import MistralAttention
from vllm.model_executor.models.qwen2 import Qwen2Attention
from vllm.model_executor.models.qwen2_moe import Qwen2MoeAttention
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.attention import fused_qkv
from vllm_ffa_fp8fp8.attention.fused_qkv import FROM_HIDDEN_STATES, FROM_PROJECTIONS
from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8Metadata, PrefillBatch
from vllm_ffa_fp8fp8.integration import compat
from vllm_ffa_fp8fp8.kernels.reference import gather_kv_reference
from vllm_ffa_fp8fp8.registry import FUSED_ATTENTION_OP

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 256, 4, 2, 64
TOKENS, PAGE_SIZE, NUM_PAGES = 7, 16, 3
CLASSES = [LlamaAttention, MistralAttention, Qwen2Attention, Qwen2MoeAttention, Qwen3Attention]


class OtherAttention(LlamaAttention):
    """Turns the hidden states round first."""

    def forward(self, positions, hidden_states):
        return super().forward(positions, -hidden_states)


def make_config(**options):
    config = EngineArgs(
        model=str(MODEL),
        attention_backend="FFA_FP8FP8",
        additional_config={"ffa_fp8fp8": options},
        gpu_memory_utilization=0.1,
    ).create_engine_config()
    config.model_config.hf_config.head_dim = HEAD_SIZE
    return config


@pytest.fixture(scope="module")
def distributed(tmp_path_factory) -> Iterator[None]:
    with set_current_vllm_config(make_config()):
        store = tmp_path_factory.mktemp("store") / "file"
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield


def make_attention(attention_class, vllm_config, **more) -> torch.nn.Module:
    """A module with random weights, loaded as vLLM loads one."""
    torch.manual_seed(0)
    hf_config = vllm_config.model_config.hf_config
    arguments = {"rope_parameters": hf_config.rope_parameters, "head_dim": HEAD_SIZE}
    if attention_class is Qwen2Attention:
        del arguments["head_dim"]
    if attention_class is Qwen2MoeAttention:
        arguments = {"rope_parameters": hf_config.rope_parameters}
    if issubclass(attention_class, LlamaAttention):
        arguments = {"config": hf_config}
    arguments |= {"hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": KV_HEADS}
    layer = len(vllm_config.compilation_config.static_forward_context)
    prefix = f"model.layers.{layer}.self_attn"
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(vllm_config):
            attention = attention_class(**arguments | more, prefix=prefix)
    finally:
        torch.set_default_dtype(dtype)
    for name, parameter in attention.named_parameters():
        scale = HIDDEN**-0.5 if parameter.dim() == 2 else 0.3
        parameter.data.normal_().mul_(scale).add_(1.0 if "norm" in name else 0.0)
    for linear in (attention.qkv_proj, attention.o_proj):
        linear.quant_method.process_weights_after_loading(linear)
    with set_current_vllm_config(vllm_config):
        attention.attn.process_weights_after_loading(torch.bfloat16)
    return attention


def run(attention, vllm_config, slots) -> tuple[torch.Tensor, ...]:
    """Output, and the cached K and V of one prompt."""
    layout = attention.attn.impl.layout
    shape = (NUM_PAGES, KV_HEADS, PAGE_SIZE, layout.bytes_per_token)
    cache = attention.attn.kv_cache = torch.zeros(shape, dtype=torch.uint8)
    starts = torch.tensor([0, TOKENS], dtype=torch.int32)
    pages = torch.arange(NUM_PAGES, dtype=torch.int32)
    prefill = PrefillBatch(starts, starts, pages[None], [0, TOKENS], [TOKENS])
    metadata = FFAFP8FP8Metadata(
        num_decodes=0,
        num_decode_tokens=0,
        query_len=1,
        query_start_loc=None,
        num_actual_tokens=TOKENS,
        seq_lens=starts[:0],
        block_table=pages[:0, None],
        block_size=16,
        limit=None,
        plan=None,
        prefill=prefill,
    )
    name = attention.attn.layer_name
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    with (
        torch.inference_mode(),
        set_current_vllm_config(vllm_config),
        set_forward_context(
            {name: metadata} if slots is not None else None,
            vllm_config,
            slot_mapping={name: slots} if slots is not None else {},
        ),
    ):
        output = attention(torch.arange(TOKENS) + 3, hidden.bfloat16())
    key, value = gather_kv_reference(
        layout.split(cache), pages, NUM_PAGES * PAGE_SIZE, torch.float32
    )
    return output.float(), key, value


def count_calls(monkeypatch, attention) -> list:
    ops, calls = attention.attn.impl.ops, []
    original = ops.rope_and_write

    def counted(qkv, *arguments):
        calls.append(qkv)
        original(qkv, *arguments)

    monkeypatch.setattr(ops, "rope_and_write", counted)
    return calls


def check_fused(attention, vllm_config, monkeypatch) -> None:
    """The fused way runs, and gives what the module's own forward gives."""
    calls = count_calls(monkeypatch, attention)
    slots = torch.tensor([20, 3, 4, -1, 5, 47, 7])
    fused = run(attention, vllm_config, slots)
    assert len(calls) == 1
    monkeypatch.setattr(attention, "fused_path", None)
    own = run(attention, vllm_config, slots)
    assert len(calls) == 1
    for ours, theirs in zip(fused, own, strict=True):
        assert theirs.abs().max() > 0.5
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 2**-6, error  # roundings that the fused way has not
    assert (fused[1].abs().sum((1, 2)) > 0).nonzero().flatten().tolist() == [3, 4, 5, 7, 20, 47]


@pytest.mark.parametrize("attention_class", CLASSES)
def test_fused_is_the_same(distributed, monkeypatch, attention_class):
    vllm_config = make_config()
    attention = make_attention(attention_class, vllm_config)
    assert attention.fused_path == FROM_HIDDEN_STATES
    check_fused(attention, vllm_config, monkeypatch)


@pytest.mark.parametrize("attention_class", [LlamaAttention, Qwen3Attention])
def test_behind_a_linear_that_is_no_plain_matrix(distributed, monkeypatch, attention_class):
    vllm_config = make_config()
    vllm_config.lora_config = LoRAConfig()
    attention = make_attention(attention_class, vllm_config)
    assert attention.fused_path == FROM_PROJECTIONS
    check_fused(attention, vllm_config, monkeypatch)


def test_profiling_writes_nothing(distributed):
    vllm_config = make_config()
    attention = make_attention(LlamaAttention, vllm_config)
    output, key, value = run(attention, vllm_config, None)
    assert output.shape == (TOKENS, HIDDEN)
    assert not key.any() and not value.any()


def test_off(distributed):
    attention = make_attention(LlamaAttention, make_config(fused_kproj="off"))
    assert attention.attn.impl.fused_qkv is None
    assert getattr(attention, "fused_path", None) is None


def test_other_forwards_stay(distributed):
    """A forward that does more, q scaled by position, and a rotation of another kind."""
    vllm_config = make_config()
    other = make_attention(OtherAttention, vllm_config)
    assert other.fused_path is None and other.attn.impl.fused_qkv is None
    scaling = {"original_max_position_embeddings": 1024, "beta": 0.1}
    vllm_config.model_config.hf_config.llama_4_scaling = scaling
    assert make_attention(MistralAttention, vllm_config).fused_path is None
    mrope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    assert make_attention(Qwen3Attention, vllm_config, rope_parameters=mrope).fused_path is None
    assert make_attention(Qwen3Attention, vllm_config).fused_path == FROM_HIDDEN_STATES


@pytest.mark.parametrize("part", ["qkv_proj", "q_norm", "k_norm"])
def test_modules_with_offloaded_weights_stay(distributed, monkeypatch, part):
    """A weight that is elsewhere than the rotation once it is loaded."""
    vllm_config = make_config()
    attention = make_attention(Qwen3Attention, vllm_config)
    module, messages = getattr(attention, part), []
    module.weight = torch.nn.Parameter(torch.empty(HEAD_SIZE, device="meta"), requires_grad=False)
    monkeypatch.setattr(fused_qkv.logger, "info_once", lambda *given: messages.append(given))
    assert fused_qkv.fuse(attention.attn.impl, attention, vllm_config) is None
    assert attention.fused_path is None
    ((text, *arguments),) = messages
    assert f"weight of its {type(module).__name__} is offloaded to meta" in text % tuple(arguments)


def test_problems_of_projections(distributed):
    vllm_config = make_config()
    linear = make_attention(LlamaAttention, vllm_config).qkv_proj
    assert compat.projection_problem(linear, vllm_config) is None
    with_lora = dataclasses.replace(vllm_config, lora_config=LoRAConfig())
    assert "LoRA" in compat.projection_problem(linear, with_lora)
    linear.tp_size = 2
    assert "tensor-parallel" in compat.projection_problem(linear, vllm_config)
    linear.quant_method = object()
    assert "quantised" in compat.projection_problem(linear, vllm_config)
    assert "no" not in compat.projection_problem(torch.nn.Linear(2, 2), vllm_config)[:2]


def test_graphs_are_split_at_the_operator(distributed):
    """Where they are split at vLLM's attention, and only if the operator is used."""
    attention_op = "vllm::unified_attention_with_output"

    def splitting_ops(**options) -> list[str]:
        vllm_config = make_config(**options)
        vllm_config.compilation_config.splitting_ops = [attention_op]
        for _ in range(2):
            make_attention(LlamaAttention, vllm_config)
        return vllm_config.compilation_config.splitting_ops

    assert splitting_ops() == [attention_op, FUSED_ATTENTION_OP]
    assert splitting_ops(fused_kproj="off") == [attention_op]


def test_every_class_is_wrapped_once(distributed):
    hooks = torch.nn.modules.module._global_module_registration_hooks
    vllm_config = make_config()
    states = []
    for _ in range(2):
        make_attention(LlamaAttention, vllm_config)
        states.append((LlamaAttention.forward, len(hooks)))
    assert states[0] == states[1]
    assert not hasattr(LlamaAttention.forward.__wrapped__, "__wrapped__")


def test_forwards_that_others_replaced_stay(distributed, monkeypatch):
    original = LlamaAttention.forward

    def replaced(self, positions, hidden_states):
        return original(self, positions, 2 * hidden_states)

    for forward in (replaced, functools.wraps(original)(replaced), functools.partial(replaced)):
        monkeypatch.setattr(LlamaAttention, "forward", forward)
        assert not compat.is_fusable_forward(LlamaAttention.forward)
    assert compat.is_fusable_forward(Qwen3Attention.forward)


def test_planes_live_as_long_as_the_cache(distributed, monkeypatch):
    """The model can outlive the engine that used it, which frees the cache. Kernels are compiled
    when it is bound."""
    attention = make_attention(LlamaAttention, make_config())
    impl, prepared = attention.attn.impl, []
    monkeypatch.setattr(impl.ops, "compile", lambda planes: prepared.append(id(planes)))
    cache = torch.zeros(2, KV_HEADS, PAGE_SIZE, impl.layout.bytes_per_token, dtype=torch.uint8)
    planes = impl.planes(cache)
    assert impl.planes(cache) is planes
    assert prepared == [id(planes)]
    storage = weakref.ref(cache.untyped_storage())
    planes = weakref.ref(planes.key)
    del cache
    gc.collect()
    assert planes() is None and storage() is None


def test_operator_writes_where_the_graph_wants_it():
    """A tensor of the operator's own would lie elsewhere at every replay of a piecewise graph."""
    schema = torch.ops.vllm_ffa.fused_attention.default._schema
    assert not schema.returns
    assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == [
        "output"
    ]
