"""Decode, before the kernel ahead of it has ended: asks for what a program reads first."""

import triton
import triton.language as tl

from ..cache.paged_rows import prefetch, prefetch_rows, tile_pointers, token_pointers
from .scan import ANCHOR_TOKENS, anchor_positions


@triton.jit
def prefetch_anchors(seq_len, pages, cache, PAGE: tl.constexpr):
    """Brings the base of the tokens that set the threshold to the L2 cache. See `load_anchors`.

    The newest rows may still be written to: the L2 cache is where writes arrive.
    """
    positions = anchor_positions(seq_len)
    exists = positions >= 0
    positions = tl.maximum(positions, 0)
    rows = token_pointers(cache.key, pages, positions, PAGE.KEY_STRIDE, PAGE.PAGE_SIZE)
    prefetch_rows(rows, exists, PAGE.HEAD_SIZE)
    if cache.key_exponent.pointer is not None:
        rows = token_pointers(cache.key_exponent, pages, positions, 1, PAGE.PAGE_SIZE)
        begins = tl.arange(0, 4 * ANCHOR_TOKENS) % ANCHOR_TOKENS == 0
        begins |= positions % PAGE.PAGE_SIZE == 0  # the last tokens may lie in two pages
        prefetch(rows, exists & begins)


@triton.jit
def prefetch_tile(
    places, first_block, step, seq_len, cache,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):
    """Brings the base of an item's first tile to the L2 cache. See `scan_blocks`."""
    TILE: tl.constexpr = TILE_BLOCKS * BLOCK.BLOCK_SIZE
    tokens = tl.arange(0, TILE)
    positions = first_block + tokens // BLOCK.BLOCK_SIZE * step
    positions = positions * BLOCK.BLOCK_SIZE + tokens % BLOCK.BLOCK_SIZE
    exists = positions < seq_len
    rows = tile_pointers(cache.key, places, 0, tokens, PAGE.KEY_STRIDE, BLOCK, TILE)
    prefetch_rows(rows, exists, PAGE.HEAD_SIZE)
    if cache.key_exponent.pointer is not None:
        rows = tile_pointers(cache.key_exponent, places, 0, tokens, 1, BLOCK, TILE)
        prefetch(rows, exists & (tokens % BLOCK.UNIT == 0))
