"""Decode by share, step 1, with 4-bit codes: weighs blocks by the codes of their keys."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..cache.fp8_split import exponent_to_scale, scale_rows
from ..cache.key_codes import CODE_TOKENS, ENCODED_WORDS, decode_words, encode_words
from ..cache.paged_cache import row_tile
from ..cache.paged_rows import pick, prefetch
from .query import load_query, query_span
from .share import MOST_MASS
from .soft_cap import cap_scores

ENCODERS: tl.constexpr = tl.constexpr(16)
"""Programs of a KV head that write codes, while others read."""


class CodeScan(NamedTuple):
    """How codes are read: runs of a chunk, whose places a program holds, depth of the pipeline;
    LAG: of `code_lag`."""

    CHUNK_RUNS: int
    STAGES: int
    LAG: int


@triton.jit
def num_coded_runs(seen_by_all, LAG: tl.constexpr):
    """Runs of a request whose codes were written in a step before this one."""
    return tl.maximum(seen_by_all - LAG, 0) // CODE_TOKENS


@triton.jit
def run_pointers(place, cache, PAGE: tl.constexpr):
    """Where the codes and the ranges of the run at `place` (of `load_places`) begin."""
    WORDS: tl.constexpr = PAGE.HEAD_SIZE // 4
    RUNS: tl.constexpr = PAGE.PAGE_SIZE // CODE_TOKENS
    page, run = (place // RUNS).to(tl.int64), place % RUNS
    code_ptr = cache.key_code.pointer + page * cache.key_code.stride_page
    range_ptr = cache.code_range.pointer + page * cache.code_range.stride_page
    return code_ptr + run * (CODE_TOKENS * WORDS), range_ptr + run * (8 * WORDS)


@triton.jit
def prefetch_codes(places, num_runs, cache, PAGE: tl.constexpr, CODES: tl.constexpr):
    """Brings the first runs at `places` to the L2 cache: those that `weigh_codes` asks for at once.
    No kernel of this step writes them."""
    WORDS: tl.constexpr = PAGE.HEAD_SIZE // 4
    LINE: tl.constexpr = 64  # words of a line of the cache
    begins = tl.arange(0, CODE_TOKENS) * LINE
    for index in tl.static_range(CODES.STAGES - 1):
        code_ptr, range_ptr = run_pointers(pick(places, index), cache, PAGE)
        exists = index < num_runs
        prefetch(code_ptr + begins, exists & (begins < CODE_TOKENS * WORDS))
        prefetch(range_ptr + begins, exists & (begins < 8 * WORDS))


@triton.jit
def encode_new_runs(
    encoder, block_table_ptr, block_table_stride, seq_lens_ptr, num_reqs, query_start_loc_ptr,
    cache, PAGE: tl.constexpr, QUERY: tl.constexpr, CODES: tl.constexpr,
):
    """Writes the codes of the runs that became complete in the last LAG steps, one a request at
    most. Of ENCODERS programs some share a run, the others take other requests."""
    RUNS: tl.constexpr = PAGE.PAGE_SIZE // CODE_TOKENS
    WORDS: tl.constexpr = PAGE.HEAD_SIZE // 4
    SHARING: tl.constexpr = min((WORDS + ENCODED_WORDS - 1) // ENCODED_WORDS, ENCODERS)
    for begin in range(0, num_reqs, ENCODERS // SHARING):
        request = begin + encoder // SHARING
        if request < num_reqs:
            _, query_len = query_span(query_start_loc_ptr, request, QUERY.QUERY_LEN)
            # the tokens that no later step takes back
            certain = tl.load(seq_lens_ptr + request) - query_len + 1
            run = certain // CODE_TOKENS - 1
            if run >= num_coded_runs(certain, CODES.LAG):
                row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
                page = tl.load(row_ptr + run // RUNS).to(tl.int64)
                first_word = encoder % SHARING * ENCODED_WORDS
                for word in range(first_word, WORDS, SHARING * ENCODED_WORDS):
                    encode_words(cache, page, run % RUNS, word, PAGE)


@triton.jit
def load_query_words(
    query, token, kv_head, query_len, scale_log2, QUERY: tl.constexpr, PAGE: tl.constexpr
):
    """The query rows of a KV head beside words of codes: a tuple of four, float16
    `[HEAD_SIZE_PADDED / 4, ROWS_PADDED]`, each of the channels of one code of a word; and the
    factor on their scores, float32 `[ROWS_PADDED]`, as `split_query` has it."""
    WORDS: tl.constexpr = PAGE.HEAD_SIZE // 4
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    words = tl.arange(0, PAGE.HEAD_SIZE_PADDED // 4)
    parts = ()
    largest = tl.zeros([ROWS_PADDED], tl.float32)
    for part in tl.static_range(4):
        columns = part * WORDS + words
        if PAGE.HEAD_SIZE < PAGE.HEAD_SIZE_PADDED:  # nothing stands beside words that pad a row
            columns = tl.where(words < WORDS, columns, PAGE.HEAD_SIZE)
        rows = load_query(query, token, kv_head, query_len, columns, QUERY, PAGE, 1)
        rows = rows.to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(rows), axis=1))
        parts += (rows,)
    _, exponent = scale_rows(largest[:, None])
    inverse = exponent_to_scale(254 - exponent)[:, None]
    scaled = ()
    for part in tl.static_range(4):
        scaled += (tl.trans((parts[part] * inverse).to(tl.float16)),)
    return scaled, exponent_to_scale(exponent) * scale_log2


@triton.jit
def score_run(query_words, code_ptr, range_ptr, PAGE: tl.constexpr):
    """Scores, without the factor, of the run of keys whose codes and ranges begin at the pointers,
    float32 `[CODE_TOKENS, ROWS_PADDED]`. `query_words`: of `load_query_words`."""
    WORDS: tl.constexpr = PAGE.HEAD_SIZE // 4
    WORDS_PADDED: tl.constexpr = PAGE.HEAD_SIZE_PADDED // 4
    WHOLE: tl.constexpr = WORDS == WORDS_PADDED
    tokens = tl.arange(0, CODE_TOKENS)
    words = tl.arange(0, WORDS_PADDED)
    code_rows = code_ptr + tokens * WORDS
    range_ptr += words
    exists = words < WORDS
    if WHOLE:
        codes = tl.load(row_tile(code_rows, words))
    else:
        tile = code_rows[:, None] + words[None, :]
        codes = tl.load(tile, mask=tl.broadcast_to(exists[None, :], tile.shape), other=0)
    scores = tl.zeros([CODE_TOKENS, query_words[0].shape[1]], tl.float32)
    for part in tl.static_range(4):
        if WHOLE:
            step = tl.load(range_ptr + part * WORDS)
            offset = tl.load(range_ptr + (4 + part) * WORDS)
        else:
            step = tl.load(range_ptr + part * WORDS, mask=exists, other=0.0)
            offset = tl.load(range_ptr + (4 + part) * WORDS, mask=exists, other=0.0)
        key = decode_words(codes, step[None, :], offset[None, :], part)
        scores = tl.dot(key, query_words[part], scores)
    return scores


@triton.jit
def weigh_codes(
    query_words, factor, soft_cap, reference, num_runs, places, masses_ptr, masses_stride, cache,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, QUERY: tl.constexpr, TUNING: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`weigh_blocks` by the codes of the `num_runs` runs of a chunk, at `places` (of
    `load_places`), which all query rows see."""
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    BLOCK_SIZE: tl.constexpr = BLOCK.BLOCK_SIZE
    BLOCKS: tl.constexpr = CODE_TOKENS // BLOCK_SIZE
    rows = tl.arange(0, ROWS_PADDED)[None, :]
    masses_ptr += tl.arange(0, BLOCKS)[:, None] + rows * masses_stride
    sums = tl.zeros([BLOCKS, ROWS_PADDED], tl.float32)
    for index in tl.range(0, num_runs, num_stages=STAGES):
        code_ptr, range_ptr = run_pointers(pick(places, index), cache, PAGE)
        scores = score_run(query_words, code_ptr, range_ptr, PAGE)
        scores = cap_scores(scores * factor[None, :], soft_cap)
        masses = tl.exp2(scores - reference[None, :])
        masses = tl.sum(tl.reshape(masses, (BLOCKS, BLOCK_SIZE, ROWS_PADDED)), axis=1)
        place = index * (TUNING.WEIGH_PARTS * BLOCKS)
        tl.store(masses_ptr + place, masses, mask=rows < QUERY.ROWS)
        sums += tl.where(masses < MOST_MASS, masses, MOST_MASS)  # what is no number, too
    return tl.sum(sums, axis=0)
