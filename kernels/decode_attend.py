"""Decode, step 2: attends to the kept blocks, divided evenly over a request's programs."""

import triton
import triton.language as tl

from .decode_query import load_query
from .decode_scan import load_key_scales
from .paged_rows import block_entries, entry_block, entry_page, load_rows, token_pages


@triton.jit
def online_softmax_update(accumulator, row_max, row_sum, scores, value):
    """Adds a tile to a running softmax; scores are log2 units, -inf where masked."""
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - safe_max[:, None])
    rescale = tl.exp2(row_max - safe_max)
    accumulator = tl.dot(weights.to(value.dtype), value, accumulator * rescale[:, None])
    return accumulator, new_max, row_sum * rescale + tl.sum(weights, axis=1)


@triton.jit
def share_kept_blocks(
    kept_blocks_ptr, kept_by_item_ptr, kept_counts_ptr, index, num_items, num_blocks,
    NUM_KV_HEADS: tl.constexpr, ITEMS_PADDED: tl.constexpr, RANKS: tl.constexpr,
):
    """Copies this program's equal share of the entries of a request's kept blocks into one list.

    The pointers are those of the request and KV head: `kept_by_item` has each item's blocks at
    the item's first block, `kept_counts` one number an item. Returns the share as `begin, end`
    in the list `kept_blocks`.
    """
    items = tl.arange(0, ITEMS_PADDED)
    counts = tl.load(kept_counts_ptr + items * NUM_KV_HEADS, mask=items < num_items, other=0)
    ends = tl.cumsum(counts, axis=0)
    total = tl.sum(counts, axis=0)
    begin = index * total // num_items
    end = (index + 1) * total // num_items
    rank = begin
    while rank < end:  # from one item that kept something to the next
        before = ends <= rank
        owner = tl.sum(before.to(tl.int32), axis=0)
        owner_begin = tl.max(tl.where(before, ends, 0), axis=0)
        owner_end = tl.min(tl.where(before, total, ends), axis=0)
        source_ptr = kept_by_item_ptr + owner * num_blocks // num_items - owner_begin
        stop = tl.minimum(owner_end, end)
        for first in range(rank, stop, RANKS):
            ranks = first + tl.arange(0, RANKS)
            blocks = tl.load(source_ptr + ranks, mask=ranks < stop, other=0)
            tl.store(kept_blocks_ptr + ranks, blocks, mask=ranks < stop)
        rank = stop
    tl.debug_barrier()  # written by some threads, read by others
    return begin, end


@triton.jit
def listed_entry(
    kept_blocks_ptr, block_table_row_ptr, rank, end, num_blocks, PRUNE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):
    """The entry of a rank; of a block that does not exist for ranks from `end` on."""
    if PRUNE:
        missing = num_blocks.to(tl.int64) << 32
        entry = tl.load(kept_blocks_ptr + rank, mask=rank < end, other=missing)
    else:
        entry = block_entries(block_table_row_ptr, rank, rank < end, PAGE_SIZE, BLOCK_SIZE)
    return entry


@triton.jit
def load_scores(
    scores_ptr, block, num_blocks, group, rows,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):
    """The scan's scores of a block, log2 units, float32 `[GROUP_PADDED, BLOCK_SIZE]`."""
    return tl.load(
        scores_ptr + block.to(tl.int64) * (NUM_HEADS * BLOCK_SIZE)
        + group[:, None] * BLOCK_SIZE + rows[None, :],
        mask=(group < GROUP)[:, None] & (rows < (num_blocks - block) * BLOCK_SIZE)[None, :],
        other=0.0,
    )


