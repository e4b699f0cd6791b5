"""A dense layer beside layers by share: it counts blocks of the same size."""

import math

import pytest
import torch
from cases import Case, make_batch, poisoned_scratch
from share_cases import share_limits

from vllm_ffa_fp8fp8.kernels import DecodePlan, decode_attention
from vllm_ffa_fp8fp8.kernels.counters import new_counters
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference


@pytest.mark.parametrize("num_processors", [1, 5])
def test_blocks_are_counted_as_where_they_are_drawn(device, num_processors):
    lengths = (1, 16, 17, 64, 65, 150, 256, 300)
    case = Case(lengths, 64, 2, 1, page_size=64, block_size=16)
    batch = make_batch(case)
    limits = share_limits(case, num_processors=num_processors)
    assert limits.span == 64
    seq_lens, query, planes = batch.seq_lens.to(device), batch.query(device), batch.planes(device)
    output = torch.full(query.shape, math.nan, dtype=torch.float32, device=device)
    if device == "cuda":
        output = output.to(query.dtype)
    counters, expected = new_counters(1, device), new_counters(1, "cpu")
    plan = DecodePlan.allocate(limits, torch.device(device)).update(seq_lens)
    options = {"scale": case.scale, "min_context": 60}
    decode_attention(
        query, planes, batch.block_table.to(device), seq_lens, plan,
        poisoned_scratch(limits, device), output, counters=counters, **options,
    )  # fmt: skip
    decode_attention_reference(
        batch.query(), batch.planes(), batch.block_table, batch.seq_lens,
        block_size=16, counters=expected, **options,
    )  # fmt: skip
    assert counters.cpu().equal(expected)
    kept, total, short = expected[0, :3].tolist()
    assert kept == total == sum(-(-length // 16) for length in lengths[3:])
    assert short == 1 + 1 + 2
