"""Decode with several query tokens a request, as speculative decoding asks for it."""

import dataclasses

import pytest
import torch
from cases import Case, count_kept, make_batch, probe_kept, run_decode
from truth import assert_kept, assert_within_budget, choose_delta, plain_attention, reference

HALF, BFLOAT = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "query_len, group, num_kv_heads, dtype, page_size, block_size, lengths",
    [
        # 129: the query tokens lie in two blocks
        pytest.param(2, 1, 2, BFLOAT, 64, 16, (129, 2, 64), marks=pytest.mark.slow),
        (2, 16, 1, HALF, 48, 32, (2, 161)),
        (3, 7, 1, BFLOAT, 64, 16, (130, 3)),
        (3, 4, 1, HALF, 16, 32, (163, 66)),
        pytest.param(8, 4, 1, BFLOAT, 32, 16, (8, 165, 150), marks=pytest.mark.slow),
        pytest.param(4, 16, 1, BFLOAT, 64, 64, (195, 9), marks=pytest.mark.slow),
        (8, 1, 1, HALF, 16, 16, (23, 132)),
    ],
)
def test_query_tokens(
    device, query_len, group, num_kv_heads, dtype, page_size, block_size, lengths
):
    lengths += (4097, 1777) if device == "cuda" else ()
    shape = (group, num_kv_heads, dtype, page_size, block_size)
    batch = make_batch(Case(lengths, 64, *shape, query_len=query_len))
    delta = choose_delta(batch)
    output, counters = run_decode(batch, device, delta)
    exact, kept = reference(batch, delta)
    assert counters == count_kept(batch, kept)
    assert any(kept < total for kept, total, _ in counters)
    assert_within_budget(output, exact, plain_attention(batch, kept))
    assert_kept(batch, probe_kept(batch, device, delta), delta)
    dense, everything = reference(batch, None)
    plain = plain_attention(batch, everything)
    output, _ = run_decode(batch, device, None)
    assert_within_budget(output, dense, plain)
    for wrong in wrongly_causal(batch, dense):
        with pytest.raises(AssertionError):
            assert_within_budget(wrong, dense, plain)


def wrongly_causal(batch, dense: torch.Tensor) -> list[torch.Tensor]:
    """Oracles in which a token sees the one after it, one token less than it should, or all."""
    query_len, num_reqs = batch.case.query_len, len(batch.seq_lens)
    tokens = torch.arange(query_len).repeat(num_reqs)
    alone = dataclasses.replace(
        batch,
        case=dataclasses.replace(batch.case, query_len=1),
        block_table=batch.block_table.repeat_interleave(query_len, dim=0),
    )
    ends = batch.seq_lens.repeat_interleave(query_len)
    seen = ends - (query_len - 1 - tokens)
    assert torch.allclose(
        reference(dataclasses.replace(alone, seq_lens=seen), None)[0], dense, atol=1e-12
    )
    wrong = ((seen + 1).minimum(ends), seen - 1, ends)
    return [reference(dataclasses.replace(alone, seq_lens=n), None)[0] for n in wrong]


@pytest.mark.slow
def test_fewer_query_tokens_than_the_limits_allow(device):
    """Steps without drafts run on the same plan and scratch."""
    case = Case((100, 150), block_size=16)
    batch = make_batch(case)
    delta = choose_delta(batch)
    limits = dataclasses.replace(case.limits(), query_len=5)
    output, _ = run_decode(batch, device, delta, limits=limits)
    exact, kept = reference(batch, delta)
    assert_within_budget(output, exact, plain_attention(batch, kept))


def test_padded_rows(device):
    case = Case((40, 0, 0, 67, 0), group=3, num_kv_heads=1, block_size=16, query_len=5)
    batch = make_batch(case)
    delta = choose_delta(batch)
    output, _ = run_decode(batch, device, delta)
    exact, kept = reference(batch, delta)
    assert_within_budget(output, exact, plain_attention(batch, kept))
    padded = (batch.seq_lens == 0).repeat_interleave(5)
    assert (output[padded] == 0).all() and (output[~padded] != 0).all()


