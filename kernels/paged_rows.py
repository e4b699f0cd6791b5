"""Addresses of a request's tokens in the paged cache, shared by the kernels that read it."""

import triton
import triton.language as tl


@triton.jit
def token_pages(block_table_row_ptr, positions, valid, PAGE_SIZE: tl.constexpr):
    """Pages of arbitrary `positions`, int64; page 0 where not `valid`."""
    return tl.load(block_table_row_ptr + positions // PAGE_SIZE, mask=valid, other=0).to(tl.int64)


@triton.jit
def block_pages(
    block_table_row_ptr, blocks, exists, PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Pages of `blocks`, int64, in a cache whose pages hold whole blocks.

    Kernels carry them to the next iteration of a loop, since a load that waits for another load
    of its own iteration is not pipelined.
    """
    return tl.load(
        block_table_row_ptr + blocks * BLOCK_SIZE // PAGE_SIZE, mask=exists, other=0
    ).to(tl.int64)


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
