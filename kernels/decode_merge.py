"""Decode, step 3: merges the partial results of a request's work items by log-sum-exp."""

import triton
import triton.language as tl

from .decode_query import query_rows


@triton.jit
def merge_items(
    output_ptr, partial_output_ptr, partial_lse_ptr, num_items,
    stride_item_output, stride_item_lse, output_stride_token, output_stride_head,
    GROUP: tl.constexpr, QUERY_LEN: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr, MERGE_ROWS: tl.constexpr, SLOTS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Writes the merged output of a request and KV head.

    The pointers are those of its first item, row and token. Items are taken in order, SLOTS side
    by side and UNROLL of them a slot at a time, whichever of them came last: the result is the
    same from run to run.
    """
    ROWS: tl.constexpr = GROUP * QUERY_LEN
    rows = tl.arange(0, MERGE_ROWS)
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    place = rows[:, None] * HEAD_SIZE + columns[None, :]
    exists = (rows < ROWS)[:, None] & (columns < HEAD_SIZE)[None, :]
    # every slot has a running softmax of its own, because their sum crosses warps
    accumulator = tl.zeros([SLOTS, MERGE_ROWS, HEAD_SIZE_PADDED], tl.float32)
    largest = tl.full([SLOTS, MERGE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([SLOTS, MERGE_ROWS], tl.float32)
    for begin in tl.range(0, num_items, SLOTS * UNROLL, num_stages=1):
        for step in tl.static_range(UNROLL):
            items = begin + step * SLOTS + tl.arange(0, SLOTS)
            lse = tl.load(
                partial_lse_ptr + items[:, None] * stride_item_lse + rows[None, :],
                mask=(items < num_items)[:, None] & (rows < ROWS)[None, :],
                other=float("-inf"), cache_modifier=".cg",
            )
            partial = tl.load(
                partial_output_ptr + items[:, None, None] * stride_item_output + place[None, :, :],
                mask=(items < num_items)[:, None, None] & exists[None, :, :],
                other=0.0, cache_modifier=".cg",
            )
            new_largest = tl.maximum(largest, lse)
            safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = tl.exp2(lse - safe)
            rescale = tl.exp2(largest - safe)
            accumulator *= rescale[:, :, None]
            accumulator += weights[:, :, None] * partial
            total = total * rescale + weights
            largest = new_largest
    best = tl.max(largest, axis=0)
    best = tl.where(best == float("-inf"), 0.0, best)
    weights = tl.exp2(largest - best[None, :])
    total = tl.sum(total * weights, axis=0)
    result = tl.sum(accumulator * weights[:, :, None], axis=0)
    result /= tl.where(total == 0.0, 1.0, total)[:, None]
    tokens, heads, _ = query_rows(GROUP, QUERY_LEN, MERGE_ROWS)
    tl.store(
        output_ptr + (tokens * output_stride_token + heads * output_stride_head)[:, None]
        + columns[None, :],
        result.to(output_ptr.dtype.element_ty),
        mask=exists,
    )
