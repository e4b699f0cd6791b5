"""Decode, stage 2: merges the partial results of a request's work items by log-sum-exp."""

import triton
import triton.language as tl


@triton.jit
def decode_merge_kernel(
    output_ptr,
    partial_output_ptr,
    partial_lse_ptr,
    item_offsets_ptr,
    output_stride_request,
    output_stride_head,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    ITEMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one request and query head, its items in order; zeros for padding rows."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(item_offsets_ptr + request)
    end = tl.load(item_offsets_ptr + request + 1)
    if PDL:
        tl.extra.cuda.gdc_wait()  # for the partial results, and on every path: see decode_attend
    if end - begin == 1:
        return
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    accumulator = tl.zeros([HEAD_SIZE_PADDED], tl.float32)
    largest = float("-inf")
    total = 0.0
    for first in range(begin, end, ITEMS):
        items = first + tl.arange(0, ITEMS)
        rows = items.to(tl.int64) * NUM_HEADS + head
        lse = tl.load(partial_lse_ptr + rows, mask=items < end, other=float("-inf"))
        partial = tl.load(
            partial_output_ptr + rows[:, None] * HEAD_SIZE + columns[None, :],
            mask=(items < end)[:, None] & (columns < HEAD_SIZE)[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(lse, axis=0))
        safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(lse - safe)
        rescale = tl.exp2(largest - safe)
        accumulator = accumulator * rescale + tl.sum(weights[:, None] * partial, axis=0)
        total = total * rescale + tl.sum(weights, axis=0)
        largest = new_largest
    result = accumulator / tl.where(total == 0.0, 1.0, total)
    tl.store(
        output_ptr + request.to(tl.int64) * output_stride_request + head * output_stride_head
        + columns,
        result.to(output_ptr.dtype.element_ty),
        mask=columns < HEAD_SIZE,
    )
