"""The first decode kernel by share: weighs all blocks, and has codes of new keys written."""

import triton
import triton.language as tl

from ..cache.paged_cache import cache_of_head
from ..cache.paged_rows import load_places
from .code_scan import (
    ENCODERS,
    encode_new_runs,
    load_query_words,
    num_coded_runs,
    prefetch_codes,
    weigh_codes,
)
from .early import prefetch_anchors, prefetch_tile
from .plan import load_item
from .query import load_query, query_rows, query_span, split_query
from .scan import anchor_scores, load_anchor_pages, load_anchors
from .share import weigh_blocks
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
    arrivals_ptr,
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
        if program < ENCODERS:
            if PDL:
                tl.extra.cuda.gdc_wait()
                tl.extra.cuda.gdc_launch_dependents()
            encode_new_runs(
                program, block_table_ptr, block_table_stride, seq_lens_ptr, num_reqs,
                query_start_loc_ptr, cache_of_head(cache, kv_head.to(tl.int64)), PAGE, QUERY, CODES,
            )
            return
        program -= ENCODERS
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
    request_spans = (seq_len + SPAN_SIZE - 1) // SPAN_SIZE
    item_spans = (request_spans + num_items - 1) // num_items
    index += part * num_items
    num_items *= PARTS
    token, query_len = query_span(query_start_loc_ptr, request, QUERY.QUERY_LEN)
    row_tokens, _, _ = query_rows(query_len, QUERY.GROUP, ROWS_PADDED)
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
        if CODES is not None:
            prefetch_codes(code_places, num_coded, cache, PAGE, CODES)
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
    tl.debug_barrier()  # all threads' results are written before one of them says so
    arrivals_ptr += request * QUERY.NUM_KV_HEADS + kv_head
    tl.atomic_add(arrivals_ptr, 1, sem="release")
