"""Rule "share" in batches: however they are cut, drafts, options of requests, CUDA graphs."""

import dataclasses
import math

import pytest
import torch
from cases import Case, make_batch
from share_cases import (
    TOLERANCE,
    choice_of,
    error_of,
    expected_of,
    run_share,
    scores_of,
    share_limits,
)

from vllm_ffa_fp8fp8.kernels import DecodePlan, DecodeScratch, decode_attention
from vllm_ffa_fp8fp8.kernels.counters import new_counters
from vllm_ffa_fp8fp8.kernels.decode import limits as limits_module
from vllm_ffa_fp8fp8.kernels.decode import plan as plan_module
from vllm_ffa_fp8fp8.kernels.share_reference import choose_blocks_reference

HALF = torch.float16
TAU = 0.05
CASE = Case((1030,), group=3, num_kv_heads=1, block_size=16, dtype=HALF)


def check(batch, run, tau, **options) -> None:
    counters = new_counters(batch.case.num_kv_heads, "cpu")
    expected, _ = expected_of(batch, tau, run.dealt, counters=counters, **options)
    assert run.counters[:, :4].equal(counters[:, :4])
    assert error_of(run.output, expected) < TOLERANCE[batch.case.dtype]


@pytest.mark.parametrize(
    "num_processors, chunk_blocks, num_items", [(1, 1, 2), (1, 4, 2), (3, 2, 6), (1, 64, 2)]
)
def test_items_and_chunks(device, num_processors, chunk_blocks, num_items):
    batch = make_batch(CASE)
    limits = share_limits(CASE, chunk_blocks, num_processors)
    runs = [run_share(batch, device, limits, TAU, layer=1) for _ in range(2)]
    dealt = {"span": 64, "num_items": num_items, "chunk_spans": chunk_blocks}
    assert runs[0].dealt == [dealt]
    check(batch, runs[0], TAU, layer=1)
    assert runs[0].output.equal(runs[1].output)


def request_of(batch, request: int):
    """A batch of one of its requests alone."""
    case, first = batch.case, sum(batch.case.lengths[:request])
    length = case.lengths[request]
    rows = slice(request * case.query_len, (request + 1) * case.query_len)
    return dataclasses.replace(
        batch,
        case=dataclasses.replace(case, lengths=(length,)),
        qkv=batch.qkv[rows],
        key=batch.key[first : first + length],
        value=batch.value[first : first + length],
        block_table=batch.block_table[request : request + 1],
        seq_lens=batch.seq_lens[request : request + 1],
    )


def test_batch_invariance(device, monkeypatch):
    """Alone and among others a request is cut alike, and its draws are the same."""
    for module in (limits_module, plan_module):
        monkeypatch.setattr(module, "INVARIANT_BLOCKS", 4)  # items of short requests
    batch = make_batch(dataclasses.replace(CASE, lengths=(300, 700, 90)))
    limits = share_limits(batch.case, batch_invariant=True)
    together = run_share(batch, device, limits, TAU)
    assert [dealt["num_items"] for dealt in together.dealt] == [2, 3, 1]
    alone = run_share(request_of(batch, 1), device, limits, TAU)
    assert alone.output.equal(together.output[1:2])
    assert (alone.counters[:, 3] > 0).all()
    uncut = run_share(request_of(batch, 1), device, share_limits(batch.case), TAU)
    assert not uncut.output.equal(alone.output)


def tokens_alone(batch) -> list:
    """Each query token of the batch's only request as a batch of its own."""
    case = dataclasses.replace(batch.case, query_len=1)
    length, query_len = batch.case.lengths[0], batch.case.query_len
    return [
        dataclasses.replace(
            batch,
            case=dataclasses.replace(case, lengths=(length - query_len + 1 + token,)),
            qkv=batch.qkv[token : token + 1],
            seq_lens=batch.seq_lens - (query_len - 1 - token),
        )
        for token in range(query_len)
    ]


DRAFT = dataclasses.replace(CASE, lengths=(700,), query_len=3)


def test_a_verified_draft_draws_what_its_tokens_draw():
    batch = make_batch(DRAFT)
    drafts, *own = (scores_of(one, residual=False) for one in (batch, *tokens_alone(batch)))
    options = {"block_size": 16, "span": 64, "num_items": 3, "chunk_spans": 2}
    for layer in range(50):
        wanted, *alone = (
            choose_blocks_reference(scores, rows, TAU, layer=layer, **options).weights
            for scores, rows in ((drafts, 3), *((one, 1) for one in own))
        )
        for token, one in enumerate(alone):
            blocks = one.shape[2]  # a block that begins behind the token is of the draft alone
            assert one[:, 0].equal(wanted[:, token, :blocks])


