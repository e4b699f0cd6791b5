"""4-bit codes of keys, which the scan reads: their format, and the kernel that writes them behind
prefills. Decode writes them itself, where a run of tokens becomes complete."""

import torch
import triton
import triton.language as tl

from ..runtime import INTERPRETED as INTERPRETED_
from ..runtime import launch
from .page_layout import CODE_TOKENS as CODE_TOKENS_
from .page_layout import KVPlanes
from .paged_cache import cache_of_head, page_shape, paged_cache
from .paged_rows import load_scales, token_pointers

CODE_TOKENS: tl.constexpr = tl.constexpr(CODE_TOKENS_)
INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED_)
LARGEST: tl.constexpr = tl.constexpr(65504.0)
"""Of float16."""
ENCODED_WORDS: tl.constexpr = tl.constexpr(8)
"""Words of each key that are encoded at a time."""


@triton.jit
def encode_words(cache, page, run, first_word, PAGE: tl.constexpr):
    """Writes codes of run `run` of `page`, int64, from its base and residual: of each key
    ENCODED_WORDS words, from `first_word` on.

    For each channel of the run's CODE_TOKENS keys, `step` is a 15th of their spread and `offset`
    their least minus 16 steps, both float16; a code is the nearest of 0 to 15, and stands for
    `(16 + code) * step + offset`. That is off by half a step at most, up to the rounding of
    `offset`. An offset is no number where a key is none or float16 does not hold it.

    A word of `key_code` has the codes of channels `w`, `w + head_size / 4` and so on, from its
    lowest bits on; a row of `code_range` all steps, then all offsets. The same keys give the same
    bits, whichever kernel this is part of: every product here is exact, or fused. `cache`: of
    `cache_of_head`.
    """
    WORDS: tl.constexpr = PAGE.HEAD_SIZE // 4
    tokens = run * CODE_TOKENS + tl.arange(0, CODE_TOKENS)
    words = first_word + tl.arange(0, ENCODED_WORDS)
    exists = words < WORDS
    mask = tl.broadcast_to(exists[None, :], (CODE_TOKENS, ENCODED_WORDS))
    range_ptr = cache.code_range.pointer + page * cache.code_range.stride_page
    range_ptr += run * (8 * WORDS) + words
    key_rows = token_pointers(cache.key, page, tokens, PAGE.KEY_STRIDE, PAGE.PAGE_SIZE)
    code_rows = token_pointers(cache.key_code, page, tokens, WORDS, PAGE.PAGE_SIZE)
    if cache.key_exponent.pointer is not None:
        rows = token_pointers(cache.key_exponent, page, tokens, 1, PAGE.PAGE_SIZE)
        scales = load_scales(rows, tokens >= 0)[:, None]
    packed = tl.zeros([CODE_TOKENS, ENCODED_WORDS], tl.int32)
    for part in tl.static_range(4):
        columns = (part * WORDS + words)[None, :]
        key = tl.load(key_rows[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
        if cache.key_residual.pointer is not None:
            rows = token_pointers(
                cache.key_residual, page, tokens, PAGE.RESIDUAL_STRIDE, PAGE.PAGE_SIZE
            )
            residual = tl.load(rows[:, None] + columns, mask=mask, other=0.0)
            key += residual.to(tl.float32) * (1.0 / PAGE.RESIDUAL_SCALE)
        if cache.key_exponent.pointer is not None:
            key *= scales
        low = tl.min(key, axis=0)
        step = ((tl.max(key, axis=0) - low) * (1.0 / 15.0)).to(tl.float16)
        wide_step = step.to(tl.float32)
        offset = (low - 16.0 * wide_step).to(tl.float16)
        wide_offset = offset.to(tl.float32)
        is_held = tl.min((tl.abs(key) <= LARGEST).to(tl.int32), axis=0) > 0  # NaN is not
        is_held = is_held & (tl.abs(wide_offset) <= LARGEST)
        inverse = 1.0 / tl.where(wide_step > 0.0, wide_step, float("inf"))
        code = tl.fma(key - wide_offset[None, :], inverse[None, :], -15.5)
        code = tl.minimum(tl.maximum(tl.floor(code), 0.0), 15.0)
        code = tl.where(is_held[None, :], code, 0.0)
        packed |= code.to(tl.int32) << (4 * part)
        tl.store(range_ptr + part * WORDS, step, mask=exists)
        offset = tl.where(is_held, offset, float("nan")).to(tl.float16)
        tl.store(range_ptr + (4 + part) * WORDS, offset, mask=exists)
    tl.store(code_rows[:, None] + words[None, :], packed.to(tl.int16), mask=mask)


@triton.constexpr_function
def widening(part):
    """PTX that makes of two words the halves `(16 + code) * step + offset` of their codes `part`:
    the code goes to the upper bits of the mantissa of 16.0."""
    shift = ("shl.b32", 6 - 4 * part) if part < 2 else ("shr.b32", 4 * part - 6)
    return (
        f"{{.reg .b32 code; {shift[0]} code, $1, {shift[1]}; "
        "lop3.b32 code, code, 0x03c003c0, 0x4c004c00, 0xea; "  # (code & mask) | 16.0
        "fma.rn.f16x2 $0, code, $2, $3;}"
    )


@triton.jit
def decode_words(words, step, offset, PART: tl.constexpr):
    """The keys, float16, that codes PART of `words`, int16, stand for; see `encode_words`."""
    if INTERPRETED:
        code = (words.to(tl.int32) >> (4 * PART) & 15).to(tl.float32)
        key = (16.0 + code) * step.to(tl.float32) + offset.to(tl.float32)
        key = key.to(tl.float16)
    else:
        step = tl.broadcast_to(step, words.shape)
        offset = tl.broadcast_to(offset, words.shape)
        key = tl.inline_asm_elementwise(
            widening(PART), "=r,r,r,r", [words, step, offset], dtype=tl.float16, is_pure=True,
            pack=2,
        )
    return key


@triton.jit(
    do_not_specialize=["block_table_stride", "behind"],
    do_not_specialize_on_alignment=["block_table_ptr", "query_start_loc_ptr", "cu_seqlens_ptr"],
)
def encode_kernel(
    cache,
    block_table_ptr,
    block_table_stride,
    query_start_loc_ptr,
    cu_seqlens_ptr,
    behind,
    PAGE: tl.constexpr,
):
    """One program: a run of a request, of a KV head."""
    request = tl.program_id(1)
    seq_len = tl.load(cu_seqlens_ptr + request + 1) - tl.load(cu_seqlens_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1)
    query_len -= tl.load(query_start_loc_ptr + request)
    run = tl.maximum(seq_len - query_len - behind, 0) // CODE_TOKENS + tl.program_id(0)
    if (run + 1) * CODE_TOKENS <= seq_len:
        RUNS: tl.constexpr = PAGE.PAGE_SIZE // CODE_TOKENS
        row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
        page = tl.load(row_ptr + run // RUNS).to(tl.int64)
        cache = cache_of_head(cache, tl.program_id(2).to(tl.int64))
        for first_word in range(0, PAGE.HEAD_SIZE // 4, ENCODED_WORDS):
            encode_words(cache, page, run % RUNS, first_word, PAGE)


def encode_keys(
    planes: KVPlanes,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_query_len: int,
    behind: int,
) -> None:
    """Writes the 4-bit codes of every run of CODE_TOKENS keys that the newest tokens of a request
    complete, and of one that ends up to `behind` tokens before them: whoever else wrote those may
    not have written the codes (see `code_lag`). Nothing where `planes` have no codes.

    Args:
        planes: the cache, which holds the keys; see `PageLayout.split`.
        block_table: int32 `[num_reqs, max_pages]`.
        query_start_loc: int32 `[num_reqs + 1]`: where the newest tokens of each request begin.
        cu_seqlens: int32 `[num_reqs + 1]`, exclusive sums of lengths, newest tokens included.
        max_query_len: an upper bound of the numbers of newest tokens, on the host.
    """
    if planes.key_code is None or max_query_len == 0:
        return
    runs = triton.cdiv(max_query_len + behind, CODE_TOKENS_) + 1
    launch(
        encode_kernel, (runs, block_table.shape[0], planes.num_kv_heads),
        paged_cache(planes),
        block_table,
        block_table.stride(0),
        query_start_loc,
        cu_seqlens,
        behind,
        PAGE=page_shape(planes),
        num_warps=4,
    )
