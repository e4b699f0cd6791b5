"""The rule "share" for many decode steps at once."""

from dataclasses import asdict, dataclass

import torch

from vllm_ffa_fp8fp8.kernels.share_reference import (
    dealt_blocks,
    draw_dealt_reference,
    draw_offset_reference,
    share_reference,
)


@dataclass(frozen=True)
class Dealt:
    """How programs share a request; see `choose_blocks_reference`."""

    span: int | None = None
    num_items: int = 1
    chunk_spans: int | None = None


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
    newest = scores.shape[2] - 1
    parts, most = share_reference(scores, block_size)
    parts = parts * torch.as_tensor(raised, device=scores.device).exp2()[..., None]
    shares = parts.masked_fill(most, torch.inf).amax(1)
    shares[:, [0, newest // block_size]] = torch.inf
    blocks, first_spans = dealt_blocks(shares.shape[1], block_size, **asdict(dealt))
    offsets = [draw_offset_reference(layer, kv_head, newest, first) for first in first_spans]
    offsets = torch.tensor(offsets, device=scores.device).expand(len(shares), -1)
    return draw_dealt_reference(shares, tau, blocks.to(scores.device), offsets).exp2()
