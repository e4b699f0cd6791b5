"""Decode, step 3: merges the partial results of a request's work items by log-sum-exp."""

import triton
import triton.language as tl

from .query import query_rows


@triton.jit
def merge_items(
    output_ptr, partial_output_ptr, partial_lse_ptr, num_items,
    stride_item_output, stride_item_lse, output_stride_token, output_stride_head,
    GROUP: tl.constexpr, QUERY_LEN: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr, MERGE_ROWS: tl.constexpr, SLOTS: tl.constexpr,
):
    """Writes the merged output of a request and KV head.

    The pointers are those of its first item, row and token; see `DecodeScratch` for what the
    items left there. They are taken in order, SLOTS at a time, whichever of them came last: the
    result is the same from run to run.
    """
    ROWS: tl.constexpr = GROUP * QUERY_LEN
    rows = tl.arange(0, MERGE_ROWS)
    slots = tl.arange(0, SLOTS)
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    exists = (rows < ROWS)[:, None] & (columns < HEAD_SIZE)[None, :]
    # Rows first: the warps share them, so that the slots of a row stay in a thread.
    lse_ptr = partial_lse_ptr + rows[:, None] + slots[None, :] * stride_item_lse
    place = rows[:, None, None] * HEAD_SIZE + columns[None, None, :]
    output_of_item = partial_output_ptr + place + slots[None, :, None] * stride_item_output
    accumulator = tl.zeros([MERGE_ROWS, SLOTS, HEAD_SIZE_PADDED], tl.float32)
    largest = tl.full([MERGE_ROWS, SLOTS], float("-inf"), tl.float32)
    total = tl.zeros([MERGE_ROWS, SLOTS], tl.float32)
    for begin in tl.range(0, num_items, SLOTS, num_stages=1):
        is_item = begin + slots < num_items
        lse = tl.load(
            lse_ptr + begin * stride_item_lse, mask=(rows < ROWS)[:, None] & is_item[None, :],
            other=float("-inf"), cache_modifier=".cg",
        )
        partial = tl.load(
            output_of_item + begin * stride_item_output,
            mask=exists[:, None, :] & is_item[None, :, None], other=0.0, cache_modifier=".cg",
        )
        new_largest = tl.maximum(largest, lse)
        safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(lse - safe)
        rescale = tl.exp2(largest - safe)
        accumulator = accumulator * rescale[:, :, None] + partial * weights[:, :, None]
        total = total * rescale + weights
        largest = new_largest
    best = tl.max(largest, axis=1)
    best = tl.where(best == float("-inf"), 0.0, best)
    weights = tl.exp2(largest - best[:, None])
    total = tl.sum(total * weights, axis=1)
    result = tl.sum(accumulator * weights[:, :, None], axis=1)
    result /= tl.where(total == 0.0, 1.0, total)[:, None]
    tokens, heads, _ = query_rows(GROUP, QUERY_LEN, MERGE_ROWS)
    tl.store(
        output_ptr + (tokens * output_stride_token + heads * output_stride_head)[:, None]
        + columns[None, :],
        result.to(output_ptr.dtype.element_ty),
        mask=exists,
    )