def test_a_draft_gives_what_its_tokens_give(device):
    """By the kernels, which draw otherwise for every token."""
    batch = make_batch(DRAFT)
    limits = share_limits(DRAFT)
    draft = run_share(batch, device, limits, TAU)
    check(batch, draft, TAU)
    outputs = []
    for token, alone in enumerate(tokens_alone(batch)):
        run = run_share(alone, device, limits, TAU)
        assert run.dealt == draft.dealt
        assert error_of(run.output, draft.output[token].double()[None]) < 2e-3
        choice, drafts = (choice_of(one, TAU, run.dealt).weights for one in (alone, batch))
        assert choice[:, 0].equal(drafts[:, token, : choice.shape[2]])
        outputs.append(choice[0, 0] > -math.inf)
    assert not outputs[0].equal(outputs[1][: len(outputs[0])])


def test_what_does_not_fit_the_masses_is_read(device, monkeypatch):
    """The last requests of a batch, in full; those before as ever."""
    batch = make_batch(dataclasses.replace(CASE, lengths=(300, 700, 90)))  # of 5, 11, 2 spans
    limits = share_limits(batch.case)
    monkeypatch.setattr(limits_module, "MASS_BYTES", 8 * limits.span_masses * 4)
    assert limits.mass_spans == 8
    run = run_share(batch, device, limits, TAU)
    check(batch, run, torch.tensor([TAU, 0.0, 0.0]))
    others = -(-700 // 16) + -(-90 // 16)
    assert (run.counters[:, 0] - others < -(-300 // 16)).all()


def test_every_request_its_own_way(device):
    """A tau of each, shorter than `min_context`, padding, and query tokens in uneven numbers."""
    full = make_batch(
        dataclasses.replace(CASE, lengths=(300, 0, 700, 90, 300), num_kv_heads=2, query_len=2)
    )
    rows = [0, 1, 5, 6, 7, 9]  # of all that the requests could have
    starts = torch.tensor([0, 2, 2, 3, 5, 6], dtype=torch.int32)
    batch = dataclasses.replace(full, qkv=full.qkv[rows])
    tau = torch.tensor([0.0, 0.1, 0.1, 0.1, 0.2])
    uneven = {"query_start_loc": starts.to(device), "query_len": 2, "min_context": 100}
    run = run_share(batch, device, share_limits(full.case), tau, **uneven)
    check(batch, run, tau, query_start_loc=starts, min_context=100)
    dense, _ = expected_of(batch, 0.0, run.dealt, query_start_loc=starts)
    exact = [error_of(run.output[row, None], dense[row, None]) < 2e-3 for row in range(6)]
    assert exact == [True, True, False, True, True, False]
    assert (run.counters[:, 2] == 6).all()
    zeros = make_batch(dataclasses.replace(CASE, lengths=(90, 0)))
    output = run_share(zeros, device, share_limits(zeros.case), TAU).output
    assert (output[1] == 0).all() and (output[0] != 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_graph(query_len, batch_invariant):
    """Captured once with its plan; replayed over other lengths, queries and taus in place."""
    case = dataclasses.replace(CASE, lengths=(9000, 700, 3000), query_len=query_len)
    batch = make_batch(case)
    limits = share_limits(case, num_processors=132, batch_invariant=batch_invariant)
    device = torch.device("cuda")
    plan, scratch = DecodePlan.allocate(limits, device), DecodeScratch.allocate(limits, device)
    query, planes = batch.query("cuda").contiguous(), batch.planes("cuda")
    table, seq_lens, tau = batch.block_table.cuda(), batch.seq_lens.cuda(), torch.zeros(1).cuda()
    output, counters = torch.empty_like(query), new_counters(case.num_kv_heads, "cuda")

    def step() -> None:
        decode_attention(
            query, planes, table, seq_lens, plan.update(seq_lens), scratch, output,
            scale=case.scale, tau=tau, layer=2, counters=counters,
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    seen = []
    for lengths, limit in (((9000, 700, 3000), 0.03), ((8999, 0, 64), 0.03), ((4000, 3, 17), 0.2)):
        seq_lens.copy_(torch.tensor(lengths))
        tau.fill_(limit)
        query.copy_(query.roll(1, 0))
        found = []
        for run in (graph.replay, graph.replay, step):
            output.fill_(math.nan)
            counters.zero_()
            run()
            found.append((output.clone(), counters.clone()))
        for one, other in zip(found[0], found[2], strict=True):
            assert one.equal(other)
        assert found[0][0].equal(found[1][0]) and not found[0][0].isnan().any()
        seen.append(found[0])
    assert (seen[0][1][:, 3] > 0).all() and not seen[0][0].equal(seen[1][0])
