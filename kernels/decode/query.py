"""The query rows of one KV group, as the decode kernels take them."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..cache.fp8_split import exponent_to_scale, round_to_e4m3, scale_rows

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
PART_SCALE: tl.constexpr = tl.constexpr(32.0)
"""Factor between one part of a query and the next: a part's rounding error, at most 2^3 beside
elements of at most 2^8, becomes at most 2^8."""


class QueryShape(NamedTuple):
    """Constants of a batch's queries. GROUP query heads share a KV head, a request has up to
    QUERY_LEN tokens; ROWS is their product, the rows of a KV group. PARTS: see `split_query`."""

    NUM_KV_HEADS: int
    GROUP: int
    QUERY_LEN: int
    ROWS: int
    ROWS_PADDED: int
    PARTS: int


class HeadRows(NamedTuple):
    """A tensor `[num_tokens, num_heads, head_size]` as kernels take it."""

    pointer: torch.Tensor
    stride_token: int
    stride_head: int


def head_rows(tensor: torch.Tensor) -> HeadRows:
    """The tensor as kernels take it; its last dimension is contiguous."""
    assert tensor.stride(2) == 1
    return HeadRows(tensor, *tensor.stride()[:2])


@triton.jit
def query_span(query_start_loc_ptr, request, QUERY_LEN: tl.constexpr):
    """A request's first query token, int64, and how many it has, at most QUERY_LEN; exactly
    QUERY_LEN without `query_start_loc_ptr`."""
    first = request.to(tl.int64) * QUERY_LEN
    query_len = tl.full([], QUERY_LEN, tl.int32)
    if query_start_loc_ptr is not None:
        start = tl.load(query_start_loc_ptr + request)
        query_len = tl.load(query_start_loc_ptr + request + 1) - start
        first = start.to(tl.int64)
    return first, query_len


@triton.jit
def query_rows(query_len, GROUP: tl.constexpr, ROWS_PADDED: tl.constexpr):
    """Of each row `[ROWS_PADDED]`: its token of the request's newest, its head of the group, and
    whether it exists."""
    rows = tl.arange(0, ROWS_PADDED)
    return rows // GROUP, rows % GROUP, rows < GROUP * query_len


@triton.jit
def load_sinks(sinks_ptr, kv_head, row_heads, row_exists, QUERY: tl.constexpr):
    """Scores of the sinks of a KV head's rows, log2 units, float32 `[ROWS_PADDED]`; -inf for none.
    `row_heads, row_exists`: of `query_rows`."""
    sinks = tl.full([QUERY.ROWS_PADDED], float("-inf"), tl.float32)
    if sinks_ptr is not None:
        heads = kv_head * QUERY.GROUP + row_heads
        sinks = tl.load(sinks_ptr + heads, mask=row_exists, other=float("-inf"))
        sinks = sinks.to(tl.float32) * LOG2_E
    return sinks


@triton.jit
def load_query(
    query, token, kv_head, query_len, columns, QUERY: tl.constexpr, PAGE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The query rows of a KV head from `token` on, as they are, PARTS times,
    `[PARTS * ROWS_PADDED, HEAD_SIZE_PADDED]`. `query`: of `head_rows`."""
    rows = tl.arange(0, PARTS * QUERY.ROWS_PADDED) % QUERY.ROWS_PADDED
    first_head = kv_head * QUERY.GROUP
    pointer = query.pointer + token * query.stride_token + first_head * query.stride_head
    places = rows // QUERY.GROUP * query.stride_token + rows % QUERY.GROUP * query.stride_head
    return tl.load(
        pointer + places[:, None] + columns[None, :],
        mask=(rows < QUERY.GROUP * query_len)[:, None] & (columns < PAGE.HEAD_SIZE)[None, :],
        other=0.0,
    )


@triton.jit
def split_query(query, scale_log2, QUERY: tl.constexpr, DTYPE: tl.constexpr):
    """The query `[HEAD_SIZE_PADDED, PARTS * ROWS_PADDED]` and the factor on its scores.

    PARTS 1: the query itself, for keys in its dtype. PARTS 2: E4M3 parts for E4M3 keys, side by
    side: a row is brought below 2^8 by a power of two, which the factor (float32 `[ROWS_PADDED]`,
    log2 units) takes back, and is the sum of part i / PART_SCALE^i. Two parts hold a bfloat16
    element without error down to 2^-14 of the row's largest.
    """
    PARTS: tl.constexpr = QUERY.PARTS
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    factor = tl.full([ROWS_PADDED], 1.0, tl.float32) * scale_log2
    if PARTS > 1:
        parts = tl.arange(0, PARTS * ROWS_PADDED) // ROWS_PADDED
        query, exponent = scale_rows(query.to(tl.float32))
        factor *= tl.max(tl.reshape(exponent_to_scale(exponent), (PARTS, ROWS_PADDED)), axis=0)
        part = round_to_e4m3(query)
        split = part
        for index in tl.static_range(1, PARTS):
            query = (query - part) * PART_SCALE
            part = round_to_e4m3(query)
            split = tl.where((parts == index)[:, None], part, split)
        query = split
    return tl.trans(query.to(DTYPE)), factor


@triton.jit
def dot_query(tokens, query, QUERY: tl.constexpr):
    """`tokens` `[TOKENS, HEAD_SIZE_PADDED]` times the query, float32 `[TOKENS, ROWS_PADDED]`."""
    PARTS: tl.constexpr = QUERY.PARTS
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    scores = tl.dot(tokens, query)
    if PARTS > 1:
        weights = exponent_to_scale(127 - 5 * tl.arange(0, PARTS))  # PART_SCALE^-part
        scores = tl.reshape(scores, (tokens.shape[0], PARTS, ROWS_PADDED))
        scores = tl.sum(scores * weights[None, :, None], axis=1)
    return scores