def test_a_given_threshold_of_every_row(device):
    """One row of a later token alone asks for the blocks of its KV head."""
    batch = make_batch(Case((100, 150), block_size=16, query_len=2))
    threshold = torch.full((4, 8), 1e30)
    threshold[3, 5] = -1e30
    kept = probe_kept(
        batch, device, torch.tensor([0.0]), precomputed_threshold=threshold.to(device)
    )
    assert [head.nonzero().flatten().tolist() for head in (*kept[0], kept[1][0])] == [
        [6], [6], [9],
    ]  # fmt: skip
    assert kept[1][1].all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_the_budget_rejects_wrong_outputs(dtype):
    """Without a kernel: each wrong output comes from the oracle itself."""
    case = Case((400, 400), dtype=dtype, block_size=16, key_scale=2.0, query_len=2)
    batch = make_batch(case)
    delta = choose_delta(batch)
    exact, kept = reference(batch, delta)
    plain = plain_attention(batch, kept)
    assert_within_budget(exact.to(dtype), exact, plain)
    other_page = batch.block_table.clone()
    other_page[:, 6] = other_page[:, 0]
    planes = batch.planes()
    without_residual = planes._replace(key_residual=None)
    other_scale = planes._replace(residual_scale=16.0)
    wrong = {
        "zeros": torch.zeros_like(exact),
        "not a number": exact * float("nan"),
        "residual left out": reference(batch, delta, without_residual)[0],
        "residual at the wrong scale": reference(batch, delta, other_scale)[0],
        "threshold ignored": reference(batch, None)[0],
        "wrong last page": reference(batch, delta, table=other_page)[0],
        "pages of another request": reference(batch, delta, table=batch.block_table.flip(0))[0],
        "query tokens swapped": exact.unflatten(0, (2, 2)).flip(1).flatten(0, 1),
    }
    for name, output in wrong.items():
        with pytest.raises(AssertionError):
            assert_within_budget(output, exact, plain)
            pytest.fail(f"{name} is within the budget", pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize(
    "query_lens, group, dtype, block_size, lengths",
    [
        ((5, 1, 3, 0), 4, BFLOAT, 16, (130, 197, 66, 0)),
        ((1, 2, 0, 1), 7, BFLOAT, 32, (1, 161, 0, 64)),  # the first has one token in all
        ((2, 4, 1), 8, HALF, 64, (129, 4, 300)),
    ],
)
def test_uneven_query_tokens(device, query_lens, group, dtype, block_size, lengths, threshold):
    """Each request its own number, as if each were alone: later tokens of others are no rows."""
    most = max(query_lens)
    lengths = tuple(max(length, most) if length else 0 for length in lengths)
    lengths += (4097, 1777) if device == "cuda" else ()
    query_lens += (1, most) if device == "cuda" else ()
    full = make_batch(Case(lengths, 64, group, 2, dtype, 64, block_size, query_len=most))
    picked = [
        request * most + most - length + token
        for request, length in enumerate(query_lens)
        for token in range(length)
    ]
    batch = dataclasses.replace(full, qkv=full.qkv[picked])
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    delta = choose_delta(full)
    exact, kept = reference(batch, delta, query_start_loc=starts)
    uneven = {"query_start_loc": starts.to(device), "query_len": most}
    output, counters = run_decode(batch, device, delta, precomputed_threshold=threshold, **uneven)
    assert counters == count_kept(batch, kept)
    assert any(kept < total for kept, total, _ in counters)
    assert_within_budget(output, exact, plain_attention(full, kept)[picked])
    if threshold:  # which dense decode has none of
        return
    dense, everything = reference(full, None)
    exact, _ = reference(batch, None, query_start_loc=starts)
    assert torch.allclose(exact, dense[picked], atol=1e-12)
    output, _ = run_decode(batch, device, None, **uneven)
    assert_within_budget(output, exact, plain_attention(full, everything)[picked])
