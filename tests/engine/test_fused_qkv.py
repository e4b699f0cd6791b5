"""Attention modules of vLLM's models, run fused and by their own forward, on the CPU."""

import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from attention_modules import (
    HEAD_SIZE,
    HIDDEN,
    KV_HEADS,
    PAGE_SIZE,
    TOKENS,
    check_fused,
    make_attention,
    make_config,
    run,
)
from vllm.config import LoRAConfig
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.mistral import MistralAttention
from vllm.model_executor.models.qwen2 import Qwen2Attention
from vllm.model_executor.models.qwen2_moe import Qwen2MoeAttention
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.attention import fused_qkv
from vllm_ffa_fp8fp8.attention.fused_qkv import FROM_HIDDEN_STATES, FROM_PROJECTIONS
from vllm_ffa_fp8fp8.integration import compat
from vllm_ffa_fp8fp8.registry import FUSED_ATTENTION_OP

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")

CLASSES = [LlamaAttention, MistralAttention, Qwen2Attention, Qwen2MoeAttention, Qwen3Attention]


class OtherAttention(LlamaAttention):
    """Turns the hidden states round first."""

    def forward(self, positions, hidden_states):
        return super().forward(positions, -hidden_states)


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