@triton.jit
def attend_blocks(
    query, factor, kept_blocks_ptr, begin, end, num_blocks, seq_len, scores_ptr,
    key_ptr, residual_ptr, exponent_ptr, value_ptr, block_table_row_ptr,
    key_stride_page, key_stride_token, residual_stride_page, residual_stride_token,
    exponent_stride_page, value_stride_page, value_stride_token,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PRUNE: tl.constexpr, FROM_SCORES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_EXPONENT: tl.constexpr, RESIDUAL_SCALE: tl.constexpr,
    DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr, STAGES: tl.constexpr,
):
    """Attention over the listed blocks `begin ... end` (without PRUNE: over those blocks).

    FROM_SCORES: the scan's scores stand for the dot with the base. Returns accumulator, row
    maximum (log2 units) and row sum.
    """
    group = tl.arange(0, GROUP_PADDED)
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    rows = tl.arange(0, BLOCK_SIZE)
    WHOLE_BLOCKS: tl.constexpr = PAGE_SIZE % BLOCK_SIZE == 0
    accumulator = tl.zeros([GROUP_PADDED, HEAD_SIZE_PADDED], tl.float32)
    row_max = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    row_sum = tl.zeros([GROUP_PADDED], tl.float32)
    # The next block's entry, exponents and scores are carried to its iteration, because a load
    # that waits for another load of its own iteration is not pipelined.
    entry = listed_entry(
        kept_blocks_ptr, block_table_row_ptr, begin, end, num_blocks, PRUNE, PAGE_SIZE, BLOCK_SIZE
    )
    block = entry_block(entry)
    if WHOLE_BLOCKS:
        positions = block * BLOCK_SIZE + rows
        key_scales = load_key_scales(
            exponent_ptr, entry_page(entry, PAGE_SIZE, BLOCK_SIZE), positions % PAGE_SIZE,
            positions < seq_len, exponent_stride_page, HAS_EXPONENT,
        )
    if FROM_SCORES:
        base_scores = load_scores(
            scores_ptr, block, num_blocks, group, rows, NUM_HEADS, GROUP, BLOCK_SIZE
        )
    for rank in tl.range(begin, end, num_stages=STAGES):
        positions = entry_block(entry) * BLOCK_SIZE + rows
        valid = positions < seq_len
        offsets = positions % PAGE_SIZE
        next_entry = listed_entry(
            kept_blocks_ptr, block_table_row_ptr, rank + 1, end, num_blocks, PRUNE, PAGE_SIZE,
            BLOCK_SIZE,
        )
        next_block = entry_block(next_entry)
        if WHOLE_BLOCKS:
            pages = entry_page(entry, PAGE_SIZE, BLOCK_SIZE)
            next_positions = next_block * BLOCK_SIZE + rows
            next_key_scales = load_key_scales(
                exponent_ptr, entry_page(next_entry, PAGE_SIZE, BLOCK_SIZE),
                next_positions % PAGE_SIZE, next_positions < seq_len, exponent_stride_page,
                HAS_EXPONENT,
            )
        else:
            pages = token_pages(block_table_row_ptr, positions, valid, PAGE_SIZE)
            key_scales = load_key_scales(
                exponent_ptr, pages, offsets, valid, exponent_stride_page, HAS_EXPONENT
            )
        if FROM_SCORES:
            next_base_scores = load_scores(
                scores_ptr, next_block, num_blocks, group, rows, NUM_HEADS, GROUP, BLOCK_SIZE
            )
        if HAS_RESIDUAL:
            residual = load_rows(
                residual_ptr, pages, offsets, residual_stride_page, residual_stride_token,
                columns, valid, HEAD_SIZE, HEAD_SIZE_PADDED,
            ).to(DTYPE)
        value = load_rows(
            value_ptr, pages, offsets, value_stride_page, value_stride_token, columns, valid,
            HEAD_SIZE, HEAD_SIZE_PADDED,
        ).to(VALUE_DTYPE)
        key_factor = factor[:, None] * key_scales[None, :]
        if FROM_SCORES:
            scores = base_scores
            base_scores = next_base_scores
            if HAS_RESIDUAL:
                correction = tl.dot(query, tl.trans(residual)) * (1.0 / RESIDUAL_SCALE)
                scores += correction * key_factor
        else:
            key = load_rows(
                key_ptr, pages, offsets, key_stride_page, key_stride_token, columns, valid,
                HEAD_SIZE, HEAD_SIZE_PADDED,
            ).to(DTYPE)
            if HAS_RESIDUAL:
                key += residual * (1.0 / RESIDUAL_SCALE)
            scores = tl.dot(query, tl.trans(key)) * key_factor
        scores = tl.where(valid[None, :], scores, float("-inf"))
        accumulator, row_max, row_sum = online_softmax_update(
            accumulator, row_max, row_sum, scores, value
        )
        entry = next_entry
        if WHOLE_BLOCKS:
            key_scales = next_key_scales
    return accumulator, row_max, row_sum


