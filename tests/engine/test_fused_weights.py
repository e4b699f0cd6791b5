"""Rotary tables that end too soon, and weights that are replaced after loading."""

import copy

import pytest
import torch
from attention_modules import HIDDEN, TOKENS, check_fused, make_attention, make_config, run
from vllm.config import CUDAGraphMode
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.attention import fused_qkv, weight_places
from vllm_ffa_fp8fp8.attention.fused_qkv import FROM_HIDDEN_STATES

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")


def messages_of(monkeypatch, level: str) -> list[str]:
    messages = []
    for module in (fused_qkv, weight_places):
        monkeypatch.setattr(
            module.logger, level, lambda text, *given: messages.append(text % given)
        )
    return messages


@pytest.mark.parametrize(
    "rope, rows",
    [
        ({"rope_type": "default"}, 1024),
        ({"rope_type": "linear", "factor": 2.0}, 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 2048),
    ],
)
def test_modules_with_a_short_rotary_table_stay(distributed, monkeypatch, rope, rows):
    """A table that ends before max_model_len, by one position, too."""
    messages = messages_of(monkeypatch, "warning_once")
    vllm_config = make_config()
    shape = {"rope_parameters": rope | {"rope_theta": 1e4}, "max_position": 1024}
    vllm_config.model_config.max_model_len = rows + 1
    attention = make_attention(Qwen3Attention, vllm_config, **shape)
    assert attention.fused_path is None and attention.attn.impl.fused_qkv is None
    (message,) = messages
    assert f"{rows} positions and max_model_len is {rows + 1}" in message
    vllm_config.model_config.max_model_len = rows
    assert make_attention(Qwen3Attention, vllm_config, **shape).fused_path == FROM_HIDDEN_STATES


REPLACED = {
    "q_norm": ("q_norm", "weight"),
    "k_norm": ("k_norm", "weight"),
    "rotary table": ("rotary_emb", "cos_sin_cache"),
    "weight": ("qkv_proj", "weight"),
    "bias": ("qkv_proj", "bias"),
}


def replaceable_attention(vllm_config) -> torch.nn.Module:
    """With a norm and a bias, a rotation that no other test has, and, as on a GPU, a projection
    that reads its weight."""
    attention = make_attention(Qwen3Attention, vllm_config, qkv_bias=True)
    attention.rotary_emb = copy.deepcopy(attention.rotary_emb)
    linear = attention.qkv_proj
    weight = torch.randn(linear.bias.shape[0], HIDDEN, dtype=torch.bfloat16) * HIDDEN**-0.5
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.cpu_linear = torch.nn.functional.linear
    impl = attention.attn.impl
    impl.fused_qkv = fused_qkv.fuse(impl, attention, vllm_config)
    return attention


def replace_tensor(attention, part: str, how: str) -> torch.Tensor:
    """Puts other values into the place, in another storage; returns the tensor that was there."""
    module, name = getattr(attention, REPLACED[part][0]), REPLACED[part][1]
    tensor = getattr(module, name)
    before, new = tensor.data, tensor.data.flip(0).contiguous()
    if how == "data":
        tensor.data = new
    elif isinstance(tensor, torch.nn.Parameter):
        setattr(module, name, torch.nn.Parameter(new, requires_grad=False))
    else:
        setattr(module, name, new)
    return before


@pytest.mark.parametrize("how", ["data", "tensor"])
@pytest.mark.parametrize("part", REPLACED)
def test_weights_that_are_replaced_are_followed(distributed, monkeypatch, part, how):
    """What the module's own forward gives afterwards, which is not what it gave before."""
    vllm_config = make_config()
    attention = replaceable_attention(vllm_config)
    slots = torch.tensor([20, 3, 4, -1, 5, 47, 7])
    before = run(attention, vllm_config, slots)
    replace_tensor(attention, part, how)
    after = run(attention, vllm_config, slots)
    assert (after[0] - before[0]).abs().max() > 0.1 * before[0].abs().max()
    check_fused(attention, vllm_config, monkeypatch)


@pytest.mark.parametrize("part", REPLACED)
def test_graphs_get_the_new_weights(distributed, monkeypatch, part):
    """They read where the old ones were."""
    messages = messages_of(monkeypatch, "warning_once")
    vllm_config = make_config()
    attention = replaceable_attention(vllm_config)
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    slots = torch.arange(TOKENS)
    run(attention, vllm_config, slots)
    assert not messages
    captured = replace_tensor(attention, part, "data")
    expected = captured.flip(0)
    run(attention, vllm_config, slots)
    module, name = REPLACED[part]
    assert torch.equal(captured, expected)
    assert getattr(getattr(attention, module), name).data_ptr() == captured.data_ptr()
    assert len(messages) == 1 and "CUDA graphs" in messages[0]
    check_fused(attention, vllm_config, monkeypatch)


def test_weights_of_another_kind_are_refused(distributed):
    vllm_config = make_config()
    attention = replaceable_attention(vllm_config)
    attention.rotary_emb.cos_sin_cache = attention.rotary_emb.cos_sin_cache[:5].clone()
    with pytest.raises(ValueError, match="cos_sin_cache was replaced .* another shape"):
        run(attention, vllm_config, torch.arange(TOKENS))
