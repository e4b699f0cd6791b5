"""Decode, step 3: hands on what a work item comes to; the last one of a request merges them by
log-sum-exp."""

import triton
import triton.language as tl

from ..counters import COUNTERS
from ..counters import SHARE_UNITS as SHARE_UNITS_
from .attend import narrow
from .query import query_rows

NUM_COUNTERS: tl.constexpr = tl.constexpr(len(COUNTERS))
SHARE_UNITS: tl.constexpr = tl.constexpr(SHARE_UNITS_)


@triton.jit
def _count(counter_ptr, number):
    tl.atomic_add(counter_ptr, number, sem="relaxed")  # any other waits for all of memory


@triton.jit
def count_item(
    counters_ptr, kv_head, index, num_items, query_len, is_short,
    num_blocks, num_kept, num_drawn, left,
):
    """Adds what became of a work item's blocks to a row of `new_counters`.

    The share `left` of an item stands for that of all items where the most is wanted.
    """
    counters_ptr += kv_head * NUM_COUNTERS
    num_blocks = num_blocks.to(tl.int64)
    if is_short:
        _count(counters_ptr + 2, num_blocks)
    else:
        units = (left * SHARE_UNITS).to(tl.int64)
        _count(counters_ptr, num_kept.to(tl.int64))
        _count(counters_ptr + 1, num_blocks)
        _count(counters_ptr + 3, num_drawn.to(tl.int64))
        _count(counters_ptr + 4, units)
        most = tl.minimum(units * num_items // query_len, SHARE_UNITS)
        tl.atomic_max(counters_ptr + 5, most, sem="relaxed")
        _count(counters_ptr + 6, tl.where(index == 0, query_len, 0).to(tl.int64))


@triton.jit
def smaller_blocks(
    seq_len, index, num_items, BLOCK_SIZE: tl.constexpr, SMALLER: tl.constexpr
):
    """How many blocks of SMALLER tokens, that divide those of BLOCK_SIZE, an item has."""
    num_blocks = (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    whole = (num_blocks - index + num_items - 1) // num_items * (BLOCK_SIZE // SMALLER)
    missing = num_blocks * (BLOCK_SIZE // SMALLER) - (seq_len + SMALLER - 1) // SMALLER
    return whole - tl.where((num_blocks - 1 - index) % num_items == 0, missing, 0)


@triton.jit
def merge_items(
    output, token, kv_head, query_len, partial_output_ptr, partial_lse_ptr, num_items,
    PAGE: tl.constexpr, QUERY: tl.constexpr, TUNING: tl.constexpr,
):
    """Writes the merged output of a request and KV head.

    `output`: of `head_rows`; `token`: the request's first. The other pointers are those of its
    first item; see `DecodeScratch` for what the items left there. They are taken in order,
    MERGE_SLOTS at a time, whichever of them came last: the result is the same from run to run.
    """
    SLOTS: tl.constexpr = TUNING.MERGE_SLOTS
    HEAD_SIZE: tl.constexpr = PAGE.HEAD_SIZE
    QUADS: tl.constexpr = PAGE.HEAD_SIZE_PADDED // 4  # of the elements of a row
    STRIDE_LSE: tl.constexpr = QUERY.NUM_KV_HEADS * QUERY.ROWS  # from item to item
    slots = tl.arange(0, SLOTS)
    # a thread has quads, and all slots of each: nothing that is added up crosses threads
    quads = tl.arange(0, TUNING.MERGE_ROWS * QUADS)
    rows = quads // QUADS
    columns = quads[:, None] % QUADS * 4 + tl.arange(0, 4)[None, :]
    is_row = rows < QUERY.ROWS
    accumulator = tl.zeros([TUNING.MERGE_ROWS * QUADS, 4], tl.float32)
    largest = tl.full([TUNING.MERGE_ROWS * QUADS, 1], float("-inf"), tl.float32)
    total = tl.zeros([TUNING.MERGE_ROWS * QUADS, 1], tl.float32)
    places = slots[:, None] * STRIDE_LSE + rows[None, :]
    lse_ptr = partial_lse_ptr + places[:, :, None]  # of three dimensions: laid out as `partial`
    partial_ptr = partial_output_ptr + (places * HEAD_SIZE)[:, :, None] + columns[None, :, :]
    for begin in tl.range(0, num_items, SLOTS, num_stages=1):
        exists = tl.broadcast_to((begin + slots < num_items)[:, None, None], lse_ptr.shape)
        if QUERY.ROWS < TUNING.MERGE_ROWS:
            exists &= is_row[None, :, None]
        lse = tl.load(
            lse_ptr + begin * STRIDE_LSE, mask=exists, other=0.0, cache_modifier=".cg"
        )
        exists = tl.broadcast_to(exists, partial_ptr.shape)
        if HEAD_SIZE < QUADS * 4:
            exists &= (columns < HEAD_SIZE)[None, :, :]
        partial = tl.load(
            partial_ptr + begin * (STRIDE_LSE * HEAD_SIZE), mask=exists, other=0.0,
            cache_modifier=".cg",
        )
        lse = tl.where((slots < num_items - begin)[:, None, None], lse, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(lse, axis=0))
        safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(lse - safe[None, :, :])
        rescale = tl.exp2(largest - safe)
        accumulator = accumulator * rescale + tl.sum(partial * weights, axis=0)
        total = total * rescale + tl.sum(weights, axis=0)
        largest = new_largest
    result = accumulator / tl.where(total == 0.0, 1.0, total)
    tokens, heads = rows // QUERY.GROUP, kv_head * QUERY.GROUP + rows % QUERY.GROUP
    place = (token + tokens) * output.stride_token + heads * output.stride_head
    tl.store(
        output.pointer + place[:, None] + columns,
        result.to(output.pointer.dtype.element_ty),
        mask=(is_row & (tokens < query_len))[:, None] & (columns < HEAD_SIZE),
    )


@triton.jit
def leave_result(
    accumulator, weight_sums, reference,
    output, scratch, arrivals_ptr, before, request, index, num_items, item, kv_head, token,
    query_len,
    PAGE: tl.constexpr, QUERY: tl.constexpr,
):
    """Writes the output of a request and KV head that is one item; of others what the item comes
    to. Returns whether this program is the last of several and has to `merge_results`. `before`:
    what others have added to the arrivals.

    `accumulator, weight_sums, reference`: of `softmax_update`. See `merge_items` for the others.
    """
    arrivals_ptr += request * QUERY.NUM_KV_HEADS + kv_head
    HEAD_SIZE: tl.constexpr = PAGE.HEAD_SIZE
    HEAD_SIZE_PADDED: tl.constexpr = PAGE.HEAD_SIZE_PADDED
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    row_tokens, row_heads, row_exists = query_rows(query_len, QUERY.GROUP, ROWS_PADDED)
    row_sum = tl.sum(weight_sums, axis=0)
    result = tl.trans(narrow(accumulator, HEAD_SIZE_PADDED, ROWS_PADDED))
    result /= tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    mask = row_exists[:, None] & (columns < HEAD_SIZE)[None, :]
    missing = tl.full([], 1, tl.int32)
    if num_items == 1:
        output_place = (token + row_tokens) * output.stride_token
        output_place += (kv_head * QUERY.GROUP + row_heads) * output.stride_head
        tl.store(
            output.pointer + output_place[:, None] + columns[None, :],
            result.to(output.pointer.dtype.element_ty),
            mask=mask,
        )
        if before > 0:
            tl.store(arrivals_ptr, 0)
    else:
        partial_rows = (item * QUERY.NUM_KV_HEADS + kv_head).to(tl.int64) * QUERY.ROWS
        partial_rows += tl.arange(0, ROWS_PADDED)
        partial_output = scratch.partial_output + partial_rows[:, None] * HEAD_SIZE
        tl.store(partial_output + columns[None, :], result, mask=mask)
        lse = reference + tl.log2(row_sum)
        tl.store(scratch.partial_lse + partial_rows, lse, mask=row_exists)
        tl.debug_barrier()  # all threads' results are written before one of them says so
        arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
        missing = before + num_items - 1 - arrived
    return missing == 0


@triton.jit
def merge_results(
    output, scratch, arrivals_ptr, request, index, num_items, item, kv_head, token, query_len,
    PAGE: tl.constexpr, QUERY: tl.constexpr, TUNING: tl.constexpr,
):
    """Merges what `leave_result` left of a request and KV head, whose arrivals are zero
    afterwards. See there for the arguments."""
    first_row = ((item - index) * QUERY.NUM_KV_HEADS + kv_head).to(tl.int64) * QUERY.ROWS
    merge_items(
        output, token, kv_head, query_len,
        scratch.partial_output + first_row * PAGE.HEAD_SIZE, scratch.partial_lse + first_row,
        num_items, PAGE, QUERY, TUNING,
    )
    tl.store(arrivals_ptr + request * QUERY.NUM_KV_HEADS + kv_head, 0)  # for the next launch
