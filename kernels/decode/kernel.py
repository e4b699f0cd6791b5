"""The decode kernel: scans, attends and merges in one launch."""

import triton
import triton.language as tl

from ..cache.paged_rows import load_places
from .attend import attend_blocks, narrow, num_kept, raise_reference
from .early import prefetch_scan
from .merge import merge_items
from .plan import load_item
from .query import load_query, query_rows, query_span, split_query
from .scan import anchor_threshold, load_anchor_pages, load_anchors, scan_blocks


@triton.jit
def decode_kernel(
    output_ptr,
    partial_output_ptr,
    partial_lse_ptr,
    scores_ptr,
    arrivals_ptr,
    counters_ptr,
    query_ptr,
    key_ptr,
    residual_ptr,
    exponent_ptr,
    value_ptr,
    value_exponent_ptr,
    block_table_ptr,
    work_ptr,
    query_start_loc_ptr,
    threshold_ptr,
    delta_ptr,
    scale_log2,
    min_context,
    delta_stride,
    query_stride_token,
    query_stride_head,
    output_stride_token,
    output_stride_head,
    block_table_stride,
    key_stride_page,
    key_stride_head,
    residual_stride_page,
    residual_stride_head,
    exponent_stride_page,
    exponent_stride_head,
    value_stride_page,
    value_stride_head,
    value_exponent_stride_page,
    value_exponent_stride_head,
    KEY_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    WHOLE_PAGES: tl.constexpr,
    ANCHOR_TOKENS: tl.constexpr,
    PRUNE: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_EXPONENT: tl.constexpr,
    HAS_VALUE_EXPONENT: tl.constexpr,
    RESIDUAL_SCALE: tl.constexpr,
    RECORD: tl.constexpr,
    DTYPE: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    SCAN_STAGES: tl.constexpr,
    ATTEND_STAGES: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one work item, one KV head, all query rows of its group.

    Goes through the item chunk by chunk: scans it, then attends to what it keeps. The program of
    a request and KV head that ends last merges the partial results of all of them.
    """
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    request, index, num_items, seq_len = load_item(work_ptr, item)
    if (request | index | num_items | seq_len) < 0:  # of all, so that all are loaded at once
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    ROWS: tl.constexpr = GROUP * QUERY_LEN
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    token, query_len = query_span(query_start_loc_ptr, request, QUERY_LEN)
    row_tokens, row_heads, row_exists = query_rows(query_len, GROUP, ROWS_PADDED)
    first_head = kv_head * GROUP
    output_place = (token + row_tokens) * output_stride_token
    output_place += (first_head + row_heads) * output_stride_head
    num_blocks = (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    num_blocks = (num_blocks - index + num_items - 1) // num_items
    block_table_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    places = load_places(
        block_table_row_ptr, index, num_items, seq_len, PAGE_SIZE, BLOCK_SIZE, UNIT, CHUNK_BLOCKS
    )
    key_ptr += kv_head.to(tl.int64) * key_stride_head
    value_ptr += kv_head.to(tl.int64) * value_stride_head
    if HAS_RESIDUAL:
        residual_ptr += kv_head.to(tl.int64) * residual_stride_head
    if HAS_EXPONENT:
        exponent_ptr += kv_head.to(tl.int64) * exponent_stride_head
    if HAS_VALUE_EXPONENT:
        value_exponent_ptr += kv_head.to(tl.int64) * value_exponent_stride_head
    FIND_THRESHOLD: tl.constexpr = PRUNE and not HAS_THRESHOLD
    anchor_pages = 0
    if FIND_THRESHOLD:
        anchor_pages = load_anchor_pages(seq_len, block_table_row_ptr, PAGE_SIZE, ANCHOR_TOKENS)
    if PDL:
        if PRUNE:
            prefetch_scan(
                places, index, num_items, seq_len, anchor_pages, key_ptr, exponent_ptr,
                key_stride_page, exponent_stride_page,
                KEY_STRIDE, HEAD_SIZE, PAGE_SIZE, BLOCK_SIZE, UNIT, TILE_BLOCKS, ANCHOR_TOKENS,
                FIND_THRESHOLD, HAS_EXPONENT,
            )
        # up to here nothing is read that the kernel ahead writes, and nothing written
        tl.extra.cuda.gdc_wait()
    query = load_query(
        query_ptr + token * query_stride_token + first_head * query_stride_head,
        query_stride_token, query_stride_head, query_len, columns,
        GROUP, ROWS_PADDED, HEAD_SIZE, PARTS,
    )
    seen_by_all = seq_len - query_len + 1
    limits = seen_by_all + row_tokens
    # loads first, so that they wait for memory together
    if PRUNE:
        delta = tl.load(delta_ptr + request * delta_stride)
    if FIND_THRESHOLD:
        anchors, anchor_scales = load_anchors(
            seq_len, anchor_pages, key_ptr, exponent_ptr, key_stride_page, exponent_stride_page,
            KEY_STRIDE, HEAD_SIZE, HEAD_SIZE_PADDED, PAGE_SIZE, ANCHOR_TOKENS, HAS_EXPONENT,
        )
    query, factor = split_query(query, scale_log2, ROWS_PADDED, PARTS, DTYPE)
    place = (item * NUM_KV_HEADS + kv_head).to(tl.int64)
    newest_block = (seq_len - query_len) // BLOCK_SIZE
    if PRUNE:
        scores_ptr += place * (CHUNK_BLOCKS * BLOCK_SIZE * ROWS)
        delta = tl.where(seq_len < min_context, float("inf"), delta)
        if FIND_THRESHOLD:
            threshold = anchor_threshold(
                query, factor, limits, delta, seq_len, anchors, anchor_scales,
                ROWS_PADDED, ANCHOR_TOKENS, PARTS, DTYPE,
            )
        else:
            threshold = tl.load(
                threshold_ptr + (token + row_tokens) * (NUM_KV_HEADS * GROUP)
                + first_head + row_heads,
                mask=row_exists, other=0.0,
            )
            threshold = tl.where(delta == float("inf"), float("-inf"), threshold)
        # rows that pad the group never keep a block
        threshold = tl.where(row_exists, threshold, float("inf"))

    accumulator = tl.zeros([HEAD_SIZE_PADDED, max(16, ROWS_PADDED)], tl.float32)
    weight_sums = tl.zeros([BLOCK_SIZE, ROWS_PADDED], tl.float32)
    reference = tl.full([ROWS_PADDED], float("-inf"), tl.float32)
    # The scan's maximum is a reference for free, where the block that has it is kept for sure and
    # weights have room for what the residual adds.
    RAISE: tl.constexpr = (not PRUNE) or HAS_THRESHOLD or VALUE_DTYPE == tl.float16
    total_kept = 0
    for chunk_begin in range(0, num_blocks, CHUNK_BLOCKS):
        chunk_blocks = tl.minimum(num_blocks - chunk_begin, CHUNK_BLOCKS)
        first_block = index + chunk_begin * num_items
        next_places = load_places(
            block_table_row_ptr, first_block + CHUNK_BLOCKS * num_items, num_items, seq_len,
            PAGE_SIZE, BLOCK_SIZE, UNIT, CHUNK_BLOCKS,
        )
        kept = tl.zeros([], tl.int64)
        kept_late = kept
        num_attended = chunk_blocks
        if PRUNE:
            kept, kept_late, largest = scan_blocks(
                query, factor, limits, threshold,
                first_block, num_items, chunk_blocks, seq_len, seen_by_all, newest_block, places,
                scores_ptr, key_ptr, exponent_ptr, key_stride_page, exponent_stride_page,
                KEY_STRIDE, ROWS, ROWS_PADDED, HEAD_SIZE, HEAD_SIZE_PADDED, PAGE_SIZE, BLOCK_SIZE,
                UNIT, CHUNK_BLOCKS, TILE_BLOCKS, WHOLE_PAGES, PARTS, HAS_EXPONENT,
                DTYPE, SCAN_STAGES,
            )
            if not RAISE:
                accumulator, weight_sums, reference = raise_reference(
                    accumulator, weight_sums, reference, largest
                )
            num_attended = num_kept(kept, kept_late)
            tl.debug_barrier()  # scores are written by some threads, read by others
        accumulator, weight_sums, reference = attend_blocks(
            accumulator, weight_sums, reference,
            query, factor, limits, kept, kept_late, num_attended,
            first_block, num_items, seq_len, places, scores_ptr,
            key_ptr, residual_ptr, exponent_ptr, value_ptr, value_exponent_ptr,
            key_stride_page, residual_stride_page, exponent_stride_page, value_stride_page,
            value_exponent_stride_page,
            KEY_STRIDE, RESIDUAL_STRIDE, VALUE_STRIDE,
            ROWS, ROWS_PADDED, HEAD_SIZE, HEAD_SIZE_PADDED, PAGE_SIZE, BLOCK_SIZE, UNIT,
            WHOLE_PAGES, PARTS, PRUNE, RAISE, HAS_RESIDUAL, HAS_EXPONENT, HAS_VALUE_EXPONENT,
            RESIDUAL_SCALE, DTYPE, VALUE_DTYPE, ATTEND_STAGES,
        )
        total_kept += num_attended
        places = next_places
        if PRUNE:
            tl.debug_barrier()  # before the next chunk's scores take their place

    if RECORD:
        tl.atomic_add(counters_ptr, total_kept.to(tl.int64))
        tl.atomic_add(counters_ptr + 1, num_blocks.to(tl.int64))
    row_sum = tl.sum(weight_sums, axis=0)
    result = tl.trans(narrow(accumulator, HEAD_SIZE_PADDED, ROWS_PADDED))
    result /= tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    mask = row_exists[:, None] & (columns < HEAD_SIZE)[None, :]
    if num_items == 1:
        tl.store(
            output_ptr + output_place[:, None] + columns[None, :],
            result.to(output_ptr.dtype.element_ty),
            mask=mask,
        )
    else:
        rows = tl.arange(0, ROWS_PADDED)
        tl.store(
            partial_output_ptr + place * (ROWS * HEAD_SIZE)
            + rows[:, None] * HEAD_SIZE + columns[None, :],
            result,
            mask=mask,
        )
        lse = reference + tl.log2(row_sum)
        tl.store(partial_lse_ptr + place * ROWS + rows, lse, mask=row_exists)
        tl.debug_barrier()  # all threads' results are written before one of them says so
        arrivals_ptr += request * NUM_KV_HEADS + kv_head
        arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
        if arrived == num_items - 1:
            first_place = place - index.to(tl.int64) * NUM_KV_HEADS
            merge_items(
                output_ptr + token * output_stride_token + first_head * output_stride_head,
                partial_output_ptr + first_place * (ROWS * HEAD_SIZE),
                partial_lse_ptr + first_place * ROWS, num_items,
                NUM_KV_HEADS * ROWS * HEAD_SIZE, NUM_KV_HEADS * ROWS,
                output_stride_token, output_stride_head, query_len,
                GROUP, HEAD_SIZE, HEAD_SIZE_PADDED, MERGE_ROWS, MERGE_SLOTS,
            )
            tl.store(arrivals_ptr, 0)  # for the next launch
