"""Pruned decode attention against the float64 oracle, over shapes and layouts."""

import dataclasses
import math

import pytest
import torch
from cases import Case, count_kept, make_batch, probe_kept, run_decode
from truth import (
    assert_kept,
    assert_within_budget,
    block_excess,
    choose_delta,
    plain_attention,
    reference,
)

from vllm_ffa_fp8fp8.kernels import DecodePlan
from vllm_ffa_fp8fp8.kernels.decode.tuning import DEFAULT

HALF, BFLOAT = torch.float16, torch.bfloat16


def check(batch, device: str, delta, **options) -> tuple[torch.Tensor, list[list[int]]]:
    """Output and counters against the oracle; returns them."""
    output, counters = run_decode(batch, device, delta, **options)
    min_context = options.get("min_context", 0)
    exact, kept = reference(batch, delta, min_context=min_context)
    assert counters == count_kept(batch, kept, min_context)
    assert_within_budget(output, exact, plain_attention(batch, kept))
    return output, counters


def longer(case: Case, device: str) -> Case:
    """The case with long requests where they are quick."""
    if device == "cpu":
        return case
    return dataclasses.replace(case, lengths=(*case.lengths, 4097, 1777))


@pytest.mark.parametrize(
    "head_size, group, num_kv_heads, dtype, page_size, block_size, lengths",
    [
        (64, 4, 2, BFLOAT, 64, 64, (300, 1, 63)),
        pytest.param(64, 16, 1, BFLOAT, 128, 32, (129, 300), marks=pytest.mark.slow),
        (80, 3, 2, BFLOAT, 48, 16, (49, 130)),
        (80, 16, 1, HALF, 64, 128, (65, 500)),
        (96, 7, 1, HALF, 32, 64, (33, 300)),
        (128, 8, 1, BFLOAT, 128, 128, (129, 700)),
        pytest.param(128, 4, 2, BFLOAT, 64, 16, (63, 150), marks=pytest.mark.slow),
        pytest.param(256, 1, 1, HALF, 16, 32, (17, 200), marks=pytest.mark.slow),
        (256, 3, 1, BFLOAT, 80, 64, (111, 300)),
    ],
)
def test_shapes(device, head_size, group, num_kv_heads, dtype, page_size, block_size, lengths):
    case = Case(lengths, head_size, group, num_kv_heads, dtype, page_size, block_size)
    batch = make_batch(longer(case, device))
    delta = choose_delta(batch)
    output, counters = check(batch, device, delta)
    assert all(0 < kept < total and short == 0 for kept, total, short in counters)
    assert_kept(batch, probe_kept(batch, device, delta), delta)
    dense, everything = reference(batch, None)
    with pytest.raises(AssertionError):
        assert_within_budget(output, dense, plain_attention(batch, everything))


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
def test_strides_of_the_cache(device, interleaved):
    batch = make_batch(longer(Case((130, 1), interleaved=interleaved, block_size=16), device))
    check(batch, device, choose_delta(batch))


@pytest.mark.parametrize("fp8_key, dtype", [(True, BFLOAT), (False, BFLOAT), (False, HALF)])
def test_pages_without_the_residual(device, fp8_key, dtype):
    """And those of GPUs without FP8, whose keys are 16-bit."""
    case = Case((150, 17), dtype=dtype, fp8_key=fp8_key, residual=False, block_size=16)
    batch = make_batch(longer(case, device))
    check(batch, device, choose_delta(batch))


@pytest.mark.parametrize("query_len, block_size", [(1, 16), (2, 64)])
def test_fp8_values(device, query_len, block_size):
    """The oracle reads the same cache: only the kernel's own error counts."""
    case = Case((150, 67), fp8_value=True, block_size=block_size, query_len=query_len)
    batch = make_batch(longer(case, device))
    output, _ = check(batch, device, choose_delta(batch))
    check(batch, device, None)
    exact, kept = reference(make_batch(dataclasses.replace(batch.case, fp8_value=False)), None)
    with pytest.raises(AssertionError):  # values are not what they were rounded from
        assert_within_budget(output, exact, plain_attention(batch, kept))


