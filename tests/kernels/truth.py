"""What decode should give: the float64 oracle, its error budget, and margins of decisions."""

import math

import torch
from cases import ANCHOR_TOKENS, Batch, Case

from vllm_ffa_fp8fp8.kernels.cache_reference import gather_kv_reference
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference

ROUNDING = 1e-3
"""Log2 units: blocks whose margin is smaller may be kept or skipped."""


def reference(batch: Batch, delta: torch.Tensor | None, planes=None, table=None, **options):
    """Output in float64, and the blocks kept."""
    case = batch.case
    return decode_attention_reference(
        batch.query(),
        batch.planes() if planes is None else planes,
        batch.block_table if table is None else table,
        batch.seq_lens,
        block_size=case.block_size,
        scale=case.scale,
        delta=delta,
        dtype=torch.float64,
        **options,
    )


def plain_attention(
    batch: Batch, kept: list[torch.Tensor], logits_soft_cap: float | None = None
) -> torch.Tensor:
    """Attention to the kept blocks in the model's dtype, as torch does it."""
    case, planes = batch.case, batch.planes()
    query = batch.query().unflatten(0, (-1, case.query_len))
    output = torch.zeros_like(query)
    for request, length in enumerate(case.lengths):
        key, value = gather_kv_reference(planes, batch.block_table[request], length, case.dtype)
        for head in range(case.num_kv_heads if length else 0):
            tokens = kept[request][head].repeat_interleave(case.block_size)[:length]
            heads = slice(head * case.group, (head + 1) * case.group)
            for token in range(case.query_len):
                seen = tokens[: length - case.query_len + 1 + token].nonzero().squeeze(1)
                scores = query[request, token, heads] @ key[seen, head].mT * case.scale
                if logits_soft_cap:
                    scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
                output[request, token, heads] = torch.softmax(scores, -1) @ value[seen, head]
    return output.flatten(0, 1)


def assert_within_budget(output: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """At most twice the error of attention in the model's dtype, query token by query token."""
    for token, (ours, truth, rounded) in enumerate(zip(output, exact, plain, strict=True)):
        error = float((ours.double() - truth).abs().max())
        budget = 2 * float((rounded.double() - truth).abs().max()) + 1e-5
        assert error <= budget, f"token {token}: error {error:.2e}, budget {budget:.2e}"


def excess_of_blocks(rows, key, scale: float, block_size: int, seen=None) -> torch.Tensor:
    """By how much each block's best score lies above the anchors' best, log2 units.

    From `rows` `[num_kv_heads, group, head_size]` and `key` `[seq_len, num_kv_heads, head_size]`,
    float64 `[num_kv_heads, num_blocks]`, the largest over the group's heads; -inf where the rows,
    which see `seen` tokens (all if None), see none of the block.
    """
    if len(key) == 0:
        return torch.zeros(len(rows), 0)
    scores = torch.einsum("hgd,thd->hgt", rows.double(), key) * (scale * math.log2(math.e))
    if seen is not None:
        scores[..., seen:] = -math.inf
    anchors = torch.cat([scores[..., :ANCHOR_TOKENS], scores[..., -ANCHOR_TOKENS:]], -1)
    above = (scores - anchors.amax(-1, keepdim=True)).amax(1)
    return torch.stack([block.amax(-1) for block in above.split(block_size, dim=-1)], 1)


def block_excess(batch: Batch) -> list[torch.Tensor]:
    """`excess_of_blocks` of every request, from the base of its cached keys."""
    case, excess = batch.case, []
    planes = batch.planes()._replace(key_residual=None)
    for request, length in enumerate(case.lengths):
        key, _ = gather_kv_reference(planes, batch.block_table[request], length, torch.float64)
        first = request * case.query_len
        rows = batch.query()[first : first + case.query_len]
        rows = rows.unflatten(1, (case.num_kv_heads, case.group))
        tokens = [
            excess_of_blocks(token, key, case.scale, case.block_size, length - after)
            for after, token in zip(reversed(range(case.query_len)), rows, strict=True)
        ]
        excess.append(torch.stack(tokens).amax(0))
    return excess


def newest_blocks(case: Case, length: int) -> slice:
    """The blocks of a request that hold its query tokens, which are always kept."""
    return slice((length - case.query_len) // case.block_size if length else 0, None)


def delta_between(excess: torch.Tensor, fraction: float) -> float:
    """A delta in a gap of these excesses, so that about this fraction of them passes."""
    values = excess.flatten().sort().values
    gaps = (values.diff() > 4 * ROUNDING).nonzero().squeeze(1)
    if len(gaps) == 0:  # all alike: keep them
        return 0.5 - float(values.amin()) if len(values) else 1.0
    place = gaps[(gaps - (1 - fraction) * len(values)).abs().argmin()]
    return -float(values[place] + values[place + 1]) / 2


def choose_delta(batch: Batch, fraction: float = 0.5, per_request: bool = True) -> torch.Tensor:
    """A delta that keeps about this fraction of the blocks and leaves no decision to rounding."""
    candidates = [
        excess[:, : newest_blocks(batch.case, length).start]
        for excess, length in zip(block_excess(batch), batch.case.lengths, strict=True)
    ]
    if not per_request:
        candidates = [torch.cat([c.flatten() for c in candidates])]
    return torch.tensor([delta_between(c, fraction) for c in candidates])


def assert_kept(batch: Batch, kept: list[torch.Tensor], delta: torch.Tensor) -> None:
    """The blocks above the threshold and those of the query tokens, up to rounding."""
    for request, excess in enumerate(block_excess(batch)):
        margin = excess + float(delta[request % len(delta)])
        expected = margin >= 0
        expected[:, newest_blocks(batch.case, batch.case.lengths[request])] = True
        wrong = (kept[request] != expected) & (margin.abs() > ROUNDING)
        assert not wrong.any(), f"request {request}: {wrong.nonzero().tolist()}"
