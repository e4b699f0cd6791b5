"""The oracles themselves, against torch's attention and numbers worked out by hand."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from cases import Case, make_batch
from truth import assert_kept, choose_delta, reference

from vllm_ffa_fp8fp8.kernels.cache_reference import (
    gather_kv_reference,
    join_key_reference,
    join_value_reference,
    round_value_reference,
    split_key_reference,
)
from vllm_ffa_fp8fp8.kernels.counters import new_counters
from vllm_ffa_fp8fp8.kernels.reference import prefill_attention_reference


def test_split_by_hand():
    """300 = 1.171875 * 2^8: scaled to 150, base 144 and residual (6 * 32); 1.0 = 0.5 * 2."""
    base, residual, exponent = split_key_reference(torch.tensor([[300.0, 1.0, 0.0, -2.125]]))
    assert base.float().tolist() == [[144.0, 0.5, 0.0, -1.0]]
    assert residual.float().tolist() == [[192.0, 0.0, 0.0, -2.0]]
    assert exponent.tolist() == [[128]]
    joined = join_key_reference(base, residual, exponent)
    assert joined.tolist() == [[300.0, 1.0, 0.0, -2.125]]


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1.0, 448.0, 1e4, 1e37])
def test_split_and_join(magnitude):
    generator = torch.Generator().manual_seed(0)
    key = (magnitude * torch.randn(50, 64, generator=generator)).to(torch.bfloat16).float()
    joined = join_key_reference(*split_key_reference(key))
    largest = key.abs().amax(-1, keepdim=True)
    small = key.abs() < 2**-14 * largest
    assert ((joined - key).abs() <= small * 2**-22 * largest).all()


def test_round_value_by_hand():
    """300 is scaled to 150, which lies between 144 and 160; 2.125 to 1.0625, a tie."""
    value, exponent = round_value_reference(torch.tensor([[300.0, 1.0, 0.0, -2.125]]))
    assert value.float().tolist() == [[144.0, 0.5, 0.0, -1.0]] and exponent.tolist() == [[128]]
    assert join_value_reference(value, exponent).tolist() == [[288.0, 1.0, 0.0, -2.0]]


def test_unpruned_attention_is_torchs():
    """Keys of bfloat16 survive the cache, so torch's attention on the written ones agrees."""
    case = Case((130, 1, 300, 0), num_kv_heads=2, group=3)
    batch = make_batch(case)
    output, kept = reference(batch, None)
    first = 0
    for request, length in enumerate(case.lengths):
        assert kept[request].all()
        if length == 0:
            assert (output[request] == 0).all()
            continue
        tokens = slice(first, first + length)
        expected = F.scaled_dot_product_attention(
            batch.query()[request, :, None].double(),
            batch.key[tokens].transpose(0, 1).double(),
            batch.value[tokens].transpose(0, 1).double(),
            enable_gqa=True,
        )
        assert torch.allclose(output[request], expected[:, 0], atol=1e-5)
        first += length


@pytest.mark.parametrize("pruned", [False, True])
def test_fp8_values_change_the_output_by_three_percent(pruned):
    """Same blocks; the output is off by the rounding of E4M3, which averaging does not lessen."""
    case = Case((300, 1000), head_size=128, block_size=16)
    batch, narrow = make_batch(case), make_batch(dataclasses.replace(case, fp8_value=True))
    delta = choose_delta(batch) if pruned else None
    (output, kept), (changed, kept_of_narrow) = reference(batch, delta), reference(narrow, delta)
    assert all(map(torch.equal, kept, kept_of_narrow))
    error = (changed - output).flatten(1).norm(dim=1) / output.flatten(1).norm(dim=1)
    assert (error > 0.015).all() and (error < 0.035).all()


@pytest.mark.parametrize("block_size, page_size", [(16, 64), (64, 48), (128, 16)])
def test_pruned_attention(block_size, page_size):
    """Decisions follow the margins, and the output is attention to the kept tokens alone."""
    case = Case((200, 500), num_kv_heads=1, page_size=page_size, block_size=block_size)
    batch = make_batch(case)
    delta = choose_delta(batch)
    output, kept = reference(batch, delta)
    assert_kept(batch, kept, delta)
    assert not kept[1].all()
    tokens = kept[1][0].repeat_interleave(block_size)[:500]
    scores = batch.query()[1].double() @ batch.key[200:][tokens, 0].double().T * case.scale
    expected = scores.softmax(-1) @ batch.value[200:][tokens, 0].double()
    assert torch.allclose(output[1], expected, atol=1e-5)


