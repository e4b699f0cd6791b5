"""The decode kernel: scans, attends and merges in one launch."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..cache.paged_cache import cache_of_head
from ..cache.paged_rows import load_places
from .attend import attend_blocks, begin_softmax, num_kept, raise_reference
from .early import prefetch_anchors, prefetch_tile
from .merge import count_item, leave_result, merge_results, smaller_blocks
from .plan import load_item
from .query import load_query, load_sinks, query_rows, query_span, split_query
from .scan import anchor_threshold, load_anchor_pages, load_anchors, scan_blocks
from .soft_cap import cap_scores, uncapped


class KernelTuning(NamedTuple):
    """How a program goes through its item: blocks of a chunk and of a tile of the scan (spans of
    blocks where these are weighed), depths of the pipelines, rows and items that the merge takes
    at a time, programs that share an item while its blocks are weighed."""

    CHUNK_BLOCKS: int
    TILE_BLOCKS: int
    SCAN_STAGES: int
    ATTEND_STAGES: int
    MERGE_ROWS: int
    MERGE_SLOTS: int
    WEIGH_PARTS: int


@triton.jit(  # tables of any width, cut anywhere, share one compilation
    do_not_specialize=["block_table_stride"],
    do_not_specialize_on_alignment=["block_table_ptr", "query_start_loc_ptr"],
)
def decode_kernel(
    output,  # of `head_rows`, as `query`
    scratch,  # a DecodeScratch
    work_ptr,
    arrivals_ptr,
    query,
    cache,  # of `paged_cache`
    block_table_ptr,
    block_table_stride,
    query_start_loc_ptr,
    threshold_ptr,  # None: every program finds it
    sinks_ptr,
    limit_ptr,  # delta
    limit_stride,
    scale_log2,
    soft_cap,  # of scores, log2 units; None: none
    min_context,
    counters_ptr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERY: tl.constexpr,
    TUNING: tl.constexpr,
    COUNTED: tl.constexpr,
    PRUNE: tl.constexpr,
    DTYPE: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one work item, one KV head, all query rows of its group.

    Goes through the item chunk by chunk: scans it, then attends to what it keeps. The program of
    a request and KV head that ends last merges the partial results of all of them. What is counted
    are blocks of COUNTED tokens, which are smaller than BLOCK's only where nothing is pruned.
    """
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    request, index, num_items, seq_len = load_item(work_ptr, item)
    if (request | index | num_items | seq_len) < 0:  # of all, so that all are loaded at once
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    HEAD_SIZE_PADDED: tl.constexpr = PAGE.HEAD_SIZE_PADDED
    BLOCK_SIZE: tl.constexpr = BLOCK.BLOCK_SIZE
    CHUNK_BLOCKS: tl.constexpr = TUNING.CHUNK_BLOCKS
    ROWS: tl.constexpr = QUERY.ROWS
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    FIND_ANCHORS: tl.constexpr = PRUNE and threshold_ptr is None
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    token, query_len = query_span(query_start_loc_ptr, request, QUERY.QUERY_LEN)
    row_tokens, row_heads, row_exists = query_rows(query_len, QUERY.GROUP, ROWS_PADDED)
    num_blocks = (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    num_blocks = (num_blocks - index + num_items - 1) // num_items
    block_table_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    places = load_places(block_table_row_ptr, index, num_items, seq_len, BLOCK, CHUNK_BLOCKS)
    cache = cache_of_head(cache, kv_head.to(tl.int64))
    anchor_pages = 0
    if FIND_ANCHORS:
        anchor_pages = load_anchor_pages(seq_len, block_table_row_ptr, PAGE.PAGE_SIZE)
    if PDL:
        if FIND_ANCHORS:
            prefetch_anchors(seq_len, anchor_pages, cache, PAGE)
        if PRUNE:
            prefetch_tile(
                places, index, num_items, seq_len, cache, PAGE, BLOCK, TUNING.TILE_BLOCKS
            )
        # up to here nothing is read that the kernel ahead writes, and nothing written
        tl.extra.cuda.gdc_wait()
    rows = load_query(query, token, kv_head, query_len, columns, QUERY, PAGE, QUERY.PARTS)
    sinks = load_sinks(sinks_ptr, kv_head, row_heads, row_exists, QUERY)
    seen_by_all = seq_len - query_len + 1
    limits = seen_by_all + row_tokens
    # loads first, so that they wait for memory together
    if PRUNE:
        limit = tl.load(limit_ptr + request * limit_stride)
    if FIND_ANCHORS:
        anchors, anchor_scales = load_anchors(seq_len, anchor_pages, cache, PAGE)
    rows, factor = split_query(rows, scale_log2, QUERY, DTYPE)
    place = (item * QUERY.NUM_KV_HEADS + kv_head).to(tl.int64)
    scores_ptr = scratch.scores
    if PRUNE:
        scores_ptr += place * (CHUNK_BLOCKS * BLOCK_SIZE * ROWS)
        delta = tl.where(seq_len < min_context, float("inf"), limit)
        if FIND_ANCHORS:
            threshold = anchor_threshold(
                rows, factor, soft_cap, limits, delta, seq_len, anchors, anchor_scales,
                QUERY, DTYPE,
            )
        else:
            NUM_HEADS: tl.constexpr = QUERY.NUM_KV_HEADS * QUERY.GROUP
            row_places = (token + row_tokens) * NUM_HEADS + kv_head * QUERY.GROUP + row_heads
            threshold = tl.load(threshold_ptr + row_places, mask=row_exists, other=0.0)
            threshold = tl.where(delta == float("inf"), float("-inf"), threshold)
        if sinks_ptr is not None:
            threshold = tl.maximum(threshold, sinks - delta)
        threshold = uncapped(threshold, soft_cap)
        # rows that pad the group never keep a block
        threshold = tl.where(row_exists, threshold, float("inf"))

    accumulator, weight_sums, reference = begin_softmax(
        sinks, index == 0, sinks_ptr is not None, BLOCK_SIZE, HEAD_SIZE_PADDED
    )
    # What the scan finds is a reference for free, where the block that has it is kept for sure and
    # weights have room for what the residual adds.
    RAISE: tl.constexpr = (not FIND_ANCHORS) or VALUE_DTYPE == tl.float16
    total_kept = tl.zeros([], tl.int32)
    for chunk_begin in range(0, num_blocks, CHUNK_BLOCKS):
        chunk_blocks = tl.minimum(num_blocks - chunk_begin, CHUNK_BLOCKS)
        first_block = index + chunk_begin * num_items
        next_places = load_places(
            block_table_row_ptr, first_block + CHUNK_BLOCKS * num_items, num_items, seq_len,
            BLOCK, CHUNK_BLOCKS,
        )
        kept = tl.zeros([], tl.int64)
        kept_late = kept
        num_attended = chunk_blocks
        if PRUNE:
            kept, kept_late, largest = scan_blocks(
                rows, factor, limits, threshold,
                first_block, num_items, chunk_blocks, seq_len, seen_by_all,
                (seq_len - query_len) // BLOCK_SIZE, places,
                scores_ptr, cache, PAGE, BLOCK, QUERY, TUNING, DTYPE,
            )
            if not RAISE:
                accumulator, weight_sums, reference = raise_reference(
                    accumulator, weight_sums, reference, cap_scores(largest, soft_cap)
                )
            num_attended = num_kept(kept, kept_late)
            tl.debug_barrier()  # scores are written by some threads, read by others
        accumulator, weight_sums, reference = attend_blocks(
            accumulator, weight_sums, reference,
            rows, factor, soft_cap, limits, kept, kept_late, num_attended,
            first_block, num_items, seq_len, places, scores_ptr, cache,
            PAGE, BLOCK, QUERY, TUNING, PRUNE, RAISE, DTYPE, VALUE_DTYPE,
        )
        total_kept += num_attended
        places = next_places
        if PRUNE:
            tl.debug_barrier()  # before the next chunk's scores take their place

    is_last = leave_result(
        accumulator, weight_sums, reference,
        output, scratch, arrivals_ptr, 0, request, index, num_items, item, kv_head, token,
        query_len, PAGE, QUERY,
    )
    if counters_ptr is not None:  # here nobody waits for it
        if COUNTED != BLOCK_SIZE:
            num_blocks = smaller_blocks(seq_len, index, num_items, BLOCK_SIZE, COUNTED)
            total_kept = num_blocks
        count_item(
            counters_ptr, kv_head, index, num_items, query_len, seq_len < min_context,
            num_blocks, total_kept, tl.zeros([], tl.int32), tl.zeros([], tl.float32),
        )
    if is_last:
        merge_results(
            output, scratch, arrivals_ptr, request, index, num_items, item, kv_head, token,
            query_len, PAGE, QUERY, TUNING,
        )