@triton.jit
def decode_attend_kernel(
    output_ptr,
    partial_output_ptr,
    partial_lse_ptr,
    kept_blocks_ptr,
    kept_by_item_ptr,
    kept_counts_ptr,
    scores_ptr,
    counters_ptr,
    query_ptr,
    key_ptr,
    residual_ptr,
    exponent_ptr,
    value_ptr,
    block_table_ptr,
    work_ptr,
    delta_ptr,
    scale_log2,
    min_context,
    num_score_blocks,
    delta_stride,
    kept_stride_head,
    query_stride_request,
    query_stride_head,
    output_stride_request,
    output_stride_head,
    block_table_stride,
    key_stride_page,
    key_stride_head,
    key_stride_token,
    residual_stride_page,
    residual_stride_head,
    residual_stride_token,
    exponent_stride_page,
    exponent_stride_head,
    value_stride_page,
    value_stride_head,
    value_stride_token,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ITEMS_PADDED: tl.constexpr,
    PRUNE: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_EXPONENT: tl.constexpr,
    RESIDUAL_SCALE: tl.constexpr,
    RECORD: tl.constexpr,
    DTYPE: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
    DENSE_STAGES: tl.constexpr,
    PDL: tl.constexpr,
    EARLY_BLOCKS: tl.constexpr,
):
    """One program: one share of a request's kept blocks, one KV head, all heads of its group.

    Writes the normalised output and the log-sum-exp (log2 units) of the share to the partial
    buffers, or straight to the output if the request has one item only.
    """
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.load(work_ptr + item * 8)
    if request < 0:
        # A grid that started early must not end before the one it depends on has: what follows
        # in the stream waits for this grid alone.
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    index = tl.load(work_ptr + item * 8 + 1)
    num_items = tl.load(work_ptr + item * 8 + 2)
    num_blocks = tl.load(work_ptr + item * 8 + 3)
    block_offset = tl.load(work_ptr + item * 8 + 4)
    seq_len = tl.load(work_ptr + item * 8 + 5)
    block_table_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride

    group = tl.arange(0, GROUP_PADDED)
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    query, factor = load_query(
        query_ptr + request.to(tl.int64) * query_stride_request
        + kv_head * GROUP * query_stride_head,
        query_stride_head, group, columns, scale_log2, GROUP, HEAD_SIZE, NORMALISE, DTYPE,
    )
    key_ptr += kv_head.to(tl.int64) * key_stride_head
    value_ptr += kv_head.to(tl.int64) * value_stride_head
    if HAS_RESIDUAL:
        residual_ptr += kv_head.to(tl.int64) * residual_stride_head
    if HAS_EXPONENT:
        exponent_ptr += kv_head.to(tl.int64) * exponent_stride_head
    if PDL:
        if num_blocks <= num_items * EARLY_BLOCKS:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()  # for the lists of the scan
    if PRUNE:
        kept_start = kv_head.to(tl.int64) * kept_stride_head + block_offset
        kept_blocks_ptr += kept_start
        begin, end = share_kept_blocks(
            kept_blocks_ptr, kept_by_item_ptr + kept_start,
            kept_counts_ptr + (item - index) * NUM_KV_HEADS + kv_head,
            index, num_items, num_blocks, NUM_KV_HEADS, ITEMS_PADDED, 32,
        )
    else:
        begin = index * num_blocks // num_items
        end = (index + 1) * num_blocks // num_items

    from_scores = False
    if PRUNE:
        delta = tl.load(delta_ptr + request * delta_stride)
        scanned = (seq_len >= min_context) & (delta < float("inf"))
        from_scores = scanned & (block_offset + num_blocks <= num_score_blocks)
        scores_ptr += (block_offset.to(tl.int64) * NUM_KV_HEADS + kv_head) * (GROUP * BLOCK_SIZE)
    if from_scores:
        accumulator, row_max, row_sum = attend_blocks(
            query, factor, kept_blocks_ptr, begin, end, num_blocks, seq_len, scores_ptr,
            key_ptr, residual_ptr, exponent_ptr, value_ptr, block_table_row_ptr,
            key_stride_page, key_stride_token, residual_stride_page, residual_stride_token,
            exponent_stride_page, value_stride_page, value_stride_token,
            NUM_KV_HEADS * GROUP, GROUP, GROUP_PADDED, HEAD_SIZE, HEAD_SIZE_PADDED, PAGE_SIZE,
            BLOCK_SIZE, PRUNE, True, HAS_RESIDUAL, HAS_EXPONENT, RESIDUAL_SCALE, DTYPE,
            VALUE_DTYPE, STAGES,
        )
    else:
        accumulator, row_max, row_sum = attend_blocks(
            query, factor, kept_blocks_ptr, begin, end, num_blocks, seq_len, scores_ptr,
            key_ptr, residual_ptr, exponent_ptr, value_ptr, block_table_row_ptr,
            key_stride_page, key_stride_token, residual_stride_page, residual_stride_token,
            exponent_stride_page, value_stride_page, value_stride_token,
            NUM_KV_HEADS * GROUP, GROUP, GROUP_PADDED, HEAD_SIZE, HEAD_SIZE_PADDED, PAGE_SIZE,
            BLOCK_SIZE, PRUNE, False, HAS_RESIDUAL, HAS_EXPONENT, RESIDUAL_SCALE, DTYPE,
            VALUE_DTYPE, DENSE_STAGES,
        )

    if RECORD:
        tl.atomic_add(counters_ptr, (end - begin).to(tl.int64))
        own_blocks = (index + 1) * num_blocks // num_items - index * num_blocks // num_items
        tl.atomic_add(counters_ptr + 1, own_blocks.to(tl.int64))
    heads = kv_head * GROUP + group
    mask = (group < GROUP)[:, None] & (columns < HEAD_SIZE)[None, :]
    result = accumulator / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    if num_items == 1:
        tl.store(
            output_ptr + request.to(tl.int64) * output_stride_request
            + heads[:, None] * output_stride_head + columns[None, :],
            result.to(output_ptr.dtype.element_ty),
            mask=mask,
        )
    else:
        row = item.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
        place = row[:, None] * HEAD_SIZE + columns[None, :]
        tl.store(partial_output_ptr + place, result, mask=mask)
        tl.store(partial_lse_ptr + row, row_max + tl.log2(row_sum), mask=group < GROUP)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
