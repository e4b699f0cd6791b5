"""Prefill on the CPU against the masked oracle in float64."""

import pytest
import torch

from vllm_ffa_fp8fp8.attention.cpu_ops import prefill_attention
from vllm_ffa_fp8fp8.kernels.reference import prefill_attention_reference

SHAPES = [  # query_len, context_len, num_heads, num_kv_heads, head_size
    (1, 0, 4, 4, 64),
    (1, 1, 3, 1, 64),
    (63, 0, 8, 2, 128),
    (7, 130, 7, 7, 80),
    (129, 1000, 6, 2, 96),
    (300, 17, 16, 1, 256),
]


@pytest.mark.parametrize("query_len, context_len, num_heads, num_kv_heads, head_size", SHAPES)
def test_prefill_attention(query_len, context_len, num_heads, num_kv_heads, head_size):
    torch.manual_seed(0)
    query = torch.randn(query_len, num_heads, head_size)
    key, value = torch.randn(2, context_len + query_len, num_kv_heads, head_size)
    scale = 1.7 * head_size**-0.5
    expected = prefill_attention_reference(query.double(), key.double(), value.double(), scale)
    context = (key[:context_len], value[:context_len]) if context_len else None
    output = prefill_attention(query, key[context_len:], value[context_len:], context, scale)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=5e-6)
    if context_len:
        alone = prefill_attention(query, key[context_len:], value[context_len:], None, scale)
        assert (alone - output).abs().max() > 0.01


@pytest.mark.parametrize("context_len", [0, 40])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_sinks_are_scores_without_a_value_nor_a_cap(context_len, soft_cap, has_sinks):
    torch.manual_seed(0)
    query = torch.randn(9, 4, 64)
    key, value = torch.randn(2, context_len + 9, 2, 64)
    sinks = torch.tensor([-2.0, 0.0, 1.0, 5.0]) if has_sinks else None
    context = (key[:context_len], value[:context_len]) if context_len else None
    new = slice(context_len, None)
    output = prefill_attention(query, key[new], value[new], context, 0.125, sinks, soft_cap)
    keys, values = (t.double().repeat_interleave(2, dim=1) for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * 0.125
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(torch.ones(9, len(key)).triu(context_len + 1).bool(), -torch.inf)
    if has_sinks:
        sink_scores = sinks.double()[:, None, None].expand(-1, 9, 1)
        scores = torch.cat([scores, sink_scores], dim=-1)
    weights = scores.softmax(-1)[..., : len(key)]
    expected = torch.einsum("hqk,khd->qhd", weights, values)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=5e-6)
