"""A soft cap of scores: in what is attended to, in what is skipped, and in what blocks weigh."""

import dataclasses
import math
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from cases import Case, count_kept, make_batch, run_decode
from share_cases import (
    TOLERANCE,
    error_of,
    expected_of,
    planted,
    run_share,
    scores_of,
    share_limits,
)
from truth import assert_within_budget, delta_between, newest_blocks, plain_attention, reference

from vllm_ffa_fp8fp8.kernels import attn_forward_decode_fp8fp8
from vllm_ffa_fp8fp8.kernels.decode.soft_cap import cap_scores, uncapped

SMALL = 1.5  # beside scores of up to 9 or so
CASES = [
    Case((300, 1, 63), head_size=64, group=8, num_kv_heads=1, block_size=16, key_scale=3.0),
    Case((190,), 256, group=1, dtype=torch.float16, block_size=16, query_len=3),
]
OF_CODES = dataclasses.replace(CASES[0], key_code=True)
LOG2_E = math.log2(math.e)
SATURATED = Case((200,), head_size=64, group=2, num_kv_heads=1, block_size=16)


def capped(scores: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(scores / cap)


def middle_delta(batch, cap: float) -> torch.Tensor:
    """Of each request one that keeps half of its blocks and leaves no decision to rounding."""
    case, deltas = batch.case, []
    for request, length in enumerate(case.lengths):
        scores = capped(scores_of(batch, request, residual=False), cap * LOG2_E)
        anchors = torch.cat([scores[..., :16], scores[..., -16:]], dim=-1)
        above = (scores - anchors.amax(-1, keepdim=True)).amax(1)
        excess = torch.stack([b.amax(-1) for b in above.split(case.block_size, dim=-1)], 1)
        deltas.append(delta_between(excess[:, : newest_blocks(case, length).start], 0.5))
    return torch.tensor(deltas)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threshold", ["none", "found", "kernel"])
def test_threshold(device, case, threshold):
    batch = make_batch(case)
    delta = None if threshold == "none" else middle_delta(batch, SMALL)
    options = {"precomputed_threshold": threshold == "kernel", "logits_soft_cap": SMALL}
    output, counters = run_decode(batch, device, delta, **options)
    exact, kept = reference(batch, delta, logits_soft_cap=SMALL)
    assert counters == count_kept(batch, kept)
    assert_within_budget(output, exact, plain_attention(batch, kept, SMALL))
    uncapped_too, kept_without = reference(batch, delta)
    assert (exact - uncapped_too).abs().max() > 0.05
    if delta is not None:
        assert sum(k.sum() for k in kept) > sum(k.sum() for k in kept_without)


def test_oracle_is_a_softmax_of_capped_scores():
    case = CASES[0]
    batch = make_batch(case)
    exact, _ = reference(batch, None, logits_soft_cap=SMALL)
    key, value = batch.key[:300, 0].double(), batch.value[:300, 0].double()
    scores = capped(batch.query()[0].double() @ key.T * case.scale, SMALL)
    assert (exact[0] - scores.softmax(-1) @ value).abs().max() < 1e-3  # keys are rounded


@pytest.mark.parametrize("case, tau", [*product(CASES, [0.0, 0.3]), (OF_CODES, 0.3)], ids=str)
def test_share(device, case, tau):
    """Weights of blocks that are drawn are above the cap."""
    batch, limits = make_batch(case), share_limits(case)
    run = run_share(batch, device, limits, tau, logits_soft_cap=SMALL)
    expected, kept = expected_of(batch, tau, run.dealt, logits_soft_cap=SMALL)
    assert run.counters[:, :3].tolist() == count_kept(batch, kept)
    assert (run.counters[:, 3] > 0).all() == (tau > 0)
    assert error_of(run.output, expected) < TOLERANCE[case.dtype]
    without, _ = expected_of(batch, tau, run.dealt)
    assert error_of(run.output, without) > 10 * TOLERANCE[case.dtype]


@pytest.mark.parametrize("rule", ["threshold", "share"])
def test_sinks_have_no_cap(device, rule):
    case = CASES[0]
    batch = make_batch(case)
    sinks = torch.tensor([2.0, 2.5, 3.0, 6.0] * 2).to(case.dtype)
    given = {"sinks": sinks, "logits_soft_cap": SMALL}
    on_device = given | {"sinks": sinks.to(device)}
    if rule == "threshold":
        delta = torch.tensor([0.5])
        output, counters = run_decode(batch, device, delta, **on_device)
        expected, kept = reference(batch, delta, **given)
    else:
        run = run_share(batch, device, share_limits(case), 0.3, **on_device)
        output, counters = run.output, run.counters[:, :3].tolist()
        expected, kept = expected_of(batch, 0.3, run.dealt, **given)
    assert counters == count_kept(batch, kept)
    assert error_of(output, expected) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("rule", ["threshold", "given", "share"])
@pytest.mark.parametrize("cap, hot", [(5.0, 300.0), (50.0, 500.0)])
def test_scores_far_above_the_cap(device, rule, cap, hot):
    """What running sums are relative to is capped like the scores; a block that overflows beside
    anchors at the lower end of a cap of 50 is read for sure."""
    batch = planted(SATURATED, {100: hot, 101: hot / 20}, others=-300.0)
    options = {"logits_soft_cap": cap}
    if rule == "share":
        run = run_share(batch, device, share_limits(SATURATED), 0.05, **options)
        output, counters = run.output, run.counters[:, :3].tolist()
        expected, kept = expected_of(batch, 0.05, run.dealt, **options)
    else:
        delta = torch.tensor([8.0])
        if rule == "given":
            threshold = torch.full((1, 2), cap * LOG2_E - 1.0)
            options["precomputed_threshold"] = threshold
        expected, kept = reference(batch, delta, **options)
        if rule == "given":
            options["precomputed_threshold"] = threshold.to(device)
        output, counters = run_decode(batch, device, delta, **options)
    assert counters == count_kept(batch, kept)
    assert error_of(output, expected) < TOLERANCE[SATURATED.dtype]


@pytest.mark.parametrize("part, keeps", [(-1.01, "all"), (1.01, "newest")])
def test_thresholds_beyond_the_cap(device, part, keeps):
    batch, cap = make_batch(CASES[0]), SMALL * LOG2_E
    threshold = torch.full((3, 8), part * cap, device=device)
    options = {"precomputed_threshold": threshold, "logits_soft_cap": SMALL}
    _, ((kept, total, _),) = run_decode(batch, device, torch.tensor([3.0]), **options)
    assert kept == (total if keeps == "all" else len(CASES[0].lengths)) and total > 3


def test_no_delta_keeps_the_best_block(device):
    """Where the cap has rounded all differences away."""
    batch = planted(SATURATED, {0: 300.0, 100: 400.0})
    delta, options = torch.tensor([0.0]), {"logits_soft_cap": 2.0}
    _, ((kept, _, _),) = run_decode(batch, device, delta, **options)
    assert kept == 3  # the first, that of token 100, the newest


def test_tensors(device):
    torch.manual_seed(0)
    query, value = torch.randn(2, 1, 4, 64), torch.randn(2, 70, 2, 64).bfloat16()
    key = (3 * torch.randn(2, 70, 2, 64)).to(torch.float8_e4m3fn)
    given = [t.to(device) for t in (query.bfloat16(), key, value)]
    options = {"delta": math.inf, "use_fp8_residual": False}
    output = attn_forward_decode_fp8fp8(*given, logits_soft_cap=SMALL, **options).cpu().double()
    rows = query.bfloat16().double().view(2, 2, 2, 64)
    scores = capped(torch.einsum("bhgd,bthd->bhgt", rows, key.double()) / 8, SMALL)
    expected = torch.einsum("bhgt,bthd->bhgd", scores.softmax(-1), value.double())
    assert error_of(output, expected.flatten(1, 2)) < TOLERANCE[torch.bfloat16]
    for none in (None, 0.0):
        without = attn_forward_decode_fp8fp8(*given, logits_soft_cap=none, **options)
        assert error_of(without.cpu(), expected.flatten(1, 2)) > 0.1
    with pytest.raises(ValueError, match="logits_soft_cap must be finite and >= 0, got -1.0"):
        attn_forward_decode_fp8fp8(*given, logits_soft_cap=-1.0, **options)


@triton.jit
def _cap_kernel(scores_ptr, capped_ptr, back_ptr, soft_cap, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    values = cap_scores(tl.load(scores_ptr + places), soft_cap)
    tl.store(capped_ptr + places, values)
    tl.store(back_ptr + places, uncapped(values, soft_cap))


@pytest.mark.parametrize("cap", [2.0, 72.13])
def test_numbers(device, cap):
    """Exact to what exp2 gives, from scores near 0 to those of no end, and back without a score
    that no longer reaches itself."""
    scores = torch.logspace(-4, 6, 62).tolist() + [0.0, math.inf]
    scores = torch.tensor(scores + [-score for score in scores], device=device)
    values, back = torch.empty_like(scores), torch.empty_like(scores)
    _cap_kernel[(1,)](scores, values, back, cap, SIZE=len(scores))
    expected = capped(scores.cpu().double(), cap)
    error = (values.cpu().double() - expected).abs().nan_to_num(0.0)
    assert error[:-1].max() < 4e-7 * cap
    assert values[-1] == -math.inf  # a token that is not seen
    scores, back = scores.cpu(), back.cpu()
    assert (back[:63] <= scores[:63]).all() and (back[64:-1] <= scores[64:-1]).all()
    near = scores.abs() < cap
    assert (scores - back)[near].max() < 1e-5 * cap
    assert back[-1] == -math.inf
