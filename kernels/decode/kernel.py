"""The decode kernel: scans, attends and merges in one launch."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..cache.paged_cache import cache_of_head
from ..cache.paged_rows import load_places
from ..counters import COUNTERS
from ..counters import SHARE_UNITS as SHARE_UNITS_
from .attend import (
    attend_blocks,
    attend_runs,
    largest_scores,
    narrow,
    num_kept,
    raise_reference,
    run_tile,
)
from .early import prefetch_anchors, prefetch_tile
from .limits import span_scores
from .merge import merge_items
from .plan import load_item
from .query import load_query, query_rows, query_span, split_query
from .scan import anchor_threshold, load_anchor_pages, load_anchors, scan_blocks
from .share import anchor_masses, choose_blocks, weigh_blocks


class KernelTuning(NamedTuple):
    """How a program goes through its item: spans of a chunk and of a tile of the scan, depths of
    the pipelines, rows and items that the merge takes at a time."""

    CHUNK_BLOCKS: int
    TILE_BLOCKS: int
    SCAN_STAGES: int
    ATTEND_STAGES: int
    MERGE_ROWS: int
    MERGE_SLOTS: int


NUM_COUNTERS: tl.constexpr = tl.constexpr(len(COUNTERS))
SHARE_UNITS: tl.constexpr = tl.constexpr(SHARE_UNITS_)


@triton.jit
def count_item(
    counters_ptr, index, num_items, query_len, is_short, num_blocks, num_kept, num_drawn, left
):
    """Adds what became of a work item's blocks to a row of `new_counters`.

    The share `left` of an item stands for that of all items where the most is wanted.
    """
    num_blocks = num_blocks.to(tl.int64)
    if is_short:
        tl.atomic_add(counters_ptr + 2, num_blocks)
    else:
        units = (left * SHARE_UNITS).to(tl.int64)
        tl.atomic_add(counters_ptr, num_kept.to(tl.int64))
        tl.atomic_add(counters_ptr + 1, num_blocks)
        tl.atomic_add(counters_ptr + 3, num_drawn.to(tl.int64))
        tl.atomic_add(counters_ptr + 4, units)
        tl.atomic_max(counters_ptr + 5, tl.minimum(units * num_items // query_len, SHARE_UNITS))
        tl.atomic_add(counters_ptr + 6, tl.where(index == 0, query_len, 0).to(tl.int64))


@triton.jit(  # tables of any width, cut anywhere, share one compilation
    do_not_specialize=["block_table_stride", "layer"],
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
    limit_ptr,  # delta or tau
    limit_stride,
    scale_log2,
    min_context,
    layer,
    counters_ptr,
    PAGE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERY: tl.constexpr,
    TUNING: tl.constexpr,
    RULE: tl.constexpr,
    DTYPE: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one work item, one KV head, all query rows of its group.

    Goes through the item chunk by chunk: scans it, then attends to what it keeps. The program of
    a request and KV head that ends last merges the partial results of all of them. Items are made
    of spans; those of the rule "share" hold one or more blocks, all others are blocks themselves.
    """
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    request, index, num_items, seq_len = load_item(work_ptr, item)
    if (request | index | num_items | seq_len) < 0:  # of all, so that all are loaded at once
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    HEAD_SIZE: tl.constexpr = PAGE.HEAD_SIZE
    HEAD_SIZE_PADDED: tl.constexpr = PAGE.HEAD_SIZE_PADDED
    SPAN_SIZE: tl.constexpr = SPAN.BLOCK_SIZE
    CHUNK_BLOCKS: tl.constexpr = TUNING.CHUNK_BLOCKS
    ROWS: tl.constexpr = QUERY.ROWS
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    PRUNE: tl.constexpr = RULE != "none"
    FIND_ANCHORS: tl.constexpr = PRUNE and threshold_ptr is None
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    token, query_len = query_span(query_start_loc_ptr, request, QUERY.QUERY_LEN)
    row_tokens, row_heads, row_exists = query_rows(query_len, QUERY.GROUP, ROWS_PADDED)
    num_spans = (seq_len + SPAN_SIZE - 1) // SPAN_SIZE
    num_spans = (num_spans - index + num_items - 1) // num_items
    block_table_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    places = load_places(block_table_row_ptr, index, num_items, seq_len, SPAN, CHUNK_BLOCKS)
    cache = cache_of_head(cache, kv_head.to(tl.int64))
    anchor_pages = 0
    if FIND_ANCHORS:
        anchor_pages = load_anchor_pages(seq_len, block_table_row_ptr, PAGE.PAGE_SIZE)
    if PDL:
        if FIND_ANCHORS:
            prefetch_anchors(seq_len, anchor_pages, cache, PAGE)
        if PRUNE:
            prefetch_tile(
                places, index, num_items, seq_len, cache, PAGE, SPAN, TUNING.TILE_BLOCKS
            )
        # up to here nothing is read that the kernel ahead writes, and nothing written
        tl.extra.cuda.gdc_wait()
    rows = load_query(query, token, kv_head, query_len, columns, QUERY, PAGE)
    seen_by_all = seq_len - query_len + 1
    limits = seen_by_all + row_tokens
    # loads first, so that they wait for memory together
    if PRUNE:
        limit = tl.load(limit_ptr + request * limit_stride)
    if FIND_ANCHORS:
        anchors, anchor_scales = load_anchors(seq_len, anchor_pages, cache, PAGE)
    rows, factor = split_query(rows, scale_log2, QUERY, DTYPE)
    place = (item * QUERY.NUM_KV_HEADS + kv_head).to(tl.int64)
    scratch_ptr = scratch.scores
    if PRUNE:
        SPAN_SCORES: tl.constexpr = span_scores(
            RULE, SPAN_SIZE, BLOCK.BLOCK_SIZE, ROWS, QUERY.QUERY_LEN
        )
        scratch_ptr += place * (CHUNK_BLOCKS * SPAN_SCORES)
    if RULE == "threshold":
        delta = tl.where(seq_len < min_context, float("inf"), limit)
        if FIND_ANCHORS:
            threshold = anchor_threshold(
                rows, factor, limits, delta, seq_len, anchors, anchor_scales, QUERY, DTYPE
            )
        else:
            NUM_HEADS: tl.constexpr = QUERY.NUM_KV_HEADS * QUERY.GROUP
            row_places = (token + row_tokens) * NUM_HEADS + kv_head * QUERY.GROUP + row_heads
            threshold = tl.load(threshold_ptr + row_places, mask=row_exists, other=0.0)
            threshold = tl.where(delta == float("inf"), float("-inf"), threshold)
        # rows that pad the group never keep a block
        threshold = tl.where(row_exists, threshold, float("inf"))
    if RULE == "share":
        tau = tl.where(seq_len < min_context, 0.0, limit)
        anchor_score, anchor_mass = anchor_masses(
            rows, factor, limits, seq_len, anchors, anchor_scales, QUERY, DTYPE
        )
        nothing = tl.zeros([ROWS_PADDED], tl.float32)
        seen = (nothing, nothing, nothing, 0)

    accumulator = tl.zeros([HEAD_SIZE_PADDED, max(16, ROWS_PADDED)], tl.float32)
    TILE_TOKENS: tl.constexpr = run_tile(BLOCK) if RULE == "share" else SPAN_SIZE
    weight_sums = tl.zeros([TILE_TOKENS, ROWS_PADDED], tl.float32)
    reference = tl.full([ROWS_PADDED], float("-inf"), tl.float32)
    # What the scan finds is a reference for free, where the block that has it is kept for sure and
    # weights have room for what the residual adds.
    RAISE: tl.constexpr = (not FIND_ANCHORS) or VALUE_DTYPE == tl.float16
    num_blocks = num_spans
    total_kept = tl.zeros([], tl.int32)
    total_drawn = total_kept
    total_left = tl.zeros([], tl.float32)
    if RULE == "share":
        num_blocks = 0
    for chunk_begin in range(0, num_spans, CHUNK_BLOCKS):
        chunk_spans = tl.minimum(num_spans - chunk_begin, CHUNK_BLOCKS)
        first_span = index + chunk_begin * num_items
        next_places = load_places(
            block_table_row_ptr, first_span + CHUNK_BLOCKS * num_items, num_items, seq_len,
            SPAN, CHUNK_BLOCKS,
        )
        if RULE == "share":
            SLOTS: tl.constexpr = CHUNK_BLOCKS * (SPAN_SIZE // BLOCK.BLOCK_SIZE)
            weights_ptr = scratch_ptr + SLOTS * ROWS
            runs_ptr = (weights_ptr + SLOTS * QUERY.QUERY_LEN).to(tl.pointer_type(tl.int32))
            weigh_blocks(
                rows, factor, limits, anchor_score,
                first_span, num_items, chunk_spans, seq_len, seen_by_all, places,
                scratch_ptr, cache, PAGE, SPAN, BLOCK, QUERY, TUNING, DTYPE,
            )
            tl.debug_barrier()  # masses are written by some threads, read by others
            num_runs, seen, denominator, has_most, counts = choose_blocks(
                scratch_ptr, weights_ptr, runs_ptr, anchor_mass, seen,
                query_len, tau, layer, kv_head,
                first_span, num_items, chunk_spans, seq_len, block_table_row_ptr,
                SPAN, BLOCK, QUERY, TUNING,
            )
            num_blocks += counts[0]
            total_kept += counts[1]
            total_drawn += counts[2]
            total_left += counts[3]
            tl.debug_barrier()  # as are weights and runs
            if not RAISE:
                largest = anchor_score + tl.log2(denominator)
                if has_most:  # which may be any number of units above the anchors
                    largest = largest_scores(
                        rows, factor, limits, num_runs, seq_len, runs_ptr, cache,
                        PAGE, BLOCK, QUERY, TUNING, DTYPE,
                    )
                accumulator, weight_sums, reference = raise_reference(
                    accumulator, weight_sums, reference, largest
                )
            accumulator, weight_sums, reference = attend_runs(
                accumulator, weight_sums, reference,
                rows, factor, limits, row_tokens, num_runs, seq_len, runs_ptr, weights_ptr, cache,
                PAGE, BLOCK, QUERY, TUNING, RAISE, DTYPE, VALUE_DTYPE,
            )
        else:
            kept = tl.zeros([], tl.int64)
            kept_late = kept
            num_attended = chunk_spans
            if PRUNE:
                kept, kept_late, largest = scan_blocks(
                    rows, factor, limits, threshold,
                    first_span, num_items, chunk_spans, seq_len, seen_by_all,
                    (seq_len - query_len) // SPAN_SIZE, places,
                    scratch_ptr, cache, PAGE, BLOCK, QUERY, TUNING, DTYPE,
                )
                if not RAISE:
                    accumulator, weight_sums, reference = raise_reference(
                        accumulator, weight_sums, reference, largest
                    )
                num_attended = num_kept(kept, kept_late)
                tl.debug_barrier()  # scores are written by some threads, read by others
            accumulator, weight_sums, reference = attend_blocks(
                accumulator, weight_sums, reference,
                rows, factor, limits, kept, kept_late, num_attended,
                first_span, num_items, seq_len, places, scratch_ptr, cache,
                PAGE, BLOCK, QUERY, TUNING, PRUNE, RAISE, DTYPE, VALUE_DTYPE,
            )
            total_kept += num_attended
        places = next_places
        if PRUNE:
            tl.debug_barrier()  # before the next chunk's scores take their place

    if counters_ptr is not None:
        counters_ptr += kv_head * NUM_COUNTERS
        is_short = seq_len < min_context
        count_item(
            counters_ptr, index, num_items, query_len, is_short,
            num_blocks, total_kept, total_drawn, total_left,
        )
    row_sum = tl.sum(weight_sums, axis=0)
    result = tl.trans(narrow(accumulator, HEAD_SIZE_PADDED, ROWS_PADDED))
    result /= tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    mask = row_exists[:, None] & (columns < HEAD_SIZE)[None, :]
    if num_items == 1:
        output_place = (token + row_tokens) * output.stride_token
        output_place += (kv_head * QUERY.GROUP + row_heads) * output.stride_head
        tl.store(
            output.pointer + output_place[:, None] + columns[None, :],
            result.to(output.pointer.dtype.element_ty),
            mask=mask,
        )
    else:
        partial_rows = place * ROWS + tl.arange(0, ROWS_PADDED)
        partial_output = scratch.partial_output + partial_rows[:, None] * HEAD_SIZE
        tl.store(partial_output + columns[None, :], result, mask=mask)
        lse = reference + tl.log2(row_sum)
        tl.store(scratch.partial_lse + partial_rows, lse, mask=row_exists)
        tl.debug_barrier()  # all threads' results are written before one of them says so
        arrivals_ptr += request * QUERY.NUM_KV_HEADS + kv_head
        arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
        if arrived == num_items - 1:
            first_row = (place - index.to(tl.int64) * QUERY.NUM_KV_HEADS) * ROWS
            merge_items(
                output, token, kv_head, query_len,
                scratch.partial_output + first_row * HEAD_SIZE, scratch.partial_lse + first_row,
                num_items, PAGE, QUERY, TUNING.MERGE_ROWS, TUNING.MERGE_SLOTS,
            )
            tl.store(arrivals_ptr, 0)  # for the next launch
