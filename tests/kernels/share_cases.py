"""Decode by share beside the oracle of its choice: what every block counts, and what every program
makes of its part of a request."""

import dataclasses
import math
from typing import NamedTuple

import torch
from cases import Batch, Case, make_batch, poisoned_scratch

from vllm_ffa_fp8fp8.kernels import DecodeLimits, DecodePlan, decode_attention
from vllm_ffa_fp8fp8.kernels.cache_reference import gather_kv_reference
from vllm_ffa_fp8fp8.kernels.counters import new_counters
from vllm_ffa_fp8fp8.kernels.decode.attention import dealt
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference
from vllm_ffa_fp8fp8.kernels.share_reference import Choice, choose_blocks_reference

TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
"""Of the output, relative 2-norm."""


def share_limits(
    case: Case, chunk_blocks: int | None = None, num_processors: int = 2, **changes
) -> DecodeLimits:
    """`chunk_blocks`: spans of a chunk, instead of those of the tuning."""
    limits = dataclasses.replace(case.limits(num_processors), rule="share", **changes)
    if chunk_blocks is None:
        return limits
    tuning = dataclasses.replace(
        limits.tuning_of(len(case.lengths)), chunk_blocks=chunk_blocks, scan_tokens=16
    )
    return dataclasses.replace(limits, tuning=tuning)


class Run(NamedTuple):
    """`dealt`: of the oracle. `lse`, log2 units, and `partial`: of the programs of the first
    request, `[num_items, num_kv_heads, rows(, head_size)]`; those of one item leave none."""

    output: torch.Tensor
    counters: torch.Tensor
    dealt: list[dict[str, int]]
    lse: torch.Tensor
    partial: torch.Tensor


def run_share(batch: Batch, device: str, limits: DecodeLimits, tau, **options) -> Run:
    case = batch.case
    seq_lens, query, planes = batch.seq_lens.to(device), batch.query(device), batch.planes(device)
    dtype = query.dtype if device == "cuda" else torch.float32  # interpreted casts truncate
    output = torch.full(query.shape, math.nan, dtype=dtype, device=device)
    plan = DecodePlan.allocate(limits, torch.device(device)).update(seq_lens)
    scratch = poisoned_scratch(limits, device)
    counters = new_counters(case.num_kv_heads, device)
    decode_attention(
        query, planes, batch.block_table.to(device), seq_lens, plan, scratch, output,
        scale=case.scale, tau=torch.as_tensor(tau).reshape(-1).to(device), counters=counters,
        **options,
    )  # fmt: skip
    assert not plan.arrivals.any()
    shared = dealt(plan, planes, case.dtype)
    num_items = shared[0]["num_items"]
    lse = scratch.partial_lse[:num_items].cpu().unflatten(1, (case.num_kv_heads, -1))
    partial = scratch.partial_output[:num_items].cpu().unflatten(1, (case.num_kv_heads, -1))
    return Run(output.to("cpu", case.dtype), counters.cpu(), shared, lse, partial)


def expected_of(batch: Batch, tau, run_dealt, **options) -> tuple[torch.Tensor, list]:
    """The oracle's output, float64, and blocks read."""
    case = batch.case
    return decode_attention_reference(
        batch.query(), batch.planes(), batch.block_table, batch.seq_lens,
        block_size=case.block_size, scale=case.scale,
        tau=torch.as_tensor(tau).reshape(-1), dealt=run_dealt, dtype=torch.float64, **options,
    )  # fmt: skip


def error_of(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.double() - expected).norm() / expected.norm())


def scores_of(batch: Batch, request: int = 0, residual: bool = True) -> torch.Tensor:
    """Scores of a request's rows, float64, log2 units, `[num_kv_heads, rows, seq_len]`."""
    case, length = batch.case, batch.case.lengths[request]
    planes = batch.planes()
    if not residual:
        planes = planes._replace(key_residual=None)
    key, _ = gather_kv_reference(planes, batch.block_table[request], length, torch.float64)
    first = request * case.query_len
    rows = batch.query()[first : first + case.query_len].double()
    rows = rows.unflatten(1, (case.num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)
    scores = rows @ key.permute(1, 2, 0) * (case.scale * math.log2(math.e))
    tokens = torch.arange(case.query_len).repeat_interleave(case.group)
    after = torch.arange(length) > (length - case.query_len + tokens)[:, None]
    return scores.masked_fill(after, -math.inf)


def choice_of(batch: Batch, tau: float, run_dealt, request: int = 0, layer: int = 0) -> Choice:
    return choose_blocks_reference(
        scores_of(batch, request, residual=False), batch.case.query_len, tau,
        block_size=batch.case.block_size, layer=layer, **run_dealt[request],
    )  # fmt: skip


def sums_of_programs(batch, choice, num_items: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerators and denominators of every program, float64, `[num_items, num_kv_heads, rows,
    head_size]` and without the last dimension."""
    case = batch.case
    scores = scores_of(batch)
    _, value = gather_kv_reference(
        batch.planes(), batch.block_table[0], case.lengths[0], torch.float64
    )
    tokens = torch.arange(scores.shape[-1])
    counts = choice.weights.exp2().repeat_interleave(case.group, dim=1)
    weights = scores.exp2() * counts[..., tokens // case.block_size]
    owners = tokens // 64 % num_items
    mine = torch.stack([weights * (owners == item) for item in range(num_items)])
    return mine @ value.transpose(0, 1), mine.sum(-1)


def planted(case: Case, hot: dict[int, float], others: float = 0.0) -> Batch:
    """A batch whose token `position` of every request scores `hot[position]`, log2 units, for all
    heads, and `others` otherwise."""
    batch = make_batch(case)
    unit = 1 / (math.log2(math.e) * case.scale * case.head_size)
    batch.qkv[:] = 1.0
    batch.key[:] = others * unit
    starts = torch.tensor((0, *case.lengths)).cumsum(0)[:-1]
    for position, score in hot.items():
        batch.key[starts + position] = score * unit
    batch.write()
    return batch
