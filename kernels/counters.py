"""What decode counts of a layer, on the device."""

import torch

COUNTERS = ("kept", "total", "short", "drawn", "left", "most_left", "tokens")
"""Blocks read and all blocks of requests that have `min_context` tokens; blocks of shorter ones,
which are all read; of the blocks read those that were drawn (rule "share"); the share of the
softmax that was left to the draw, the mean of the KV head's query heads, in units of
1 / SHARE_UNITS, and the most of a request; query tokens. All but the third are of requests that
have `min_context` tokens."""

SHARE_UNITS = 1 << 20


def new_counters(num_kv_heads: int, device: torch.device | str) -> torch.Tensor:
    """Zeros, int64 `[num_kv_heads, len(COUNTERS)]`, for `decode_attention` to add to."""
    return torch.zeros(num_kv_heads, len(COUNTERS), dtype=torch.int64, device=device)
