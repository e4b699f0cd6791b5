"""Decode, step 1: scores every block from the FP8 base alone and picks the blocks to keep."""

import triton
import triton.language as tl

from ..cache.paged_cache import cache_of_head, plane_of_words
from ..cache.paged_rows import (
    load_rows,
    load_tile_exponents,
    tile_pointers,
    tile_scales,
    token_pointers,
)
from .query import dot_query, load_query, query_rows, query_span, split_query
from .soft_cap import cap_scores

ANCHOR_TOKENS: tl.constexpr = tl.constexpr(16)
"""How many of a request's first and of its last tokens set the threshold."""


@triton.jit
def _either(left, left_late, right, right_late):
    return left | right, left_late | right_late


@triton.jit
def anchor_positions(seq_len):
    """Positions of a request's first and last tokens, -1 or less where there is none.

    Twice as many rows as there are anchors, because the matrix unit takes 64.
    """
    rows = tl.arange(0, 4 * ANCHOR_TOKENS)
    first = tl.where(rows < seq_len, rows, -1)
    last = tl.where(rows < 2 * ANCHOR_TOKENS, seq_len - 2 * ANCHOR_TOKENS + rows, -1)
    return tl.where(rows < ANCHOR_TOKENS, first, last)


@triton.jit
def load_anchor_pages(seq_len, block_table_row_ptr, PAGE_SIZE: tl.constexpr):
    """Pages of `anchor_positions`, int64 `[4 * ANCHOR_TOKENS]`."""
    positions = anchor_positions(seq_len)
    # Three page numbers at most, as scalars, so that keys and exponents wait for the same loads.
    last = tl.maximum(seq_len - ANCHOR_TOKENS, 0) // PAGE_SIZE
    first_page = tl.load(block_table_row_ptr)
    last_page = tl.load(block_table_row_ptr + last)
    newest_page = tl.load(block_table_row_ptr + tl.maximum(seq_len - 1, 0) // PAGE_SIZE)
    pages = tl.where(positions // PAGE_SIZE == last, last_page, newest_page)
    return tl.where(positions < ANCHOR_TOKENS, first_page, pages).to(tl.int64)


@triton.jit
def load_anchors(seq_len, pages, cache, PAGE: tl.constexpr):
    """Base keys at `anchor_positions`, `[4 * ANCHOR_TOKENS, HEAD_SIZE_PADDED]`, and the powers of
    two that they are stored without. `cache`: of `cache_of_head`."""
    positions = anchor_positions(seq_len)
    valid = positions >= 0
    positions = tl.maximum(positions, 0)
    words = tl.zeros([4 * ANCHOR_TOKENS], tl.int32)
    HAS_EXPONENT: tl.constexpr = cache.key_exponent.pointer is not None
    if HAS_EXPONENT:
        exponents = token_pointers(
            plane_of_words(cache.key_exponent), pages, positions // 4, 1, PAGE.PAGE_SIZE // 4
        )
        words = tl.load(exponents, mask=valid, other=0)
    # Or the loads up to here move behind the keys' way to shared memory, and wait in vain for them.
    tl.debug_barrier()
    rows = token_pointers(cache.key, pages, positions, PAGE.KEY_STRIDE, PAGE.PAGE_SIZE)
    key = load_rows(rows, tl.arange(0, PAGE.HEAD_SIZE_PADDED), valid, True, PAGE)
    return key, tile_scales(words, positions, HAS_EXPONENT)


@triton.jit
def anchor_scores(
    query, factor, limits, seq_len, key, scales, QUERY: tl.constexpr, DTYPE: tl.constexpr
):
    """Base scores of the anchors, log2 units, `[4 * ANCHOR_TOKENS, ROWS_PADDED]`.

    `key, scales`: of `load_anchors`. See `scan_blocks` for the other arguments.
    """
    positions = anchor_positions(seq_len)
    scores = dot_query(key.to(DTYPE), query, QUERY) * factor[None, :]
    seen = (positions >= 0)[:, None] & (positions[:, None] < limits[None, :])
    return tl.where(seen, scores * scales[:, None], float("-inf"))


@triton.jit
def anchor_threshold(
    query, factor, soft_cap, limits, delta, seq_len, key, scales,
    QUERY: tl.constexpr, DTYPE: tl.constexpr,
):
    """The largest base score of the anchors, under the cap, minus `delta`, log2 units,
    `[ROWS_PADDED]`.

    See `anchor_scores` for the arguments.
    """
    scores = anchor_scores(query, factor, limits, seq_len, key, scales, QUERY, DTYPE)
    return cap_scores(tl.max(scores, axis=0), soft_cap) - delta


@triton.jit
def tile_tokens_of(step, SPAN: tl.constexpr, SPANS: tl.constexpr):
    """The tokens of a tile of SPANS spans, every `step`-th of a request, row by row: their places
    in the tile's spans, and their positions from its first token on, int32 `[TILE]` each.

    16 tokens of each span in turn. A warp gets 16 of 64 rows of a product, so that with four spans
    each has one of its own, and finds by itself what its blocks weigh and whether to keep them.
    """
    SIZE: tl.constexpr = SPAN.BLOCK_SIZE
    rows = tl.arange(0, SPANS * SIZE)
    row_spans = rows // 16 % SPANS
    span_tokens = rows // (16 * SPANS) * 16 + rows % 16
    return row_spans * SIZE + span_tokens, row_spans * step * SIZE + span_tokens


@triton.jit
def score_tile(
    query, limits, first_span, step, index, seq_len, seen_by_all, places, tokens, positions, cache,
    PAGE: tl.constexpr, SPAN: tl.constexpr, QUERY: tl.constexpr, DTYPE: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Base scores, without the factor, of the tile that begins at span `index` of a chunk,
    `[TILE, ROWS_PADDED]`; -inf for tokens that a row does not see.

    `tokens, positions`: of `tile_tokens_of`. See `scan_blocks` for the other arguments.
    """
    SIZE: tl.constexpr = SPAN.BLOCK_SIZE
    TILE: tl.constexpr = SPANS * SIZE
    HAS_EXPONENT: tl.constexpr = cache.key_exponent.pointer is not None
    first = (first_span + index * step) * SIZE
    positions += first
    exists = positions < seq_len
    exponents = load_tile_exponents(cache.key_exponent, places, index, tokens, exists, SPAN, TILE)
    rows = tile_pointers(cache.key, places, index, tokens, PAGE.KEY_STRIDE, SPAN, TILE)
    columns = tl.arange(0, PAGE.HEAD_SIZE_PADDED)
    key = load_rows(rows, columns, exists, not PAGE.WHOLE_PAGES, PAGE).to(DTYPE)
    scores = dot_query(key, query, QUERY)
    scores *= tile_scales(exponents, tokens, HAS_EXPONENT)[:, None]
    if first + ((SPANS - 1) * step + 1) * SIZE > seen_by_all:
        scores = tl.where(positions[:, None] < limits[None, :], scores, float("-inf"))
    return scores


@triton.jit
def scan_blocks(
    query, factor, limits, threshold,
    first_block, step, num_blocks, seq_len, seen_by_all, newest_block, places, scores_ptr, cache,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, QUERY: tl.constexpr, TUNING: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Scores the `num_blocks` blocks of a chunk, `first_block` and every `step`-th of the request
    after it, in tiles of TILE_BLOCKS.

    `query, factor`: of `split_query`. `limits`, int32 `[ROWS_PADDED]`: how many tokens of the
    request a query row sees, `seen_by_all` the least of them. A block is kept if one of its tokens
    reaches `threshold`, float32 `[ROWS_PADDED]`, in one row, or if it is `newest_block` or newer.
    No score here is capped.
    `cache`: of `cache_of_head`.

    Writes the scores of kept blocks, log2 units, to `scores[index, token, row]`.
    Returns which blocks are kept, as the bits of two int64, bit i of the first for block i of the
    chunk, of the second for block 64 + i, and the largest score of every row, float32
    `[ROWS_PADDED]`.
    """
    ROWS: tl.constexpr = QUERY.ROWS
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    BLOCK_SIZE: tl.constexpr = BLOCK.BLOCK_SIZE
    TILE_BLOCKS: tl.constexpr = TUNING.TILE_BLOCKS
    TILE: tl.constexpr = TILE_BLOCKS * BLOCK_SIZE
    RUNS: tl.constexpr = BLOCK_SIZE // 16
    tile_tokens, tile_positions = tile_tokens_of(step, BLOCK, TILE_BLOCKS)
    tile_blocks = tl.arange(0, TILE_BLOCKS)
    rows = tl.arange(0, ROWS_PADDED)
    kept = tl.zeros([TILE_BLOCKS], tl.int64)
    kept_late = tl.zeros([TILE_BLOCKS], tl.int64)
    largest = tl.full([TILE, ROWS_PADDED], float("-inf"), tl.float32)
    # of scores without the factor; no rounding drops the block that the threshold is from
    threshold = (threshold - tl.abs(threshold) * 1e-6) / factor
    for index in tl.range(0, num_blocks, TILE_BLOCKS, num_stages=TUNING.SCAN_STAGES):
        block = first_block + index * step
        scores = score_tile(
            query, limits, first_block, step, index, seq_len, seen_by_all, places,
            tile_tokens, tile_positions, cache, PAGE, BLOCK, QUERY, DTYPE, TILE_BLOCKS,
        )
        largest = tl.maximum(largest, scores)
        above = (scores >= threshold[None, :]).to(tl.int32)
        above = tl.max(tl.reshape(above, (RUNS, TILE_BLOCKS, 16 * ROWS_PADDED)), axis=2)
        above = tl.max(above, axis=0)
        above = tl.where(block + tile_blocks * step >= newest_block, 1, above)
        keep = tl.where(index + tile_blocks < num_blocks, above, 0)
        bits = keep.to(tl.int64) << (index + tile_blocks) % 64
        if index < 64:
            kept |= bits
        else:
            kept_late |= bits
        keep = tl.broadcast_to(keep[None, :, None], (RUNS, TILE_BLOCKS, 16))
        tokens = index * BLOCK_SIZE + tile_tokens
        tl.store(
            scores_ptr + tokens[:, None] * ROWS + rows[None, :],
            scores * factor[None, :],
            mask=(tl.reshape(keep, (TILE,)) != 0)[:, None] & (rows < ROWS)[None, :],
        )
    kept, kept_late = tl.reduce((kept, kept_late), 0, _either)  # both in one exchange of warps
    return kept, kept_late, tl.max(largest, axis=0) * factor


@triton.jit(  # as `decode_kernel`
    do_not_specialize=["block_table_stride"],
    do_not_specialize_on_alignment=["block_table_ptr", "query_start_loc_ptr", "seq_lens_ptr"],
)
def decode_threshold_kernel(
    threshold_ptr,
    query,
    cache,
    block_table_ptr,
    block_table_stride,
    seq_lens_ptr,
    query_start_loc_ptr,
    limit_ptr,
    limit_stride,
    scale_log2,
    soft_cap,
    PAGE: tl.constexpr,
    QUERY: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: the thresholds of one request and KV head, of `[num_tokens, num_heads]`."""
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + request)
    if seq_len == 0:
        return
    token, query_len = query_span(query_start_loc_ptr, request, QUERY.QUERY_LEN)
    row_tokens, row_heads, exists = query_rows(query_len, QUERY.GROUP, QUERY.ROWS_PADDED)
    limits = seq_len - query_len + 1 + row_tokens
    cache = cache_of_head(cache, kv_head.to(tl.int64))
    block_table_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    pages = load_anchor_pages(seq_len, block_table_row_ptr, PAGE.PAGE_SIZE)
    key, scales = load_anchors(seq_len, pages, cache, PAGE)
    columns = tl.arange(0, PAGE.HEAD_SIZE_PADDED)
    rows = load_query(query, token, kv_head, query_len, columns, QUERY, PAGE, QUERY.PARTS)
    rows, factor = split_query(rows, scale_log2, QUERY, DTYPE)
    delta = tl.load(limit_ptr + request * limit_stride)
    threshold = anchor_threshold(
        rows, factor, soft_cap, limits, delta, seq_len, key, scales, QUERY, DTYPE
    )
    NUM_HEADS: tl.constexpr = QUERY.NUM_KV_HEADS * QUERY.GROUP
    place = (token + row_tokens) * NUM_HEADS + kv_head * QUERY.GROUP + row_heads
    tl.store(threshold_ptr + place, threshold, mask=exists)
