"""The rule "share" for many decode steps at once; the oracle of the kernels,
`choose_blocks_reference`, goes step by step."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_ffa_fp8fp8.kernels.share_reference import (
    CHANCES,
    RECENT_TOKENS,
    draw_offset_reference,
)

ANCHOR_TOKENS = 16


@dataclass(frozen=True)
class Dealt:
    """How programs share a request; see `choose_blocks_reference`."""

    span: int | None = None
    num_items: int = 1
    chunk_spans: int | None = None

    def spans(self, seq_len: int, block_size: int) -> torch.Tensor:
        """Which span each program sees in which place of its chunks, `[num_items, chunks,
        chunk_spans]`; some lie behind the request's last one."""
        most = -(-seq_len // ((self.span or block_size) * self.num_items))
        chunk = self.chunk_spans or most
        places = torch.arange(-(-most // chunk) * chunk).view(-1, chunk)
        return torch.arange(self.num_items)[:, None, None] + places * self.num_items


def share_weights(
    scores: torch.Tensor,
    tau: float,
    *,
    block_size: int,
    layer: int,
    kv_head: int,
    dealt: Dealt,
    raised: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """How many times the weights of blocks count that a KV head reads, 0 of others.

    Args:
        scores: base scores of the group's heads, log2 units, `[steps, group, seq_len]`.
        raised: log2 of a factor on shares, `[steps, group]`.

    Returns `[steps, num_blocks]`.
    """
    seq_len = scores.shape[2]
    per_span = (dealt.span or block_size) // block_size
    spans = dealt.spans(seq_len, block_size)
    blocks = (spans[..., None] * per_span + torch.arange(per_span)).flatten(2)
    num_blocks, newest = -(-seq_len // block_size), (seq_len - 1) // block_size
    offsets = [
        [draw_offset_reference(layer, kv_head, seq_len - 1, span) for span in row]
        for row in spans[..., 0].tolist()
    ]
    blocks, offsets = blocks.to(scores.device), torch.tensor(offsets, device=scores.device)

    anchors = torch.cat([scores[..., :ANCHOR_TOKENS], scores[..., -ANCHOR_TOKENS:]], -1)
    reference = anchors.amax(-1, keepdim=True)
    masses = F.pad((scores - reference).exp2(), (0, num_blocks * block_size - seq_len))
    masses = masses.unflatten(2, (num_blocks, block_size)).sum(-1)
    masses = F.pad(masses, (0, 1))[..., blocks.clamp(max=num_blocks)]
    first_recent = max(newest - RECENT_TOKENS // block_size, 1)
    middle = (blocks > 0) & (blocks < first_recent)
    recent = (masses * ((blocks >= first_recent) & (blocks < newest))).sum(-1).cumsum(-1)
    sums = (masses * middle).sum(-1).cumsum(-1)
    largest = (masses * middle).amax(-1).cummax(-1).values
    num_seen = middle.sum(-1).cumsum(-1).clamp(min=1).to(scores)
    scale = (first_recent - 1) / num_seen  # what is seen stands for all but the largest
    total = (anchors - reference).exp2().sum(-1)[..., None, None]
    total = total + recent + largest + (sums - largest) * scale  # [steps, group, num_items, chunks]
    raised = torch.as_tensor(raised, device=scores.device).exp2()[..., None, None, None]
    shares = (masses / total[..., None] * raised).amax(1)

    sure = ~(shares < tau) | (blocks == 0) | (blocks >= newest)
    chances = (shares / tau * CHANCES).ceil().clamp(min=1).masked_fill(sure, 0).long()
    drawn = chances.cumsum(-1) + offsets[..., None]
    hit = drawn // CHANCES != (drawn - chances) // CHANCES
    times = torch.where(hit, CHANCES / chances.to(scores), sure.to(scores))
    exists = blocks < num_blocks
    weights = scores.new_zeros(len(scores), num_blocks)
    weights[:, blocks[exists]] = times[:, exists]
    return weights
