"""Addresses of a request's tokens in the paged cache, shared by the kernels that read it."""

import triton
import triton.language as tl


@triton.jit
def token_pages(block_table_row_ptr, positions, valid, PAGE_SIZE: tl.constexpr):
    """Pages of arbitrary `positions`, int64; page 0 where not `valid`."""
    return tl.load(block_table_row_ptr + positions // PAGE_SIZE, mask=valid, other=0).to(tl.int64)


@triton.jit
def block_entries(
    block_table_row_ptr, blocks, exists, PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """`block << 32 | page * blocks per page + place in the page`, int64, for `blocks` of a request.

    Where pages do not hold whole blocks, the lower half is 0. Kernels carry entries to the next
    iteration of a loop, since a load that waits for another load of its own iteration is not
    pipelined.
    """
    entries = blocks * tl.full([], 1 << 32, tl.int64)
    if PAGE_SIZE % BLOCK_SIZE == 0:
        BLOCKS: tl.constexpr = PAGE_SIZE // BLOCK_SIZE
        pages = tl.load(block_table_row_ptr + blocks // BLOCKS, mask=exists, other=0)
        entries += pages.to(tl.int64) * BLOCKS + blocks % BLOCKS
    return entries


@triton.jit
def entry_block(entries):
    """The block of a request, int32."""
    return (entries >> 32).to(tl.int32)


@triton.jit
def entry_page(entries, PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The page, int64, where pages hold whole blocks."""
    return (entries & 0xFFFFFFFF) // (PAGE_SIZE // BLOCK_SIZE)


@triton.jit
def load_rows(
    plane_ptr, pages, offsets, stride_page, stride_token, columns, valid,
    HEAD_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
):
    """Loads rows of a plane, `[ROWS, HEAD_SIZE_PADDED]`, zero where not `valid`.

    `plane_ptr` points at the head's first row; `offsets` are the tokens' places in their pages.
    """
    starts = pages * stride_page + offsets * stride_token
    mask = valid[:, None]
    if HEAD_SIZE != HEAD_SIZE_PADDED:
        mask = mask & (columns < HEAD_SIZE)[None, :]
    return tl.load(plane_ptr + starts[:, None] + columns[None, :], mask=mask, other=0.0)