@pytest.mark.slow
@pytest.mark.parametrize("magnitude", [1e-3, 3.0, 1e4])
def test_magnitudes_of_keys(device, magnitude):
    case = Case((200,), num_kv_heads=1, key_scale=magnitude, block_size=16)
    batch = make_batch(longer(case, device))
    batch.qkv *= 1 / magnitude
    check(batch, device, choose_delta(batch))


@pytest.mark.slow
@pytest.mark.parametrize("num_reqs", [1, 5, 17])
def test_padded_rows(device, num_reqs):
    """Rows of length 0, in the middle and at the end, become 0; the others do not notice."""
    lengths = tuple(0 if row % 3 == 1 or row > 15 else 40 + row for row in range(num_reqs))
    case = Case(lengths, group=1, num_kv_heads=1, block_size=16)
    batch = make_batch(case)
    delta = choose_delta(batch)
    output, _ = check(batch, device, delta)
    padded = batch.seq_lens == 0
    assert (output[padded] == 0).all()
    alone = dataclasses.replace(
        batch,
        case=dataclasses.replace(case, lengths=tuple(n for n in lengths if n)),
        qkv=batch.qkv[~padded],
        block_table=batch.block_table[~padded],
        seq_lens=batch.seq_lens[~padded],
    )
    same, _ = run_decode(alone, device, delta[~padded], case.limits())
    assert (same.double() - output[~padded].double()).abs().max() < 0.02


def test_all_rows_padded(device):
    batch = make_batch(Case((0, 0), block_size=16))
    assert (run_decode(batch, device, torch.tensor([3.0]))[0] == 0).all()


@pytest.mark.slow
def test_unpruned(device):
    batch = make_batch(Case((130, 1, 63), block_size=16, num_kv_heads=1))
    for delta in (None, torch.tensor([math.inf])):
        check(batch, device, delta)


@pytest.mark.slow
def test_one_delta_or_one_a_request(device):
    batch = make_batch(Case((100, 150, 125), block_size=16, num_kv_heads=1))
    one = choose_delta(batch, per_request=False)
    check(batch, device, one)
    check(batch, device, one.repeat(3))
    mixed = choose_delta(batch)
    mixed[1] = math.inf
    check(batch, device, mixed)
    kept = probe_kept(batch, device, mixed)
    assert [bool(k.all()) for k in kept] == [False, True, False]


@pytest.mark.parametrize("precomputed", [False, True])
def test_min_context(device, precomputed):
    """Requests below it run unpruned, and one of just that length is pruned."""
    batch = make_batch(Case((100, 150, 149), block_size=16, num_kv_heads=1))
    delta = choose_delta(batch)
    options = {"min_context": 150, "precomputed_threshold": precomputed}
    _, ((kept, total, short),) = check(batch, device, delta, **options)
    assert 0 < kept < total == 10 and short == 7 + 10
    _, counters = check(batch, device, None, min_context=150)
    assert counters == [[10, 10, 17]]
    kept = probe_kept(batch, device, delta, **options)
    assert [bool(k.all()) for k in kept] == [True, False, True]


@pytest.mark.parametrize("query_len", [1, 3])
def test_threshold_of_its_own_kernel(device, query_len):
    batch = make_batch(Case((100, 0, 150), block_size=16, query_len=query_len))
    check(batch, device, choose_delta(batch), precomputed_threshold=True)


def test_given_threshold(device):
    """Used as it is, by request and head."""
    batch = make_batch(Case((100, 0, 150), block_size=16))
    threshold = torch.full((3, 8), 1e30)
    threshold[0] = -1e30
    threshold[2, 5] = -1e30  # one head of the second group
    kept = probe_kept(
        batch, device, torch.tensor([0.0]), precomputed_threshold=threshold.to(device)
    )
    assert kept[0].all() and kept[2][1].all()
    assert kept[2][0].nonzero().flatten().tolist() == [9]


@pytest.mark.slow
@pytest.mark.parametrize(
    "query_len, tuning",
    [
        (1, {"score_bytes": 0}),
        (3, {"score_bytes": 0}),
        (1, {"chunk_blocks": 2, "scan_tokens": 16}),
        (1, {"min_blocks": 1, "waves": 30, "item_tokens": 16, "scan_tokens": 16}),
        (1, {"waves": 1, "scan_tokens": 256}),
    ],
)
def test_tuning(device, query_len, tuning):
    """However decode is cut: chunks of one tile of the scan, items of one block, one wave."""
    case = Case((150, 100, 120), block_size=16, query_len=query_len)
    batch = make_batch(case)
    delta = choose_delta(batch)
    delta[2] = math.inf
    limits = dataclasses.replace(case.limits(1), tuning=dataclasses.replace(DEFAULT, **tuning))
    check(batch, device, delta, limits=limits)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_blocks", [1, 2, 4])
