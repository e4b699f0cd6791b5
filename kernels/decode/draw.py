"""The second decode kernel by share: draws blocks by their masses, attends and merges."""

import triton
import triton.language as tl

from ..cache.paged_cache import cache_of_head
from .attend import attend_runs, begin_softmax, largest_scores, raise_reference, run_tile
from .limits import list_numbers
from .merge import count_item, leave_result, merge_results
from .plan import load_item
from .query import load_query, load_sinks, query_rows, query_span, split_query
from .share import MOST_MASS, choose_blocks, load_chunk
from .soft_cap import cap_scores
from .weigh import masses_of_item, sums_of_items


@triton.jit
def await_arrivals(arrivals_ptr, number):
    """Waits until all `number` programs of `weigh_kernel` for a request and KV head have ended.

    They run already, or this kernel would not have started: `weigh_kernel` lets it start in each of
    its programs, and only where it has itself waited for the kernels before it.
    """
    arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
    while arrived < number:
        arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
    tl.debug_barrier()  # one thread has asked for all


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
        sums += tl.load(sums_ptr[:, None] + rows, mask=exists, other=0.0, cache_modifier=".cg")
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
    blocks, exists, places = load_chunk(
        index, num_items, num_spans, seq_len, block_table_row_ptr, SPAN, BLOCK, TUNING
    )
    masses_ptr, stride = masses_of_item(
        scratch, mass_place, kv_head, (request_spans + num_items - 1) // num_items, QUERY, BLOCKS
    )
    PARTS: tl.constexpr = TUNING.WEIGH_PARTS
    await_arrivals(arrivals_ptr + request * QUERY.NUM_KV_HEADS + kv_head, num_items * PARTS)
    num_sums = tl.where(tau > 0, num_items * PARTS, 0)
    denominators = add_up_sums(scratch, (item - index) * PARTS, num_sums, kv_head, QUERY)
    _, references_ptr = sums_of_items(scratch, item * PARTS, kv_head, QUERY)
    row_places = tl.arange(0, ROWS_PADDED)
    anchor_score = tl.load(
        references_ptr + row_places, mask=row_places < QUERY.ROWS, other=0.0, cache_modifier=".cg"
    )
    if sinks_ptr is not None:
        denominators += tl.minimum(tl.exp2(sinks - anchor_score), MOST_MASS)
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
            query_len, tau, layer, kv_head, index + chunk_begin * num_items, seq_len,
            blocks, exists, places, BLOCK, QUERY,
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
        chunk_end = chunk_begin + CHUNK_SPANS
        if chunk_end < num_spans:
            blocks, exists, places = load_chunk(
                index + chunk_end * num_items, num_items, num_spans - chunk_end, seq_len,
                block_table_row_ptr, SPAN, BLOCK, TUNING,
            )
            tl.debug_barrier()  # before the next chunk's take their place

    is_last = leave_result(
        accumulator, weight_sums, reference,
        output, scratch, arrivals_ptr, num_items * PARTS, request, index, num_items, item, kv_head,
        token, query_len, PAGE, QUERY,
    )
    if counters_ptr is not None:  # here nobody waits for it
        count_item(
            counters_ptr, kv_head, index, num_items, query_len, seq_len < min_context,
            num_blocks, num_read, num_drawn, left,
        )
    if is_last:
        merge_results(
            output, scratch, arrivals_ptr, request, index, num_items, item, kv_head, token,
            query_len, PAGE, QUERY, TUNING,
        )
    if PDL:
        # so that the kernel behind this one finds all that `weigh_kernel` writes
        tl.extra.cuda.gdc_wait()
