"""Attention sinks: a score a head that takes part in the softmax, and in what is skipped."""

import math

import pytest
import torch
from cases import Case, count_kept, make_batch, run_decode
from share_cases import TOLERANCE, error_of, expected_of, run_share, share_limits
from truth import assert_within_budget, choose_delta, plain_attention, reference

CASES = [
    Case((300, 1, 63), head_size=64, group=8, num_kv_heads=1, block_size=16),
    Case((5, 130), group=3, query_len=3, dtype=torch.float16),
]
SINKS = (-math.inf, -3.0, 0.0, 1.0, 4.0, 30.0)  # beside scores of up to 3 or so


def sinks_of(case: Case) -> torch.Tensor:
    heads = case.num_kv_heads * case.group
    return torch.tensor([SINKS[head % len(SINKS)] for head in range(heads)]).to(case.dtype)


def with_sinks(batch, kept, sinks):
    """What `plain_attention` gives, less the part of the sinks, both rounded as the model does."""
    exact, _ = reference(batch, None)
    ours, _ = reference(batch, None, sinks=sinks)
    part = (ours * exact).sum(-1, keepdim=True) / exact.square().sum(-1, keepdim=True)
    return plain_attention(batch, kept) * part.to(batch.case.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("prunes", [False, True])
def test_threshold(device, case, prunes):
    batch = make_batch(case)
    sinks, delta = sinks_of(case), choose_delta(batch) if prunes else None
    output, counters = run_decode(batch, device, delta, sinks=sinks.to(device))
    exact, kept = reference(batch, delta, sinks=sinks)
    assert counters == count_kept(batch, kept)
    assert_within_budget(output, exact, with_sinks(batch, kept, sinks))
    without, _ = reference(batch, delta)
    assert (exact - without).abs().max() > 0.05


def test_oracle_is_a_softmax_with_one_more_score():
    case = CASES[0]
    batch = make_batch(case)
    sinks = sinks_of(case)
    exact, _ = reference(batch, None, sinks=sinks)
    key, value = batch.key[:300, 0].double(), batch.value[:300, 0].double()
    scores = batch.query()[0].double() @ key.T * case.scale
    scores = torch.cat([scores, sinks.double()[:, None]], dim=1)
    expected = scores.softmax(-1)[:, :-1] @ value
    assert (exact[0] - expected).abs().max() < 1e-3  # keys are rounded


def test_high_sinks_leave_only_the_newest_block(device):
    case = CASES[0]
    batch = make_batch(case)
    sinks = torch.full((case.group,), 30.0)
    _, ((kept, total, _),) = run_decode(batch, device, torch.tensor([8.0]), sinks=sinks.to(device))
    assert kept == len(case.lengths) < total


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tau", [0.0, 0.05])
def test_share(device, case, tau):
    """A sink is in the denominator: shares are smaller, and fewer blocks are sure."""
    batch = make_batch(case)
    sinks, limits = sinks_of(case), share_limits(case)
    run = run_share(batch, device, limits, tau, sinks=sinks.to(device))
    expected, kept = expected_of(batch, tau, run.dealt, sinks=sinks)
    assert run.counters[:, :3].tolist() == count_kept(batch, kept)
    assert error_of(run.output, expected) < TOLERANCE[case.dtype]
    without, _ = expected_of(batch, tau, run.dealt)
    assert error_of(run.output, without) > 10 * TOLERANCE[case.dtype]


def test_share_reads_less_beside_high_sinks(device):
    case = CASES[0]
    batch = make_batch(case)
    sinks = torch.full((case.group,), 30.0)
    high, low = (
        run_share(batch, device, share_limits(case), 0.05, sinks=given.to(device)).counters[0, 0]
        for given in (sinks, -sinks)
    )
    assert high < low
