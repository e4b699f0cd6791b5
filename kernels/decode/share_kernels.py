"""The decode kernels by share: one weighs all blocks, one draws, attends and merges."""

import triton
import triton.language as tl

from ..cache.paged_cache import cache_of_head
from ..cache.paged_rows import load_places
from .attend import attend_runs, begin_softmax, largest_scores, raise_reference, run_tile
from .code_scan import encode_new_runs, load_query_words, num_coded_runs, weigh_codes
from .early import prefetch_anchors, prefetch_tile
from .limits import list_numbers
from .merge import count_item, hand_over
from .plan import load_item
from .query import load_query, load_sinks, query_rows, query_span, split_query
from .scan import anchor_scores, load_anchor_pages, load_anchors
from .share import MOST_MASS, choose_blocks, weigh_blocks
from .soft_cap import cap_scores


@triton.jit
def masses_of_item(
    scratch, mass_place, kv_head, num_spans, QUERY: tl.constexpr, BLOCKS: tl.constexpr
):
    """Where the masses of an item of up to `num_spans` spans of BLOCKS blocks lie (see
    `DecodeScratch`), and the stride from row to row."""
    stride = num_spans * BLOCKS
    first = (mass_place.to(tl.int64) * QUERY.NUM_KV_HEADS + kv_head * num_spans) * BLOCKS
    return scratch.masses + first * QUERY.ROWS, stride


@triton.jit
def sums_of_items(scratch, items, kv_head, QUERY: tl.constexpr):
    """Pointers to what `weigh_kernel` says of `items`, or parts of them, for row 0: the sum of all
    masses, and the score that they are relative to."""
    sums_ptr = scratch.sums + (items * (2 * QUERY.NUM_KV_HEADS) + kv_head) * QUERY.ROWS
    return sums_ptr, sums_ptr + QUERY.NUM_KV_HEADS * QUERY.ROWS


