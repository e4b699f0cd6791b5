"""Decode, before the kernel ahead of it has ended: asks for what a program reads first."""

import triton
import triton.language as tl

from ..cache.paged_rows import prefetch, prefetch_rows, tile_pointers, token_pointers
from .scan import anchor_positions


@triton.jit
def prefetch_scan(
    places, first_block, step, seq_len, anchor_pages, key_ptr, exponent_ptr,
    key_stride_page, exponent_stride_page,
    KEY_STRIDE: tl.constexpr, HEAD_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, TILE_BLOCKS: tl.constexpr,
    ANCHOR_TOKENS: tl.constexpr, ANCHORS: tl.constexpr, HAS_EXPONENT: tl.constexpr,
):
    """Brings the base of an item's first tile to the L2 cache and, if ANCHORS, that of the tokens
    that set the threshold. See `scan_blocks` for the arguments.

    The newest rows may still be written to: the L2 cache is where writes arrive.
    """
    if ANCHORS:
        positions = anchor_positions(seq_len, ANCHOR_TOKENS)
        exists = positions >= 0
        positions = tl.maximum(positions, 0)
        rows = token_pointers(
            key_ptr, anchor_pages, positions, key_stride_page, KEY_STRIDE, PAGE_SIZE
        )
        prefetch_rows(rows, exists, HEAD_SIZE)
        if HAS_EXPONENT:
            rows = token_pointers(
                exponent_ptr, anchor_pages, positions, exponent_stride_page, 1, PAGE_SIZE
            )
            begins = tl.arange(0, 4 * ANCHOR_TOKENS) % ANCHOR_TOKENS == 0
            begins |= positions % PAGE_SIZE == 0  # the last tokens may lie in two pages
            prefetch(rows, exists & begins)
    tokens = tl.arange(0, TILE_BLOCKS * BLOCK_SIZE)
    positions = (first_block + tokens // BLOCK_SIZE * step) * BLOCK_SIZE + tokens % BLOCK_SIZE
    exists = positions < seq_len
    rows = tile_pointers(
        key_ptr, places, 0, tokens, key_stride_page, KEY_STRIDE, PAGE_SIZE, BLOCK_SIZE, UNIT,
        TILE_BLOCKS * BLOCK_SIZE,
    )
    prefetch_rows(rows, exists, HEAD_SIZE)
    if HAS_EXPONENT:
        rows = tile_pointers(
            exponent_ptr, places, 0, tokens, exponent_stride_page, 1, PAGE_SIZE, BLOCK_SIZE, UNIT,
            TILE_BLOCKS * BLOCK_SIZE,
        )
        prefetch(rows, exists & (tokens % UNIT == 0))
