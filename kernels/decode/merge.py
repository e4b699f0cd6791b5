"""Decode, step 3: merges the partial results of a request's work items by log-sum-exp."""

import triton
import triton.language as tl

from .query import query_rows


@triton.jit
def merge_items(
    output, token, kv_head, query_len, partial_output_ptr, partial_lse_ptr, num_items,
    PAGE: tl.constexpr, QUERY: tl.constexpr, MERGE_ROWS: tl.constexpr, SLOTS: tl.constexpr,
):
    """Writes the merged output of a request and KV head.

    `output`: of `head_rows`; `token`: the request's first. The other pointers are those of its
    first item; see `DecodeScratch` for what the items left there. They are taken in order, SLOTS
    at a time, whichever of them came last: the result is the same from run to run.
    """
    HEAD_SIZE: tl.constexpr = PAGE.HEAD_SIZE
    HEAD_SIZE_PADDED: tl.constexpr = PAGE.HEAD_SIZE_PADDED
    STRIDE_LSE: tl.constexpr = QUERY.NUM_KV_HEADS * QUERY.ROWS  # from item to item
    STRIDE_OUTPUT: tl.constexpr = STRIDE_LSE * HEAD_SIZE
    rows = tl.arange(0, MERGE_ROWS)
    slots = tl.arange(0, SLOTS)
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    tokens, heads, is_row = query_rows(query_len, QUERY.GROUP, MERGE_ROWS)
    exists = is_row[:, None] & (columns < HEAD_SIZE)[None, :]
    # Slots first: the warps share the rows then, so that the slots of a row stay in a thread.
    lse_ptr = partial_lse_ptr + slots[:, None] * STRIDE_LSE + rows[None, :]
    place = slots[:, None, None] * STRIDE_OUTPUT + rows[None, :, None] * HEAD_SIZE
    output_of_item = partial_output_ptr + place + columns[None, None, :]
    accumulator = tl.zeros([SLOTS, MERGE_ROWS, HEAD_SIZE_PADDED], tl.float32)
    largest = tl.full([SLOTS, MERGE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([SLOTS, MERGE_ROWS], tl.float32)
    for begin in tl.range(0, num_items, SLOTS, num_stages=1):
        is_item = begin + slots < num_items
        lse = tl.load(
            lse_ptr + begin * STRIDE_LSE, mask=is_item[:, None] & is_row[None, :],
            other=float("-inf"), cache_modifier=".cg",
        )
        partial = tl.load(
            output_of_item + begin * STRIDE_OUTPUT,
            mask=is_item[:, None, None] & exists[None, :, :], other=0.0, cache_modifier=".cg",
        )
        new_largest = tl.maximum(largest, lse)
        safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(lse - safe)
        rescale = tl.exp2(largest - safe)
        accumulator = accumulator * rescale[:, :, None] + partial * weights[:, :, None]
        total = total * rescale + weights
        largest = new_largest
    best = tl.max(largest, axis=0)
    best = tl.where(best == float("-inf"), 0.0, best)
    weights = tl.exp2(largest - best[None, :])
    total = tl.sum(total * weights, axis=0)
    result = tl.sum(accumulator * weights[:, :, None], axis=0)
    result /= tl.where(total == 0.0, 1.0, total)[:, None]
    place = (token + tokens) * output.stride_token
    place += (kv_head * QUERY.GROUP + heads) * output.stride_head
    tl.store(
        output.pointer + place[:, None] + columns[None, :],
        result.to(output.pointer.dtype.element_ty),
        mask=exists,
    )
