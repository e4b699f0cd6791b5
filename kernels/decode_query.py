"""The query rows of one KV group, as the decode kernels take them."""

import triton
import triton.language as tl

from .fp8_split import exponent_to_scale, round_to_e4m3

PART_SCALE: tl.constexpr = tl.constexpr(32.0)
"""Factor between one part of a query and the next: a part's rounding error, at most 2^3 beside
elements of at most 2^8, becomes at most 2^8."""


@triton.jit
def query_rows(GROUP: tl.constexpr, QUERY_LEN: tl.constexpr, ROWS_PADDED: tl.constexpr):
    """Of each row `[ROWS_PADDED]`: its token of the request's newest, its head of the group, and
    whether it exists."""
    rows = tl.arange(0, ROWS_PADDED)
    return rows // GROUP, rows % GROUP, rows < GROUP * QUERY_LEN


@triton.jit
def load_query(
    query_ptr, stride_token, stride_head, columns, scale_log2,
    GROUP: tl.constexpr, QUERY_LEN: tl.constexpr, ROWS_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr,
):
    """Three parts of the query, `[HEAD_SIZE_PADDED, ROWS_PADDED]`, and the factor on their scores.

    PARTS 1: the query itself, for keys of its dtype. Otherwise E4M3 parts for E4M3 keys: a row is
    brought below 2^8 by a power of two, which the factor (float32 `[ROWS_PADDED]`, log2 units)
    takes back, and is the sum of part i / PART_SCALE^i. Two parts hold a bfloat16 element, three
    a float16 one, without error down to 2^-14 of the row's largest. Parts beyond PARTS repeat the
    first.
    """
    tokens, heads, exists = query_rows(GROUP, QUERY_LEN, ROWS_PADDED)
    query = tl.load(
        query_ptr + (tokens * stride_token + heads * stride_head)[:, None] + columns[None, :],
        mask=exists[:, None] & (columns < HEAD_SIZE)[None, :],
        other=0.0,
    )
    factor = tl.zeros_like(heads).to(tl.float32) + scale_log2
    if PARTS == 1:
        first = tl.trans(query.to(DTYPE))
        second = first
        third = first
    else:
        query = query.to(tl.float32)
        largest = tl.max(tl.abs(query), axis=1)
        exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 7, 1)
        query *= exponent_to_scale(254 - exponent)[:, None]
        factor *= exponent_to_scale(exponent)
        part = round_to_e4m3(query)
        first = tl.trans(part.to(DTYPE))
        rest = (query - part) * PART_SCALE
        part = round_to_e4m3(rest)
        second = tl.trans(part.to(DTYPE))
        third = first
        if PARTS == 3:
            third = tl.trans(round_to_e4m3((rest - part) * PART_SCALE).to(DTYPE))
    return first, second, third, factor


@triton.jit
def dot_query(rows, first, second, third, PARTS: tl.constexpr):
    """`rows` `[ROWS, HEAD_SIZE_PADDED]` times the query, float32 `[ROWS, ROWS_PADDED]`."""
    scores = tl.dot(rows, first)
    if PARTS > 1:
        scores += tl.dot(rows, second) * (1.0 / PART_SCALE)
    if PARTS > 2:
        scores += tl.dot(rows, third) * (1.0 / PART_SCALE / PART_SCALE)
    return scores