def test_query_tokens_see_what_comes_before_them():
    """Several query tokens give what each gives as the newest one of a shorter request."""
    case = Case((130, 5, 64, 67), num_kv_heads=2, group=3, query_len=5, block_size=16)
    batch = make_batch(case)
    output, _ = reference(batch, None)
    tokens = output.unflatten(0, (-1, case.query_len))
    for token in range(case.query_len):
        alone = dataclasses.replace(
            batch,
            qkv=batch.qkv[token :: case.query_len],
            seq_lens=batch.seq_lens - (case.query_len - 1 - token),
        )
        assert torch.allclose(reference(alone, None)[0], tokens[:, token], atol=1e-12)


@pytest.mark.parametrize("query_len", [2, 8])
def test_query_tokens_keep_blocks_together(query_len):
    """Each row has a threshold of its own; the blocks of the query tokens are always kept."""
    lengths = (300, 200, 161, query_len)  # 161: the query tokens lie in two blocks
    batch = make_batch(Case(lengths, query_len=query_len, block_size=16))
    delta = choose_delta(batch)
    output, kept = reference(batch, delta)
    assert_kept(batch, kept, delta)
    assert not any(k.all() for k in kept[:3])
    assert kept[2][:, -2:].all()
    thresholds = torch.stack(thresholds_of_rows(batch)) - delta[:, None, None]
    given = reference(batch, delta, precomputed_threshold=thresholds.flatten(0, 1))
    assert torch.equal(given[0], output) and all(map(torch.equal, given[1], kept))


def thresholds_of_rows(batch) -> list[torch.Tensor]:
    """By request the best score of its anchors that each row sees, `[query_len, num_heads]`."""
    case, best = batch.case, []
    planes = batch.planes()._replace(key_residual=None)
    for request, length in enumerate(case.lengths):
        table = batch.block_table[request]
        key, _ = gather_kv_reference(planes, table, length, torch.float64)
        tokens, rows = torch.arange(length), []
        for token in range(case.query_len):
            query = batch.query()[request * case.query_len + token].double()
            scores = torch.einsum("hd,thd->ht", query, key.repeat_interleave(case.group, dim=1))
            scores *= case.scale * math.log2(math.e)
            seen = tokens <= length - case.query_len + token
            anchors = seen & ((tokens < 16) | (tokens >= length - 16))
            rows.append(scores[:, anchors].amax(1))
        best.append(torch.stack(rows))
    return best


def test_counters():
    batch = make_batch(Case((200, 500), block_size=16))
    counters, of_short = new_counters(2, "cpu"), new_counters(2, "cpu")
    _, (short, long) = reference(batch, choose_delta(batch), counters=counters)
    kept = [int(short[head].sum() + long[head].sum()) for head in range(2)]
    assert counters[:, :3].tolist() == [[kept[0], 13 + 32, 0], [kept[1], 13 + 32, 0]]
    assert counters[:, 3:].tolist() == [[0, 0, 0, 2]] * 2
    reference(batch, choose_delta(batch), counters=of_short, min_context=201)
    assert of_short[:, :3].tolist() == [[int(long[head].sum()), 32, 13] for head in range(2)]


def test_min_context_and_infinity_keep_everything():
    batch = make_batch(Case((200, 500), block_size=16))
    delta = choose_delta(batch)
    assert not any(k.all() for k in reference(batch, delta)[1])
    assert [bool(k.all()) for k in reference(batch, delta, min_context=201)[1]] == [True, False]
    delta[1] = math.inf
    assert [bool(k.all()) for k in reference(batch, delta)[1]] == [False, True]


@pytest.mark.parametrize("query_len, seq_len", [(1, 1), (7, 7), (1, 9), (5, 9)])
def test_prefill(query_len, seq_len):
    """The last `query_len` tokens attend to those up to themselves."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(query_len, 6, 16, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, seq_len, 2, 16, generator=generator, dtype=torch.float64)
    output = prefill_attention_reference(query, key, value, 0.3)
    assert output.shape == query.shape
    for row in range(query_len):
        end = seq_len - query_len + row + 1
        for head in range(6):
            weights = (key[:end, head // 3] @ query[row, head] * 0.3).softmax(0)
            expected = weights @ value[:end, head // 3]
            assert torch.allclose(output[row, head], expected)
