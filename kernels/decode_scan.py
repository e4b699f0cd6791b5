"""Decode, step 1: scores every block from the FP8 base alone and picks the blocks to keep."""

import triton
import triton.language as tl

from .decode_query import dot_query, load_query, query_rows
from .paged_rows import (
    by_block,
    load_rows,
    load_scales,
    load_tile_scales,
    tile_order,
    tile_pointers,
    token_pages,
    token_pointers,
)


@triton.jit
def anchor_threshold(
    query, factor, limits, delta, seq_len,
    key_ptr, exponent_ptr, block_table_row_ptr,
    key_stride_page, exponent_stride_page,
    KEY_STRIDE: tl.constexpr, ROWS_PADDED: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr, PAGE_SIZE: tl.constexpr, ANCHOR_TOKENS: tl.constexpr,
    PARTS: tl.constexpr, HAS_EXPONENT: tl.constexpr, DTYPE: tl.constexpr,
):
    """The largest base score of a request's first and last tokens minus `delta`, `[ROWS_PADDED]`.

    See `scan_blocks` for the arguments.
    """
    rows = tl.arange(0, 4 * ANCHOR_TOKENS)  # half of them empty: the matrix unit takes 64
    positions = tl.where(rows < ANCHOR_TOKENS, rows, seq_len - 2 * ANCHOR_TOKENS + rows)
    valid = (positions >= 0) & (positions < seq_len)
    positions = tl.maximum(positions, 0)
    pages = token_pages(block_table_row_ptr, positions, valid, PAGE_SIZE)
    key = load_rows(
        token_pointers(key_ptr, pages, positions, key_stride_page, KEY_STRIDE, PAGE_SIZE),
        tl.arange(0, HEAD_SIZE_PADDED), valid, HEAD_SIZE, HEAD_SIZE_PADDED,
    ).to(DTYPE)
    scores = dot_query(key, query, PARTS, ROWS_PADDED) * factor[None, :]
    if HAS_EXPONENT:
        exponents = token_pointers(
            exponent_ptr, pages, positions, exponent_stride_page, 1, PAGE_SIZE
        )
        scores *= load_scales(exponents, valid)[:, None]
    seen = valid[:, None] & (positions[:, None] < limits[None, :])
    return tl.max(tl.where(seen, scores, float("-inf")), axis=0) - delta


