"""PyTorch oracles of decode and prefill. They share no code with the kernels; the CPU path runs on
that of decode."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from .cache.page_layout import CODE_TOKENS, KVPlanes
from .cache_reference import (
    join_key_reference,
    join_value_reference,
    power_of_two,
    tokens_of,
    widen,
)
from .code_reference import decode_codes_reference, num_coded_tokens
from .counters import SHARE_UNITS
from .share_reference import Choice, choose_blocks_reference


def _rows(plane: torch.Tensor | None, head: int, tokens: torch.Tensor) -> torch.Tensor | None:
    return None if plane is None else plane[head].index_select(0, tokens)


def _code_scores(
    planes: KVPlanes, pages: torch.Tensor, num_tokens: int, rows: torch.Tensor
) -> torch.Tensor:
    """`rows` `[num_kv_heads, num_rows, head_size]` times the codes of the first `num_tokens`."""
    words = tokens_of(planes.key_code, pages, num_tokens)
    ranges = tokens_of(planes.code_range, pages, num_tokens // CODE_TOKENS)
    return rows @ decode_codes_reference(words, ranges, rows.dtype).mT


def _group_rows(tokens: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """The rows of each KV group, `[num_kv_heads, query_len * group, ...]`, of `[query_len,
    num_heads, ...]`."""
    return tokens.unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _sinks_of_rows(
    sinks: torch.Tensor | None, rows: torch.Tensor, query_len: int
) -> torch.Tensor:
    """The sink of each row of each KV group, natural units, `[num_kv_heads, num_rows]`; -inf for
    none."""
    if sinks is None:
        return torch.full_like(rows[..., 0], -math.inf)
    return sinks.to(rows).view(rows.shape[0], -1).repeat(1, query_len)


def _capped(scores: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    """`scores` under a soft cap in their units; None or 0: no cap."""
    return soft_cap * torch.tanh(scores / soft_cap) if soft_cap else scores


def _unseen(seq_len: int, query_len: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """Which tokens come after a group's row, bool `[num_rows, seq_len]`."""
    positions = torch.arange(seq_len, device=device)
    after = positions > positions[seq_len - query_len :, None]
    return after.repeat_interleave(num_rows // query_len, dim=0)


def decode_attention_reference(
    query: torch.Tensor,
    planes: KVPlanes,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    delta: torch.Tensor | None = None,
    tau: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    logits_soft_cap: float | None = None,
    layer: int = 0,
    dealt: Sequence[Mapping[str, int]] | None = None,
    query_start_loc: torch.Tensor | None = None,
    min_context: int = 0,
    anchor_tokens: int = 16,
    precomputed_threshold: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    code_lag: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`decode_attention` in PyTorch, in `dtype`; every length is 0 or at least that of the query.

    `dealt`: how programs share each request, arguments of `choose_blocks_reference`. `code_lag`:
    of the limits, for keys with codes, which are to be written before and are not here.

    Returns the output, shaped like `query`, in `dtype` and, for each request, which blocks each KV
    head kept, bool `[num_kv_heads, num_blocks]`.
    """
    num_reqs, num_kv_heads = seq_lens.shape[0], planes.num_kv_heads
    if query_start_loc is None:
        query_start_loc = torch.arange(num_reqs + 1) * (query.shape[0] // num_reqs)
    starts = query_start_loc.tolist()
    scale_log2 = scale * math.log2(math.e)
    soft_cap_log2 = (logits_soft_cap or 0.0) * math.log2(math.e)
    output = torch.zeros(query.shape, dtype=dtype, device=query.device)
    kept_blocks = []
    for request, seq_len in enumerate(seq_lens.tolist()):
        num_blocks = -(-seq_len // block_size)
        keep = torch.ones(num_kv_heads, num_blocks, dtype=torch.bool, device=query.device)
        kept_blocks.append(keep)
        new = slice(starts[request], starts[request + 1])
        query_len = new.stop - new.start
        if seq_len == 0 or query_len == 0:
            continue
        pages = block_table[request, : -(-seq_len // planes.page_size)]
        base = tokens_of(planes.key, pages, seq_len)
        residual = tokens_of(planes.key_residual, pages, seq_len)
        exponent = tokens_of(planes.key_exponent, pages, seq_len)
        value = tokens_of(planes.value, pages, seq_len)
        value_exponent = tokens_of(planes.value_exponent, pages, seq_len)
        rows = _group_rows(query[new].to(dtype), num_kv_heads)
        unseen = _unseen(seq_len, query_len, rows.shape[1], query.device)
        limit = delta if tau is None else tau
        limit = math.inf if limit is None else float(limit[request % limit.shape[0]])
        counts = torch.zeros(rows.shape[:2] + (1,), dtype=dtype, device=query.device)
        sink = _sinks_of_rows(sinks, rows, query_len)
        choice = None
        if limit < math.inf and seq_len >= min_context:
            scores = rows @ widen(base, dtype).mT * scale_log2
            if exponent is not None:
                scores = scores * power_of_two(exponent, dtype).mT
            scores = _capped(scores, soft_cap_log2)
            scores = scores.masked_fill(unseen, -math.inf)
            first, last = scores[..., :anchor_tokens], scores[..., -anchor_tokens:]
            best = torch.maximum(first.amax(-1), last.amax(-1))
            if planes.key_code is not None and tau is not None:
                coded = num_coded_tokens(seq_len, query_len, code_lag)
                of_codes = _code_scores(planes, pages, coded, rows) * scale_log2
                of_codes = _capped(of_codes, soft_cap_log2)
                scores = torch.cat([of_codes, scores[..., coded:]], dim=-1)
            if tau is not None:
                shared = dealt[request] if dealt else {}
                choice = choose_blocks_reference(
                    scores, query_len, limit, block_size=block_size, layer=layer,
                    best=best, sinks=sink * math.log2(math.e), **shared,
                )
                keep[:] = (choice.weights > -math.inf).any(1)
                counts = choice.weights.repeat_interleave(rows.shape[1] // query_len, dim=1)
                counts = counts.repeat_interleave(block_size, dim=2)[..., :seq_len]
            else:
                if precomputed_threshold is None:
                    threshold = best - limit
                else:
                    threshold = _group_rows(precomputed_threshold[new].to(dtype), num_kv_heads)
                threshold = torch.maximum(threshold, sink * math.log2(math.e) - limit)
                above = (scores >= threshold[..., None]).any(1)  # [num_kv_heads, seq_len]
                above = F.pad(above, (0, num_blocks * block_size - seq_len))
                keep[:] = above.view(num_kv_heads, num_blocks, block_size).any(-1)
                keep[:, (seq_len - query_len) // block_size :] = True
        tokens = keep.repeat_interleave(block_size, dim=1)[:, :seq_len]
        result = torch.empty_like(rows)
        for head in range(num_kv_heads):
            chosen = tokens[head].nonzero().squeeze(1)
            key = join_key_reference(
                _rows(base, head, chosen),
                _rows(residual, head, chosen),
                _rows(exponent, head, chosen),
                planes.residual_scale,
                dtype,
            )
            scores = _capped(rows[head] @ key.mT * scale, logits_soft_cap)
            scores += counts[head].expand(-1, seq_len)[:, chosen] * math.log(2)
            scores = scores.masked_fill(unseen[:, chosen], -math.inf)
            chosen_value = join_value_reference(
                _rows(value, head, chosen), _rows(value_exponent, head, chosen), dtype
            )
            scores = torch.cat([sink[head, :, None], scores], dim=1)
            result[head] = torch.softmax(scores, dim=-1)[:, 1:] @ chosen_value
        output[new] = result.unflatten(1, (query_len, -1)).transpose(0, 1).flatten(1, 2)
        if counters is not None:
            if seq_len < min_context:
                counters[:, 2] += num_blocks
            else:
                _count(counters, keep, choice, query_len)
    return output, kept_blocks


def _count(
    counters: torch.Tensor, keep: torch.Tensor, choice: Choice | None, query_len: int
) -> None:
    counters[:, 0] += keep.sum(1)
    counters[:, 1] += keep.shape[1]
    counters[:, 6] += query_len
    if choice is not None:
        units = (choice.left * SHARE_UNITS).long()
        most = (units.amax(1) * units.shape[1] // query_len).clamp(max=SHARE_UNITS)
        counters[:, 3] += choice.drawn.sum(1)
        counters[:, 4] += units.sum(1)
        counters[:, 5] = torch.maximum(counters[:, 5], most)


def prefill_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of one request's newest tokens.

    Args:
        query: `[query_len, num_heads, head_size]`, the last tokens.
        key, value: `[seq_len, num_kv_heads, head_size]`, all tokens up to the newest.
    """
    query_len, seq_len = query.shape[0], key.shape[0]
    mask = None
    if query_len < seq_len:
        columns = torch.arange(seq_len, device=query.device)
        mask = columns <= columns[-query_len:, None]
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)
