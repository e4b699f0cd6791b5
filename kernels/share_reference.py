"""PyTorch oracle of the rule "share": which blocks are read, and what each of them counts."""

from typing import NamedTuple

import torch

CHANCES = 1 << 20
MOST_MASS = 2.0**100
"""Relative to the anchors' best token; a block of this mass or more, or of one that is no number,
is read for sure."""
ANCHOR_TOKENS = 16


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


def dealt_blocks(
    num_blocks: int,
    block_size: int,
    *,
    span: int | None = None,
    num_items: int = 1,
    chunk_spans: int | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """Which blocks are drawn from together: of each chunk of each program the blocks in their
    order, int64 `[num_chunks, blocks]`, `num_blocks` where there is none, and its first span."""
    per_span = (span or block_size) // block_size
    most = -(-num_blocks // (per_span * num_items))  # spans of a program
    chunk = chunk_spans or most
    places = torch.arange(-(-most // chunk) * chunk).view(-1, chunk)
    spans = (torch.arange(num_items)[:, None, None] + places * num_items).flatten(0, 1)
    blocks = (spans[..., None] * per_span + torch.arange(per_span)).flatten(1)
    return blocks.clamp(max=num_blocks), spans[:, 0].tolist()


def draw_dealt_reference(
    shares: torch.Tensor, tau: float, blocks: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """`draw_reference` of every chunk, of `shares` `[..., num_blocks]`; `blocks`: of
    `dealt_blocks`, `offsets` `[..., num_chunks]` int64."""
    num_blocks = shares.shape[-1]
    nowhere = torch.nn.functional.pad(shares, (0, 1), value=torch.inf)
    drawn = draw_reference(nowhere[..., blocks], tau, offsets).to(shares)
    weights = torch.zeros_like(nowhere)
    weights[..., blocks] = drawn
    return weights[..., :num_blocks]


def share_reference(
    scores: torch.Tensor,
    block_size: int,
    best: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block's part of the softmax's denominator, `[..., num_blocks]`, of the scan's scores,
    log2 units, `[..., seq_len]`; and whether it has MOST_MASS, which counts as that in
    denominators. Masses are relative to `best`, log2 units, `[...]`, the best of the first and last
    ANCHOR_TOKENS unless it is given. `sinks`, likewise, are in the denominator, too."""
    num_blocks = -(-scores.shape[-1] // block_size)
    if best is None:
        anchors = torch.cat([scores[..., :ANCHOR_TOKENS], scores[..., -ANCHOR_TOKENS:]], dim=-1)
        best = anchors.amax(-1)
    reference = best[..., None]
    padding = num_blocks * block_size - scores.shape[-1]
    masses = torch.nn.functional.pad((scores - reference).exp2(), (0, padding))
    masses = masses.unflatten(-1, (num_blocks, block_size)).sum(-1)
    most = ~(masses < MOST_MASS)
    masses = masses.masked_fill(most, MOST_MASS)
    total = masses.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks[..., None] - reference).exp2().clamp(max=MOST_MASS)
    return masses / total, most


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
    best: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    span: int | None = None,
    num_items: int = 1,
    chunk_spans: int | None = None,
) -> Choice:
    """Which blocks of a request are read by their share, and what each counts.

    Args:
        scores: of the scan, log2 units, `[num_kv_heads, query_len * group, seq_len]`, -inf where
            a row does not see a token.
        tau: the share of the softmax from which on a block is read for sure; see
            `decode_attention`.
        best, sinks: of `share_reference`, `[num_kv_heads, query_len * group]`.
        span: tokens that are dealt out together, `block_size` or a multiple.
        num_items: programs that share the request, each of which has every `num_items`-th span and
            draws by itself.
        chunk_spans: spans that a program draws from at a time; None: all.
    """
    num_kv_heads, _, seq_len = scores.shape
    parts, most = share_reference(scores, block_size, best, sinks)
    parts, most = parts.unflatten(1, (query_len, -1)), most.unflatten(1, (query_len, -1))
    num_blocks = parts.shape[-1]
    places = torch.arange(num_blocks, device=scores.device)
    positions = range(seq_len - query_len, seq_len)  # of query tokens
    newest = torch.tensor(positions, device=scores.device)[:, None] // block_size
    ends = (places == 0) | (places >= newest)  # [query_len, num_blocks]
    shares = parts.masked_fill(most, torch.inf).amax(2).masked_fill(ends, torch.inf)
    blocks, first_spans = dealt_blocks(
        num_blocks, block_size, span=span, num_items=num_items, chunk_spans=chunk_spans
    )
    blocks = blocks.to(scores.device)
    offsets = torch.tensor(
        [
            [[draw_offset_reference(layer, head, p, first) for first in first_spans]
             for p in positions]
            for head in range(num_kv_heads)
        ],
        device=scores.device,
    )
    weights = draw_dealt_reference(shares, tau, blocks, offsets)
    small = parts.mean(2).where(shares < tau, 0).sum(1)
    small = torch.nn.functional.pad(small, (0, 1))[:, blocks].sum(-1)
    left = small.unflatten(1, (num_items, -1)).sum(-1)
    drawn = (weights > -torch.inf).any(1) & (shares < tau).all(1)
    return Choice(weights, drawn, left)
