"""Decode by share whose scan reads 4-bit codes, beside the oracle of the same formula."""

import dataclasses

import pytest
import torch
from cases import Case, make_batch, poisoned_scratch
from share_cases import TOLERANCE, error_of, expected_of, run_share, share_limits

from vllm_ffa_fp8fp8.kernels import DecodePlan, decode_attention
from vllm_ffa_fp8fp8.kernels.code_reference import encode_keys_reference
from vllm_ffa_fp8fp8.kernels.counters import new_counters

HALF = torch.float16
TAU = 0.05
CASE = Case((700, 1, 300, 0, 66, 129), block_size=16, dtype=HALF, key_code=True)


def check(batch, device: str, tau=TAU, limits=None, **options):
    """The kernel's output and counts are the oracle's."""
    limits = limits or share_limits(batch.case)
    run = run_share(batch, device, limits, tau, **options)
    counters = new_counters(batch.case.num_kv_heads, "cpu")
    expected, _ = expected_of(
        batch, tau, run.dealt, code_lag=limits.code_lag, counters=counters, **options
    )
    assert run.counters[:, :4].equal(counters[:, :4])
    assert error_of(run.output, expected) < TOLERANCE[batch.case.dtype]
    return run


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_size": 128, "group": 7, "num_kv_heads": 1, "page_size": 128, "block_size": 64},
        {"head_size": 80, "group": 3, "interleaved": True},
        {"head_size": 96, "block_size": 32, "fp8_value": True},
        {"head_size": 256, "num_kv_heads": 1, "group": 8, "lengths": (400,)},
        {"fp8_key": False, "residual": False},
        {"residual": False, "group": 1},
    ],
)
def test_shapes(device, change):
    tau = 0.3 if change.get("block_size") == 64 else TAU
    run = check(make_batch(dataclasses.replace(CASE, **change)), device, tau)
    assert (run.counters[:, 0] < run.counters[:, 1]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
def test_several_query_tokens(device, dtype):
    case = dataclasses.replace(CASE, lengths=(700, 5, 130, 67), query_len=3, dtype=dtype, group=2)
    check(make_batch(case), device)


def test_offset_keys(device):
    """Channels whose offset is many times their spread, as Qwen2's keys have: the base's product
    is off there, the codes' is not."""
    case = dataclasses.replace(CASE, lengths=(1030,), group=2, num_kv_heads=1)
    batch = make_batch(case)
    batch.key[..., ::9] += 60.0
    batch.write()
    check(batch, device)


def test_the_bits_of_a_run_are_those_of_the_next(device):
    batch = make_batch(dataclasses.replace(CASE, lengths=(1030, 300)))
    for changes in ({}, {"batch_invariant": True}):
        limits = share_limits(batch.case, num_processors=3, **changes)
        runs = [check(batch, device, limits=limits, layer=2) for _ in range(2)]
        assert runs[0].output.equal(runs[1].output)


def test_soft_cap_and_sinks(device):
    batch = make_batch(dataclasses.replace(CASE, lengths=(700,), group=2))
    sinks = torch.linspace(-2, 3, 4, dtype=HALF)
    run = run_share(
        batch, device, share_limits(batch.case), TAU, sinks=sinks.to(device), logits_soft_cap=3.0
    )
    expected, _ = expected_of(batch, TAU, run.dealt, sinks=sinks, logits_soft_cap=3.0)
    assert error_of(run.output, expected) < TOLERANCE[HALF]


def test_short_requests_and_those_of_tau_zero_read_all(device):
    batch = make_batch(dataclasses.replace(CASE, lengths=(700, 300)))
    run = run_share(
        batch, device, share_limits(batch.case), torch.tensor([0.0, TAU]), min_context=400
    )
    assert (run.counters[:, 0] == run.counters[0, 1]).all() and (run.counters[:, 2] == 19).all()


def stale(batch, run: int):
    """The batch with codes of a run's keys that stood there before."""
    planes = batch.planes()
    page = int(batch.block_table[0, run])
    planes.key_code[page] = planes.key_code[page].flip(1)
    planes.code_range[page] = planes.code_range[page].flip(2)
    return batch


def test_codes_of_other_keys_are_seen(device):
    """That the scan reads them, and no others: the draw is another one with the codes of a run
    changed, and the same with those of the newest run."""
    batch = make_batch(dataclasses.replace(CASE, lengths=(700,)))
    limits = share_limits(batch.case)
    right = run_share(batch, device, limits, TAU)
    expected, _ = expected_of(batch, TAU, right.dealt)
    wrong, _ = expected_of(stale(batch, 3), TAU, right.dealt)
    assert error_of(right.output, wrong) > 2 * TOLERANCE[HALF]
    assert not run_share(batch, device, limits, TAU).counters[:, :4].equal(right.counters[:, :4])
    fresh = make_batch(dataclasses.replace(CASE, lengths=(700,)))
    assert (
        error_of(run_share(stale(fresh, 10), device, limits, TAU).output, expected)
        < TOLERANCE[HALF]
    )


@pytest.mark.parametrize("query_len", [1, 3])
def test_steps_write_what_the_next_ones_read(device, query_len):
    """Token by token over the ends of runs, from codes as a prefill leaves them: a run's codes come
    in the step that makes its last token certain, and in no launch of their own; until the scan
    reads them they are poison, or drafts that were rejected."""
    first, last = 64 * 5 - 2, 64 * 6 + query_len + 1
    case = dataclasses.replace(CASE, lengths=(last,), query_len=query_len, group=2, num_kv_heads=1)
    batch = make_batch(case)
    planes, encoded = batch.planes(device), batch.planes()
    for poisoned in (planes, encoded):
        poisoned.key_code.fill_(-1)
        poisoned.code_range.fill_(float("nan"))
    row = batch.block_table[0]
    limits = share_limits(case)
    if device == "cpu":
        encode_keys_reference(planes, row, 0, first - query_len)
    else:
        encode_keys_reference(encoded, row, 0, first - query_len)
        for name in ("key_code", "code_range"):
            getattr(planes, name).copy_(getattr(encoded, name))
    written = []
    steps = [*range(first, 64 * 5 + query_len + 2), *range(64 * 6 - 1, last + 1)]
    for length in steps:  # between, no run ends
        step = dataclasses.replace(batch, case=dataclasses.replace(case, lengths=(length,)))
        seq_lens = torch.tensor([length], dtype=torch.int32, device=device)
        plan = DecodePlan.allocate(limits, torch.device(device)).update(seq_lens)
        query = step.query(device)
        output = torch.empty(query.shape, dtype=query.dtype if device == "cuda" else torch.float32)
        decode_attention(
            query, planes, batch.block_table.to(device), seq_lens, plan,
            poisoned_scratch(limits, device), output.to(device), scale=case.scale,
            tau=torch.tensor([TAU], device=device),
        )  # fmt: skip
        certain = length - query_len + 1
        runs = torch.stack([planes.code_range[int(page), :, 0].cpu() for page in row[: last // 64]])
        written.append((certain, int((~runs.isnan()).flatten(1).all(1).sum())))
    for certain, num_runs in written:
        assert num_runs == max(certain, (first - query_len) // 64 * 64) // 64
    expected = batch.planes()
    encode_keys_reference(expected, row, 0, written[-1][0] // 64 * 64)
    for page in row[: written[-1][0] // 64].tolist():
        same = planes.key_code[page].cpu() == expected.key_code[page]
        assert same.all() if device == "cpu" else same.float().mean() > 0.999
