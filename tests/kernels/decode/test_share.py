"""Blocks read by their share: kernels against the oracle with the same draws."""

import dataclasses

import pytest
import torch
from cases import Case, count_kept, make_batch, run_decode

from vllm_ffa_fp8fp8.kernels import DecodePlan
from vllm_ffa_fp8fp8.kernels.counters import SHARE_UNITS, new_counters
from vllm_ffa_fp8fp8.kernels.decode.attention import dealt
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference

TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def share_limits(case: Case, device: str, **changes):
    limits = case.limits(132 if device == "cuda" else 2)
    return dataclasses.replace(limits, rule="share", **changes)


CASES = [
    Case(),
    Case(block_size=16),
    Case(block_size=32, page_size=16),
    Case(block_size=64, page_size=16),
    Case(block_size=16, page_size=48),
    Case(block_size=128, page_size=128),
    Case(lengths=(700, 65), group=1, num_kv_heads=3),
    Case(lengths=(513, 1030), group=7, block_size=16),
    Case(head_size=80, block_size=16),
    Case(head_size=128, dtype=torch.float16),
    Case(fp8_value=True, block_size=16),
    Case(fp8_key=False, residual=False),
    Case(residual=False),
    Case(lengths=(300, 40, 700), query_len=3, block_size=16),
    Case(lengths=(300, 40, 700), query_len=5, group=2),
]


@pytest.mark.parametrize(
    "case, tau",
    [(case, tau) for case in CASES for tau in (0.02, 0.2)] + [(CASES[0], 0.0), (CASES[-2], 0.0)],
    ids=str,
)
def test_matches_oracle(device, case, tau):
    batch = make_batch(case)
    limits = share_limits(case, device)
    tau = torch.tensor([tau])
    counted = new_counters(case.num_kv_heads, device)
    expected_counts = new_counters(case.num_kv_heads, "cpu")
    output, _ = run_decode(batch, device, None, limits, tau=tau, counters=counted, layer=3)
    seq_lens = batch.seq_lens.to(device)
    plan = DecodePlan.allocate(limits, torch.device(device)).update(seq_lens)
    shared = dealt(plan, batch.planes(device), case.dtype)
    expected, kept = decode_attention_reference(
        batch.query(), batch.planes(), batch.block_table, batch.seq_lens,
        block_size=case.block_size, scale=case.scale, tau=tau, layer=3,
        dealt=shared, counters=expected_counts, dtype=torch.float64,
    )  # fmt: skip
    assert counted.cpu()[:, :4].equal(expected_counts[:, :4])
    assert (counted.cpu() - expected_counts).abs().max() <= SHARE_UNITS // 1000
    assert expected_counts[:, :3].tolist() == count_kept(batch, kept)
    error = (output.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[case.dtype]
