"""PyTorch oracle of the rule "share": which blocks are read, and what each of them counts."""

from typing import NamedTuple

import torch

CHANCES = 1 << 20
RECENT_TOKENS = 256
MOST_MASS = 2.0**100
"""Relative to the anchors' best token; a block of this mass or more, or of one that is no number,
is read for sure."""


def _mixed(bits: int) -> int:
    """The finaliser of MurmurHash3, on 32 bits."""
    bits ^= bits >> 16
    bits = bits * 0x85EBCA6B & 0xFFFFFFFF
    bits ^= bits >> 13
    bits = bits * 0xC2B2AE35 & 0xFFFFFFFF
    return bits ^ bits >> 16


def draw_offset_reference(layer: int, kv_head: int, position: int, first_span: int) -> int:
    """Where a systematic draw begins, in [0, CHANCES)."""
    bits = _mixed(layer + 0x9E3779B9 & 0xFFFFFFFF)
    for part in (kv_head, position, first_span):
        bits = _mixed(bits ^ part)
    return bits % CHANCES


def draw_reference(shares: torch.Tensor, tau: float, offset: int | torch.Tensor) -> torch.Tensor:
    """A systematic draw of blocks with probability `min(1, share / tau)` each: `log2(1 / p)` of
    those that are read, -inf of the others, like `shares`, `[..., num_blocks]`, of which each row
    has its `offset`, int64 `[...]`."""
    certain = ~(shares < tau)
    chances = (shares.double() / tau * CHANCES).ceil().clamp(min=1)
    chances = torch.where(certain, 0, chances).long()
    drawn = chances.cumsum(-1) + torch.as_tensor(offset, device=shares.device)[..., None]
    hit = drawn // CHANCES != (drawn - chances) // CHANCES
    weights = torch.where(hit, (CHANCES / chances.double()).log2(), -torch.inf)
    return torch.where(certain, 0.0, weights)


class Choice(NamedTuple):
    """What is read of a request's blocks. `weights`: `log2(1 / p)`, -inf for blocks that a query
    token does not want, `[num_kv_heads, query_len, num_blocks]`; `drawn`: blocks that are read by
    chance alone, bool `[num_kv_heads, num_blocks]`; `left`: the share that was left to the draw,
    `[num_kv_heads, num_items]`, summed over tokens."""

    weights: torch.Tensor
    drawn: torch.Tensor
    left: torch.Tensor


def choose_blocks_reference(
    scores: torch.Tensor,
    query_len: int,
    tau: float,
    *,
    block_size: int,
    layer: int = 0,
    anchor_tokens: int = 16,
    span: int | None = None,
    num_items: int = 1,
    chunk_spans: int | None = None,
) -> Choice:
    """Which blocks of a request are read by their share, and what each counts.

    Args:
        scores: base scores, log2 units, `[num_kv_heads, query_len * group, seq_len]`, -inf where
            a row does not see a token.
        tau: the share of the softmax from which on a block is read for sure; see
            `decode_attention`.
        span: tokens that are dealt out together, `block_size` or a multiple.
        num_items: programs that share the request, each of which has every `num_items`-th span,
            estimates the denominator from those that it has seen (those of the last RECENT_TOKENS
            stand for no others), and draws by itself.
        chunk_spans: spans that a program sees before it draws; None: all.
    """
    num_kv_heads, num_rows, seq_len = scores.shape
    span = span or block_size
    num_blocks, num_spans = -(-seq_len // block_size), -(-seq_len // span)
    padding = num_blocks * block_size - seq_len
    # Anchors may be there twice where a request is short.
    anchors = torch.cat([scores[..., :anchor_tokens], scores[..., -anchor_tokens:]], dim=-1)
    reference = anchors.amax(-1, keepdim=True)
    masses = torch.nn.functional.pad((scores - reference).exp2(), (0, padding))
    masses = masses.unflatten(-1, (num_blocks, block_size)).sum(-1)
    most = ~(masses < MOST_MASS)
    masses = masses.masked_fill(most, MOST_MASS)
    anchor_mass = (anchors - reference).exp2().sum(-1)  # [num_kv_heads, num_rows]

    device = scores.device
    blocks = torch.arange(num_blocks, device=device)
    newest = (seq_len - query_len) // block_size
    first_recent = max(newest - RECENT_TOKENS // block_size, 1)
    middle = (blocks > 0) & (blocks < first_recent)
    recent = (blocks >= first_recent) & (blocks < newest)
    positions = torch.arange(seq_len - query_len, seq_len, device=device)  # of query tokens
    weights = scores.new_full((num_kv_heads, query_len, num_blocks), -torch.inf)
    sure = torch.zeros(num_kv_heads, num_blocks, dtype=torch.bool, device=device)
    left = scores.new_zeros(num_kv_heads, num_items)
    for item in range(num_items):
        spans = range(item, num_spans, num_items)
        step = chunk_spans or max(1, len(spans))
        seen = torch.zeros(num_blocks, dtype=torch.bool, device=device)
        own = seen.clone()
        for begin in range(0, len(spans), step):
            chunk = spans[begin : begin + step]
            mine = (blocks[:, None] // (span // block_size) == scores.new_tensor(chunk)).any(1)
            seen |= mine & middle
            own |= mine & recent
            sums = masses[..., seen].sum(-1)
            largest = masses[..., seen].amax(-1) if seen.any() else torch.zeros_like(sums)
            scale = (first_recent - 1) / max(1, int(seen.sum()))
            total = anchor_mass + masses[..., own].sum(-1) + largest + (sums - largest) * scale
            parts = (masses[..., mine] / total[..., None]).unflatten(1, (query_len, -1))
            shares = parts.masked_fill(most[..., mine].unflatten(1, (query_len, -1)), torch.inf)
            shares = shares.amax(2)
            ends = (blocks[mine] == 0) | (blocks[mine] >= positions[:, None] // block_size)
            shares = shares.masked_fill(ends, torch.inf)
            offsets = [
                [draw_offset_reference(layer, head, p, chunk[0]) for p in positions.tolist()]
                for head in range(num_kv_heads)
            ]
            weights[..., mine] = draw_reference(shares, tau, torch.tensor(offsets)).to(scores)
            sure[:, mine] |= (~(shares < tau)).any(1)
            left[:, item] += parts.mean(2).where(shares < tau, 0).sum((1, 2))
    return Choice(weights, (weights > -torch.inf).any(1) & ~sure, left)