@triton.jit
def scan_blocks(
    query, factor, limits, threshold,
    chunk_begin, chunk_end, seq_len, newest_block, places,
    scores_ptr, key_ptr, exponent_ptr, block_table_row_ptr,
    key_stride_page, exponent_stride_page,
    KEY_STRIDE: tl.constexpr, QUERY_LEN: tl.constexpr, ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, PARTS: tl.constexpr, HAS_EXPONENT: tl.constexpr,
    DTYPE: tl.constexpr, STAGES: tl.constexpr,
):
    """Scores blocks `chunk_begin ... chunk_end` of a request in tiles of TILE_BLOCKS.

    `query, factor`: of `load_query`. `limits`, int32 `[ROWS_PADDED]`: how many
    tokens of the request a query row sees. A block is kept if one of its tokens reaches
    `threshold`, float32 `[ROWS_PADDED]`, in one row, or if it is `newest_block` or newer.

    Writes the scores of kept blocks, log2 units, to `scores[block - chunk_begin, token, row]`.
    Returns the kept blocks as bits of an int64, bit i for block `chunk_begin + i`.
    """
    TILE: tl.constexpr = TILE_BLOCKS * BLOCK_SIZE
    tile_blocks = tl.arange(0, TILE_BLOCKS)
    tile_tokens = tile_order(TILE)
    rows = tl.arange(0, ROWS_PADDED)
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    # exponents are carried to the next iteration, because their loads are too narrow to be
    # pipelined
    position = chunk_begin * BLOCK_SIZE
    key_scales = load_tile_scales(
        exponent_ptr, block_table_row_ptr, places, 0, position, seq_len, exponent_stride_page,
        PAGE_SIZE, BLOCK_SIZE, CHUNK_BLOCKS, TILE, HAS_EXPONENT,
    )
    kept = tl.zeros([], tl.int64)
    num_blocks = chunk_end - chunk_begin
    threshold /= factor  # of scores without it
    for index in tl.range(0, num_blocks, TILE_BLOCKS, num_stages=STAGES):
        position = (chunk_begin + index) * BLOCK_SIZE
        key = load_rows(
            tile_pointers(
                key_ptr, block_table_row_ptr, places, index, position, seq_len, key_stride_page,
                KEY_STRIDE, PAGE_SIZE, BLOCK_SIZE, CHUNK_BLOCKS, TILE,
            ),
            columns, None, HEAD_SIZE, HEAD_SIZE_PADDED,
        ).to(DTYPE)
        next_key_scales = load_tile_scales(
            exponent_ptr, block_table_row_ptr, places, index + TILE_BLOCKS, position + TILE,
            seq_len, exponent_stride_page, PAGE_SIZE, BLOCK_SIZE, CHUNK_BLOCKS, TILE, HAS_EXPONENT,
        )
        scores = dot_query(key, query, PARTS, ROWS_PADDED) * key_scales[:, None]
        key_scales = next_key_scales
        if position + TILE > seq_len - QUERY_LEN + 1:  # not all rows see all of it
            seen = (position + tile_tokens)[:, None] < limits[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        margin = tl.max(by_block(scores - threshold[None, :], BLOCK_SIZE), axis=1)
        above = (margin >= 0.0).to(tl.int32)
        above = tl.where(chunk_begin + index + tile_blocks >= newest_block, 1, above)
        keep = tl.where(index + tile_blocks < num_blocks, above, 0)
        bits = tl.sum(keep.to(tl.int64) << (index + tile_blocks), axis=0)
        kept |= bits
        if bits != 0:
            tokens = index * BLOCK_SIZE + tile_tokens
            keep_rows = ((bits >> (tokens // BLOCK_SIZE)) & 1) != 0
            tl.store(
                scores_ptr + tokens[:, None] * ROWS + rows[None, :],
                scores * factor[None, :],
                mask=keep_rows[:, None] & (rows < ROWS)[None, :],
            )
    return kept


@triton.jit
def decode_threshold_kernel(
    threshold_ptr,
    query_ptr,
    key_ptr,
    exponent_ptr,
    block_table_ptr,
    seq_lens_ptr,
    delta_ptr,
    scale_log2,
    delta_stride,
    query_stride_token,
    query_stride_head,
    block_table_stride,
    key_stride_page,
    key_stride_head,
    exponent_stride_page,
    exponent_stride_head,
    KEY_STRIDE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ANCHOR_TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_EXPONENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: the thresholds of one request and KV head, of `[num_tokens, num_heads]`."""
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + request)
    if seq_len == 0:
        return
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    token = request.to(tl.int64) * QUERY_LEN
    query, factor = load_query(
        query_ptr + token * query_stride_token + kv_head * GROUP * query_stride_head,
        query_stride_token, query_stride_head, columns, scale_log2,
        GROUP, QUERY_LEN, ROWS_PADDED, HEAD_SIZE, PARTS, DTYPE,
    )
    row_tokens, row_heads, exists = query_rows(GROUP, QUERY_LEN, ROWS_PADDED)
    limits = seq_len - QUERY_LEN + 1 + row_tokens
    if HAS_EXPONENT:
        exponent_ptr += kv_head.to(tl.int64) * exponent_stride_head
    threshold = anchor_threshold(
        query, factor, limits, tl.load(delta_ptr + request * delta_stride), seq_len,
        key_ptr + kv_head.to(tl.int64) * key_stride_head, exponent_ptr,
        block_table_ptr + request.to(tl.int64) * block_table_stride,
        key_stride_page, exponent_stride_page,
        KEY_STRIDE, ROWS_PADDED, HEAD_SIZE, HEAD_SIZE_PADDED, PAGE_SIZE, ANCHOR_TOKENS, PARTS,
        HAS_EXPONENT, DTYPE,
    )
    tl.store(
        threshold_ptr + (token + row_tokens) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + row_heads,
        threshold,
        mask=exists,
    )