@triton.jit(  # as `decode_kernel`
    do_not_specialize=["block_table_stride", "num_reqs"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_start_loc_ptr"],
)
def weigh_kernel(
    scratch,  # a DecodeScratch
    work_ptr,
    mass_places_ptr,
    seq_lens_ptr,
    num_reqs,
    query,  # of `head_rows`
    cache,  # of `paged_cache`
    block_table_ptr,
    block_table_stride,
    query_start_loc_ptr,
    limit_ptr,  # tau
    limit_stride,
    scale_log2,
    soft_cap,  # of scores, log2 units; None: none
    min_context,
    PAGE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERY: tl.constexpr,
    TUNING: tl.constexpr,
    CODES: tl.constexpr,  # a CodeScan; None: keys have no codes
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: the masses of all blocks of a work item, or of every WEIGH_PARTS-th span of it,
    for a KV head and all query rows of its group, relative to the best score of the request's first
    and last tokens.

    By codes, where there are any; by the base, those of the newest tokens. The first ENCODERS
    programs write the codes of keys that are complete now, for the steps after this one. Nothing is
    weighed where all blocks are read anyway.
    """
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    if CODES is not None:
        if program < CODES.ENCODERS:
            if PDL:
                tl.extra.cuda.gdc_wait()
                tl.extra.cuda.gdc_launch_dependents()
            encode_new_runs(
                program, block_table_ptr, block_table_stride, seq_lens_ptr, num_reqs,
                query_start_loc_ptr, cache_of_head(cache, kv_head.to(tl.int64)), PAGE, QUERY, CODES,
            )
            return
        program -= CODES.ENCODERS
    PARTS: tl.constexpr = TUNING.WEIGH_PARTS
    item, part = program // PARTS, program % PARTS
    request, index, num_items, seq_len = load_item(work_ptr, item)
    mass_place = tl.load(mass_places_ptr + item)
    if (request | index | num_items | seq_len) < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    SPAN_SIZE: tl.constexpr = SPAN.BLOCK_SIZE
    CHUNK_SPANS: tl.constexpr = TUNING.CHUNK_BLOCKS
    BLOCKS: tl.constexpr = SPAN_SIZE // BLOCK.BLOCK_SIZE
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    columns = tl.arange(0, PAGE.HEAD_SIZE_PADDED)
    item_spans = tl.cdiv(tl.cdiv(seq_len, SPAN_SIZE), num_items)
    index += part * num_items
    num_items *= PARTS
    token, query_len = query_span(query_start_loc_ptr, request, QUERY.QUERY_LEN)
    row_tokens, _, _ = query_rows(query_len, QUERY.GROUP, ROWS_PADDED)
    request_spans = (seq_len + SPAN_SIZE - 1) // SPAN_SIZE
    num_spans = (request_spans - index + num_items - 1) // num_items
    block_table_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    seen_by_all = seq_len - query_len + 1
    num_coded = tl.zeros([], tl.int32)
    if CODES is not None:
        request_coded = num_coded_runs(seen_by_all, CODES.LAG)
        num_coded = tl.maximum(request_coded - index + num_items - 1, 0) // num_items
        code_places = load_places(
            block_table_row_ptr, index, num_items, seq_len, SPAN, CODES.CHUNK_RUNS
        )
    first_span = index + num_coded * num_items
    places = load_places(block_table_row_ptr, first_span, num_items, seq_len, SPAN, CHUNK_SPANS)
    cache = cache_of_head(cache, kv_head.to(tl.int64))
    anchor_pages = load_anchor_pages(seq_len, block_table_row_ptr, PAGE.PAGE_SIZE)
    if PDL:
        prefetch_anchors(seq_len, anchor_pages, cache, PAGE)
        prefetch_tile(
            places, first_span, num_items, seq_len, cache, PAGE, SPAN, TUNING.TILE_BLOCKS
        )
        # up to here nothing is read that the kernel ahead writes, and nothing written
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows = load_query(query, token, kv_head, query_len, columns, QUERY, PAGE, QUERY.PARTS)
    limits = seen_by_all + row_tokens
    tau = tl.load(limit_ptr + request * limit_stride)
    anchors, anchor_scales = load_anchors(seq_len, anchor_pages, cache, PAGE)
    rows, factor = split_query(rows, scale_log2, QUERY, DTYPE)
    scores = anchor_scores(
        rows, factor, limits, seq_len, anchors, anchor_scales, QUERY, DTYPE
    )
    reference = cap_scores(tl.max(scores, axis=0), soft_cap)
    reads_all = (seq_len < min_context) | (tau <= 0) | (mass_place < 0)
    num_spans = tl.where(reads_all, 0, num_spans)
    masses_ptr, stride = masses_of_item(
        scratch, mass_place, kv_head, item_spans, QUERY, BLOCKS
    )
    masses_ptr += part * BLOCKS
    sums = tl.zeros([ROWS_PADDED], tl.float32)
    if CODES is not None:
        num_coded = tl.minimum(num_coded, num_spans)
        query_words, code_factor = load_query_words(
            query, token, kv_head, query_len, scale_log2, QUERY, PAGE
        )
        for chunk_begin in range(0, num_coded, CODES.CHUNK_RUNS):
            next_places = load_places(
                block_table_row_ptr, index + (chunk_begin + CODES.CHUNK_RUNS) * num_items,
                num_items, seq_len, SPAN, CODES.CHUNK_RUNS,
            )
            sums += weigh_codes(
                query_words, code_factor, soft_cap, reference,
                tl.minimum(num_coded - chunk_begin, CODES.CHUNK_RUNS), code_places,
                masses_ptr + chunk_begin * (PARTS * BLOCKS), stride, cache,
                PAGE, BLOCK, QUERY, TUNING, CODES.STAGES,
            )
            code_places = next_places
    for chunk_begin in range(num_coded, num_spans, CHUNK_SPANS):
        first_span = index + chunk_begin * num_items
        next_places = load_places(
            block_table_row_ptr, first_span + CHUNK_SPANS * num_items, num_items, seq_len,
            SPAN, CHUNK_SPANS,
        )
        sums += weigh_blocks(
            rows, factor, soft_cap, limits, reference,
            first_span, num_items, tl.minimum(num_spans - chunk_begin, CHUNK_SPANS), seq_len,
            seen_by_all, places, masses_ptr + chunk_begin * (PARTS * BLOCKS), stride, cache,
            PAGE, SPAN, BLOCK, QUERY, TUNING, DTYPE,
        )
        places = next_places
    sums_ptr, references_ptr = sums_of_items(scratch, item * PARTS + part, kv_head, QUERY)
    row_places = tl.arange(0, ROWS_PADDED)
    tl.store(sums_ptr + row_places, sums, mask=row_places < QUERY.ROWS)
    tl.store(references_ptr + row_places, reference, mask=row_places < QUERY.ROWS)


@triton.jit
def add_up_sums(scratch, first_item, num_items, kv_head, QUERY: tl.constexpr):
    """The denominators of a request's rows, float32 `[ROWS_PADDED]`: the sums of its items, or
    their parts, always in the same order."""
    ITEMS: tl.constexpr = 64  # at a time: more would be registers, fewer waits
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    items = tl.arange(0, ITEMS)
    rows = tl.arange(0, ROWS_PADDED)[None, :]
    sums = tl.zeros([ITEMS, ROWS_PADDED], tl.float32)
    for begin in range(0, num_items, ITEMS):
        exists = (begin + items < num_items)[:, None] & (rows < QUERY.ROWS)
        sums_ptr, _ = sums_of_items(scratch, first_item + begin + items, kv_head, QUERY)
        sums += tl.load(sums_ptr[:, None] + rows, mask=exists, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit(
    do_not_specialize=["block_table_stride", "layer"],
    do_not_specialize_on_alignment=["block_table_ptr", "query_start_loc_ptr"],
)
def draw_kernel(
    output,  # of `head_rows`, as `query`
    scratch,
    work_ptr,
    mass_places_ptr,
    arrivals_ptr,
    query,
    cache,
    block_table_ptr,
    block_table_stride,
    query_start_loc_ptr,
    sinks_ptr,
    limit_ptr,
    limit_stride,
    scale_log2,
    soft_cap,
    min_context,
    layer,
    counters_ptr,
    PAGE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERY: tl.constexpr,
    TUNING: tl.constexpr,
    DTYPE: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one work item, one KV head, all query rows of its group.

    Draws blocks by the masses of `weigh_kernel`, chunk by chunk, and attends to them. The program
    of a request and KV head that ends last merges the partial results of all of them.
    """
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    request, index, num_items, seq_len = load_item(work_ptr, item)
    mass_place = tl.load(mass_places_ptr + item)
    if (request | index | num_items | seq_len) < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    HEAD_SIZE_PADDED: tl.constexpr = PAGE.HEAD_SIZE_PADDED
    SPAN_SIZE: tl.constexpr = SPAN.BLOCK_SIZE
    CHUNK_SPANS: tl.constexpr = TUNING.CHUNK_BLOCKS
    BLOCKS: tl.constexpr = SPAN_SIZE // BLOCK.BLOCK_SIZE
    SLOTS: tl.constexpr = CHUNK_SPANS * BLOCKS
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    token, query_len = query_span(query_start_loc_ptr, request, QUERY.QUERY_LEN)
    row_tokens, row_heads, row_exists = query_rows(query_len, QUERY.GROUP, ROWS_PADDED)
    sinks = load_sinks(sinks_ptr, kv_head, row_heads, row_exists, QUERY)
    request_spans = (seq_len + SPAN_SIZE - 1) // SPAN_SIZE
    num_spans = (request_spans - index + num_items - 1) // num_items
    block_table_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    cache = cache_of_head(cache, kv_head.to(tl.int64))
    limits = seq_len - query_len + 1 + row_tokens
    tau = tl.load(limit_ptr + request * limit_stride)
    tau = tl.where((seq_len < min_context) | (mass_place < 0), 0.0, tau)
    rows = load_query(query, token, kv_head, query_len, columns, QUERY, PAGE, QUERY.PARTS)
    rows, factor = split_query(rows, scale_log2, QUERY, DTYPE)
    if PDL:
        # what `weigh_kernel` writes; what kernels before it wrote is there already
        tl.extra.cuda.gdc_wait()
    PARTS: tl.constexpr = TUNING.WEIGH_PARTS
    num_sums = tl.where(tau > 0, num_items * PARTS, 0)
    denominators = add_up_sums(scratch, (item - index) * PARTS, num_sums, kv_head, QUERY)
    _, references_ptr = sums_of_items(scratch, item * PARTS, kv_head, QUERY)
    row_places = tl.arange(0, ROWS_PADDED)
    anchor_score = tl.load(references_ptr + row_places, mask=row_places < QUERY.ROWS, other=0.0)
    if sinks_ptr is not None:
        denominators += tl.minimum(tl.exp2(sinks - anchor_score), MOST_MASS)
    masses_ptr, stride = masses_of_item(
        scratch, mass_place, kv_head, (request_spans + num_items - 1) // num_items, QUERY, BLOCKS
    )
    place = (item * QUERY.NUM_KV_HEADS + kv_head).to(tl.int64)
    LIST: tl.constexpr = list_numbers(SPAN_SIZE, BLOCK.BLOCK_SIZE, QUERY.QUERY_LEN)
    weights_ptr = scratch.scores + place * (CHUNK_SPANS * LIST)
    runs_ptr = (weights_ptr + SLOTS * QUERY.QUERY_LEN).to(tl.pointer_type(tl.int32))

    accumulator, weight_sums, reference = begin_softmax(
        sinks, index == 0, sinks_ptr is not None, run_tile(BLOCK), HEAD_SIZE_PADDED
    )
    # no score is above the denominator, and bfloat16 weights have room for what the residual adds
    RAISE: tl.constexpr = VALUE_DTYPE == tl.float16
    num_blocks = tl.zeros([], tl.int32)
    num_read = num_blocks
    num_drawn = num_blocks
    left = tl.zeros([], tl.float32)
    for chunk_begin in range(0, num_spans, CHUNK_SPANS):
        num_runs, has_most, counts = choose_blocks(
            masses_ptr + chunk_begin * BLOCKS, stride, weights_ptr, runs_ptr, denominators,
            query_len, tau, layer, kv_head, index + chunk_begin * num_items, num_items,
            tl.minimum(num_spans - chunk_begin, CHUNK_SPANS), seq_len, block_table_row_ptr,
            SPAN, BLOCK, QUERY, TUNING,
        )
        num_blocks += counts[0]
        num_read += counts[1]
        num_drawn += counts[2]
        left += counts[3]
        tl.debug_barrier()  # weights and runs are written by some threads, read by others
        if not RAISE:
            largest = anchor_score + tl.log2(denominators)
            if has_most:  # which may be any number of units above it
                largest = largest_scores(
                    rows, factor, limits, num_runs, seq_len, runs_ptr, cache,
                    PAGE, BLOCK, QUERY, TUNING, DTYPE,
                )
                largest = cap_scores(largest, soft_cap)
            accumulator, weight_sums, reference = raise_reference(
                accumulator, weight_sums, reference, largest
            )
        accumulator, weight_sums, reference = attend_runs(
            accumulator, weight_sums, reference,
            rows, factor, soft_cap, limits, row_tokens, num_runs, seq_len, runs_ptr, weights_ptr,
            cache,
            PAGE, BLOCK, QUERY, TUNING, RAISE, DTYPE, VALUE_DTYPE,
        )
        tl.debug_barrier()  # before the next chunk's take their place

    if counters_ptr is not None:
        count_item(
            counters_ptr, kv_head, index, num_items, query_len, seq_len < min_context,
            num_blocks, num_read, num_drawn, left,
        )
    hand_over(
        accumulator, weight_sums, reference,
        output, scratch, arrivals_ptr, request, index, num_items, item, kv_head, token, query_len,
        PAGE, QUERY, TUNING.MERGE_ROWS, TUNING.MERGE_SLOTS,
    )
