"""Gathers a batch's cached keys and values into contiguous tensors, for prefill with a prefix."""

import torch
import triton
import triton.language as tl

from ..runtime import launch
from .page_layout import KVPlanes
from .paged_cache import cache_of_head, page_shape, paged_cache
from .paged_rows import load_rows, load_scales, token_pages, token_pointers

ROWS = 32
"""Tokens that a program gathers."""


@triton.jit(  # batches share one compilation, wherever their rows of the block table begin
    do_not_specialize=["block_table_stride", "num_rows"],
    do_not_specialize_on_alignment=["block_table_ptr"],
)
def _kv_gather_kernel(
    key_ptr,
    value_ptr,
    cache,
    block_table_ptr,
    cu_seqlens_ptr,
    block_table_stride,
    key_stride_token,
    key_stride_head,
    num_rows,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
):
    request = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + request)
    seq_len = tl.load(cu_seqlens_ptr + request + 1) - first
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PAGE.HEAD_SIZE_PADDED)
    valid = (positions < seq_len) & (first + positions < num_rows)
    block_table_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    pages = token_pages(block_table_row_ptr, positions, valid, PAGE.PAGE_SIZE)
    cache = cache_of_head(cache, head)
    rows = token_pointers(cache.key, pages, positions, PAGE.KEY_STRIDE, PAGE.PAGE_SIZE)
    key = load_rows(rows, columns, valid, True, PAGE).to(tl.float32)
    if cache.key_residual.pointer is not None:
        rows = token_pointers(
            cache.key_residual, pages, positions, PAGE.RESIDUAL_STRIDE, PAGE.PAGE_SIZE
        )
        residual = load_rows(rows, columns, valid, True, PAGE)
        key += residual.to(tl.float32) * (1.0 / PAGE.RESIDUAL_SCALE)
    if cache.key_exponent.pointer is not None:
        rows = token_pointers(cache.key_exponent, pages, positions, 1, PAGE.PAGE_SIZE)
        key *= load_scales(rows, valid)[:, None]
    rows = token_pointers(cache.value, pages, positions, PAGE.VALUE_STRIDE, PAGE.PAGE_SIZE)
    value = load_rows(rows, columns, valid, True, PAGE)
    if cache.value_exponent.pointer is not None:
        rows = token_pointers(cache.value_exponent, pages, positions, 1, PAGE.PAGE_SIZE)
        value = value.to(tl.float32) * load_scales(rows, valid)[:, None]
    target = (first + positions).to(tl.int64) * key_stride_token + head * key_stride_head
    mask = valid[:, None] & (columns < PAGE.HEAD_SIZE)[None, :]
    target = target[:, None] + columns[None, :]
    tl.store(key_ptr + target, key.to(key_ptr.dtype.element_ty), mask=mask)
    tl.store(value_ptr + target, value.to(value_ptr.dtype.element_ty), mask=mask)


def gather_kv(
    planes: KVPlanes,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seq_len: int,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Writes every request's first tokens from the cache to `key` and `value`, packed.

    Args:
        planes: the cache; see `PageLayout.split`.
        block_table: int32 `[num_reqs, max_pages]`.
        cu_seqlens: int32 `[num_reqs + 1]`, the exclusive sums of the lengths to gather.
        max_seq_len: an upper bound of those lengths, on the host.
        key, value: outputs, `[num_rows, num_kv_heads, head_size]`, contiguous, of the model's
            dtype; what lies beyond their rows is not gathered. See `write_kv` for the error of
            what comes back.
    """
    if max_seq_len == 0:
        return
    assert key.stride() == value.stride() and key.stride(-1) == 1
    grid = (triton.cdiv(max_seq_len, ROWS), block_table.shape[0], planes.num_kv_heads)
    launch(
        _kv_gather_kernel, grid,
        key,
        value,
        paged_cache(planes),
        block_table,
        cu_seqlens,
        block_table.stride(0),
        key.stride(0),
        key.stride(1),
        key.shape[0],
        PAGE=page_shape(planes),
        ROWS=ROWS,
        num_warps=4,
    )
