"""Decode, step 2: attends to the kept blocks of a chunk."""

import triton
import triton.language as tl

from .decode_query import dot_query
from .paged_rows import (
    load_columns,
    load_rows,
    load_tile_exponents,
    tile_pointers,
    tile_scales,
)


@triton.jit
def lowest_bit(bits):
    """The place of the lowest 1 of an int32; 0 if there is none."""
    power = (bits & -bits).to(tl.float32)
    return tl.maximum((power.to(tl.int32, bitcast=True) >> 23 & 255) - 127, 0)


@triton.jit
def widen(values, FIRST: tl.constexpr, ROWS_PADDED: tl.constexpr):
    """`[FIRST, ROWS_PADDED]` with zeros up to 16 columns, the least of the matrix unit."""
    if ROWS_PADDED < 16:
        HALVES: tl.constexpr = 16 // ROWS_PADDED
        halves = tl.arange(0, HALVES)[None, :, None]
        values = tl.where(halves == 0, values[:, None, :], 0.0)
        values = tl.reshape(values, (FIRST, 16))
    return values


@triton.jit
def narrow(values, FIRST: tl.constexpr, ROWS_PADDED: tl.constexpr):
    """Takes `widen` back."""
    if ROWS_PADDED < 16:
        HALVES: tl.constexpr = 16 // ROWS_PADDED
        values = tl.sum(tl.reshape(values, (FIRST, HALVES, ROWS_PADDED)), axis=1)
    return values


@triton.jit
def online_softmax_update(accumulator, row_max, weight_sums, scores, value, value_scales):
    """Adds a tile to a running softmax; scores are log2 units, -inf where masked.

    `accumulator` `[HEAD_SIZE_PADDED, ROWS_PADDED]` after `widen`, `row_max` `[ROWS_PADDED]`,
    `weight_sums` and `scores` `[TOKENS, ROWS_PADDED]`, `value` `[HEAD_SIZE_PADDED, TOKENS]` to be
    multiplied by `value_scales` `[TOKENS]`. Sums of weights stay apart by token until the end,
    because a sum over tokens crosses warps.
    """
    new_max = tl.maximum(row_max, tl.max(scores, axis=0))
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - safe_max[None, :])
    rescale = tl.exp2(row_max - safe_max)
    ROWS_PADDED: tl.constexpr = scores.shape[1]
    weighted = widen(weights * value_scales[:, None], scores.shape[0], ROWS_PADDED)
    accumulator *= widen(rescale[None, :], 1, ROWS_PADDED)
    accumulator = tl.dot(value, weighted.to(value.dtype), accumulator)
    return accumulator, new_max, weight_sums * rescale[None, :] + weights