def test_items_of_many_chunks(device, chunk_blocks):
    """An item goes on with the same softmax, and with places of the block table, chunk by chunk."""
    case = Case((230, 97), num_kv_heads=1, page_size=32, block_size=16)
    tuning = dataclasses.replace(
        DEFAULT, chunk_blocks=chunk_blocks, scan_tokens=16, min_blocks=100, waves=1
    )
    limits = dataclasses.replace(case.limits(1), tuning=tuning)
    assert limits.chunk_blocks(2) == chunk_blocks
    batch = make_batch(case)
    plan = DecodePlan.allocate(limits, torch.device(device)).update(batch.seq_lens.to(device))
    assert plan.work[:2, 2].tolist() == [1, 1]  # an item a request
    check(batch, device, choose_delta(batch), limits=limits)
    check(batch, device, None, limits=limits)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 48])
def test_chunks_of_many_blocks(device, page_size):
    """More blocks than one word has bits, and than one tensor of places holds."""
    # heads of 128: fewer probes for so many blocks
    case = Case((2300,), 128, num_kv_heads=1, page_size=page_size, block_size=16)
    tuning = dataclasses.replace(DEFAULT, min_blocks=200)
    limits = dataclasses.replace(case.limits(1), tuning=tuning)
    assert limits.chunk_blocks(1) == 128
    batch = make_batch(case)
    plan = DecodePlan.allocate(limits, torch.device(device)).update(batch.seq_lens.to(device))
    assert plan.work[0, 2] == 1
    delta = choose_delta(batch)
    check(batch, device, delta, limits=limits)
    kept = probe_kept(batch, device, delta, limits=limits)
    assert_kept(batch, kept, delta)
    assert all(part.any() and not part.all() for part in kept[0][0].split(32))


@pytest.mark.slow
def test_decisions_of_a_plain_delta(device):
    """A delta that was not picked for its gaps: decisions differ within rounding only."""
    batch = make_batch(longer(Case((300, 400), block_size=16, num_kv_heads=1), device))
    middle = torch.cat([e.flatten() for e in block_excess(batch)]).median()
    delta = -middle.float().reshape(1)  # one block lies on the threshold
    assert_kept(batch, probe_kept(batch, device, delta), delta)


@pytest.mark.slow
def test_runs_are_bit_equal(device):
    batch = make_batch(longer(Case((150, 100), block_size=16), device))
    delta = choose_delta(batch)
    outputs = [run_decode(batch, device, delta)[0] for _ in range(2)]
    assert torch.equal(*outputs)


@pytest.mark.slow
@pytest.mark.parametrize("query_len", [1, 3])
def test_batch_invariant(device, query_len):
    """A request gives the same bits alone, and among others in any order."""
    lengths = (40, 1040, 200) if device == "cpu" else (90, 20_000, 70_000, 5000, 8)
    case = Case(lengths, group=2, num_kv_heads=1, block_size=16, query_len=query_len)
    batch = make_batch(case)
    delta = choose_delta(batch)
    limits = dataclasses.replace(case.limits(132 if device == "cuda" else 2), batch_invariant=True)
    together, _ = check(batch, device, delta, limits=limits)
    together = together.unflatten(0, (-1, query_len))
    for requests in ([1], [2, 1, 1]):
        rows, picked = batch.qkv.unflatten(0, (-1, query_len)), torch.tensor(requests)
        other = dataclasses.replace(
            batch,
            case=dataclasses.replace(case, lengths=tuple(lengths[i] for i in requests)),
            qkv=rows[picked].flatten(0, 1),
            block_table=batch.block_table[picked],
            seq_lens=batch.seq_lens[picked],
        )
        output, _ = run_decode(other, device, delta[picked], limits=limits)
        assert torch.equal(output.unflatten(0, (-1, query_len)), together[picked])
