"""What decode should give: the float64 oracle, its error budget, and margins of decisions."""

import math

import torch
from cases import ANCHOR_TOKENS, Batch

from vllm_ffa_fp8fp8.kernels.reference import (
    decode_attention_reference,
    gather_kv_reference,
    join_key_reference,
)

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


def plain_attention(batch: Batch, kept: list[torch.Tensor]) -> torch.Tensor:
    """Attention to the kept blocks in the model's dtype, as torch does it."""
    case, planes, query = batch.case, batch.planes(), batch.query()
    output = torch.zeros_like(query)
    for request, length in enumerate(case.lengths):
        key, value = gather_kv_reference(planes, batch.block_table[request], length, case.dtype)
        for head in range(case.num_kv_heads if length else 0):
            tokens = kept[request][head].repeat_interleave(case.block_size)[:length]
            heads = slice(head * case.group, (head + 1) * case.group)
            scores = query[request, heads] @ key[tokens, head].mT * case.scale
            output[request, heads] = torch.softmax(scores, dim=-1) @ value[tokens, head]
    return output


def assert_within_budget(output: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """At most twice the error of attention in the model's dtype, request by request."""
    for request, (ours, truth, rounded) in enumerate(zip(output, exact, plain, strict=True)):
        error = float((ours.double() - truth).abs().max())
        budget = 2 * float((rounded.double() - truth).abs().max()) + 1e-5
        assert error <= budget, f"request {request}: error {error:.2e}, budget {budget:.2e}"


def excess_of_blocks(rows, key, scale: float, block_size: int) -> torch.Tensor:
    """By how much each block's best score lies above the anchors' best, log2 units.

    From `rows` `[num_kv_heads, group, head_size]` and `key` `[seq_len, num_kv_heads, head_size]`,
    float64 `[num_kv_heads, num_blocks]`, the largest over the group's heads.
    """
    if len(key) == 0:
        return torch.zeros(len(rows), 0)
    scores = torch.einsum("hgd,thd->hgt", rows.double(), key) * (scale * math.log2(math.e))
    anchors = torch.cat([scores[..., :ANCHOR_TOKENS], scores[..., -ANCHOR_TOKENS:]], -1)
    above = (scores - anchors.amax(-1, keepdim=True)).amax(1)
    return torch.stack([block.amax(-1) for block in above.split(block_size, dim=-1)], 1)


def block_excess(batch: Batch) -> list[torch.Tensor]:
    """`excess_of_blocks` of every request, from the base of its cached keys."""
    case, planes = batch.case, batch.planes()
    excess = []
    for request, length in enumerate(case.lengths):
        tokens = torch.arange(length)
        page = batch.block_table[request].long()[tokens // case.page_size]
        offset = tokens % case.page_size
        exponent = planes.key_exponent
        key = join_key_reference(
            planes.key[page, :, offset],
            None,
            None if exponent is None else exponent[page, :, offset],
            dtype=torch.float64,
        )
        rows = batch.query()[request].unflatten(0, (case.num_kv_heads, case.group))
        excess.append(excess_of_blocks(rows, key, case.scale, case.block_size))
    return excess


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
    candidates = [excess[:, :-1] for excess in block_excess(batch)]  # the newest is always kept
    if not per_request:
        candidates = [torch.cat([c.flatten() for c in candidates])]
    return torch.tensor([delta_between(c, fraction) for c in candidates])


def assert_kept(batch: Batch, kept: list[torch.Tensor], delta: torch.Tensor) -> None:
    """The blocks above the threshold and the newest, up to rounding."""
    for request, excess in enumerate(block_excess(batch)):
        margin = excess + float(delta[request % len(delta)])
        expected = margin >= 0
        expected[:, -1:] = True
        wrong = (kept[request] != expected) & (margin.abs() > ROUNDING)
        assert not wrong.any(), f"request {request}: {wrong.nonzero().tolist()}"