@triton.jit
def load_scores(
    scores_ptr, index, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """The scan's scores of a block of the chunk, float32 `[BLOCK_SIZE, ROWS_PADDED]`."""
    tokens = index * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    rows = tl.arange(0, ROWS_PADDED)
    return tl.load(
        scores_ptr + tokens[:, None] * ROWS + rows[None, :],
        mask=(rows < ROWS)[None, :] & (tokens >= 0)[:, None],
        other=0.0,
    )


@triton.jit
def load_block_exponents(
    exponent_ptr, value_exponent_ptr, places, index, chunk_begin, seq_len,
    exponent_stride_page, value_exponent_stride_page,
    PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr, HAS_EXPONENT: tl.constexpr, HAS_VALUE_EXPONENT: tl.constexpr,
):
    """Exponents of a block's keys and values, for `tile_scales`."""
    position = (chunk_begin + index) * BLOCK_SIZE
    key_exponents = load_tile_exponents(
        exponent_ptr, places, index, position, seq_len, exponent_stride_page,
        PAGE_SIZE, BLOCK_SIZE, UNIT, CHUNK_BLOCKS, BLOCK_SIZE, HAS_EXPONENT,
    )
    value_exponents = load_tile_exponents(
        value_exponent_ptr, places, index, position, seq_len,
        value_exponent_stride_page, PAGE_SIZE, BLOCK_SIZE, UNIT, CHUNK_BLOCKS, BLOCK_SIZE,
        HAS_VALUE_EXPONENT,
    )
    return key_exponents, value_exponents


@triton.jit
def attend_blocks(
    accumulator, row_max, weight_sums,
    query, factor, limits, kept, num_kept,
    chunk_begin, seq_len, places, scores_ptr,
    key_ptr, residual_ptr, exponent_ptr, value_ptr, value_exponent_ptr,
    key_stride_page, residual_stride_page,
    exponent_stride_page, value_stride_page, value_exponent_stride_page,
    KEY_STRIDE: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr, CHUNK_BLOCKS: tl.constexpr, WHOLE_PAGES: tl.constexpr, PARTS: tl.constexpr,
    FROM_SCORES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_EXPONENT: tl.constexpr, HAS_VALUE_EXPONENT: tl.constexpr,
    RESIDUAL_SCALE: tl.constexpr, DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds the blocks of a chunk whose bits are set in `kept` to a running softmax.

    FROM_SCORES: the scan's scores stand for the dot with the base, and the base is not read;
    otherwise the blocks are the first `num_kept` ones. See `scan_blocks` for the arguments and
    `online_softmax_update` for the state, which is returned.
    """
    tokens = tl.arange(0, BLOCK_SIZE)
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    # The next block's exponents and scores are carried to its iteration, because their loads are
    # too narrow to be pipelined.
    remaining = kept
    index = 0
    if FROM_SCORES:
        index = lowest_bit(remaining)
        base_scores = load_scores(scores_ptr, index, ROWS, ROWS_PADDED, BLOCK_SIZE)
    key_exponents, value_exponents = load_block_exponents(
        exponent_ptr, value_exponent_ptr, places, index, chunk_begin, seq_len,
        exponent_stride_page, value_exponent_stride_page,
        PAGE_SIZE, BLOCK_SIZE, UNIT, CHUNK_BLOCKS, HAS_EXPONENT, HAS_VALUE_EXPONENT,
    )
    for rank in tl.range(0, num_kept, num_stages=STAGES):
        if FROM_SCORES:
            index = lowest_bit(remaining)
            remaining &= remaining - 1
            next_index = lowest_bit(remaining)
            next_base_scores = load_scores(
                scores_ptr, next_index, ROWS, ROWS_PADDED, BLOCK_SIZE
            )
        else:
            index = rank
            next_index = rank + 1
        position = (chunk_begin + index) * BLOCK_SIZE
        positions = position + tokens
        value = load_columns(
            tile_pointers(
                value_ptr, places, index, value_stride_page, VALUE_STRIDE, PAGE_SIZE, BLOCK_SIZE,
                UNIT, CHUNK_BLOCKS, BLOCK_SIZE,
            ),
            columns, positions < seq_len, HEAD_SIZE,
        ).to(VALUE_DTYPE)
        next_key_exponents, next_value_exponents = load_block_exponents(
            exponent_ptr, value_exponent_ptr, places, next_index, chunk_begin,
            seq_len, exponent_stride_page, value_exponent_stride_page,
            PAGE_SIZE, BLOCK_SIZE, UNIT, CHUNK_BLOCKS, HAS_EXPONENT, HAS_VALUE_EXPONENT,
        )
        scores = tl.zeros([BLOCK_SIZE, ROWS_PADDED], tl.float32)
        if not FROM_SCORES:
            key = load_rows(
                tile_pointers(
                    key_ptr, places, index, key_stride_page, KEY_STRIDE, PAGE_SIZE, BLOCK_SIZE,
                    UNIT, CHUNK_BLOCKS, BLOCK_SIZE,
                ),
                columns, positions < seq_len, not WHOLE_PAGES, HEAD_SIZE, HEAD_SIZE_PADDED,
            ).to(DTYPE)
            scores += dot_query(key, query, PARTS, ROWS_PADDED)
        if HAS_RESIDUAL:
            residual = load_rows(
                tile_pointers(
                    residual_ptr, places, index, residual_stride_page, RESIDUAL_STRIDE,
                    PAGE_SIZE, BLOCK_SIZE, UNIT, CHUNK_BLOCKS, BLOCK_SIZE,
                ),
                columns, positions < seq_len, not WHOLE_PAGES, HEAD_SIZE, HEAD_SIZE_PADDED,
            ).to(DTYPE)
            scores += dot_query(residual, query, PARTS, ROWS_PADDED) * (1.0 / RESIDUAL_SCALE)
        key_scales = tile_scales(key_exponents, BLOCK_SIZE, HAS_EXPONENT)
        if (not FROM_SCORES) or HAS_RESIDUAL:
            scores = scores * factor[None, :] * key_scales[:, None]
        if FROM_SCORES:
            scores += base_scores
            base_scores = next_base_scores
        scores = tl.where(positions[:, None] < limits[None, :], scores, float("-inf"))
        accumulator, row_max, weight_sums = online_softmax_update(
            accumulator, row_max, weight_sums, scores, value,
            tile_scales(value_exponents, BLOCK_SIZE, HAS_VALUE_EXPONENT),
        )
        key_exponents = next_key_exponents
        value_exponents = next_value_exponents
    return accumulator, row_max, weight_sums
