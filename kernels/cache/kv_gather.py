"""Gathers a batch's cached keys and values into contiguous tensors, for prefill with a prefix."""

import torch
import triton
import triton.language as tl

from .cache_rows import plane_arguments, plane_constants
from .page_layout import KVPlanes
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
    key_plane_ptr,
    residual_plane_ptr,
    exponent_plane_ptr,
    value_plane_ptr,
    value_exponent_plane_ptr,
    key_plane_stride_page,
    key_plane_stride_head,
    residual_plane_stride_page,
    residual_plane_stride_head,
    exponent_plane_stride_page,
    exponent_plane_stride_head,
    value_plane_stride_page,
    value_plane_stride_head,
    value_exponent_plane_stride_page,
    value_exponent_plane_stride_head,
    block_table_ptr,
    cu_seqlens_ptr,
    block_table_stride,
    key_stride_token,
    key_stride_head,
    num_rows,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    FP8_KEY: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FP8_VALUE: tl.constexpr,
    RESIDUAL_SCALE: tl.constexpr,
):
    request = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + request)
    seq_len = tl.load(cu_seqlens_ptr + request + 1) - first
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    valid = (positions < seq_len) & (first + positions < num_rows)
    pages = token_pages(
        block_table_ptr + request.to(tl.int64) * block_table_stride, positions, valid, PAGE_SIZE
    )
    key = load_rows(
        token_pointers(
            key_plane_ptr + head * key_plane_stride_head, pages, positions, key_plane_stride_page,
            HEAD_SIZE, PAGE_SIZE,
        ),
        columns, valid, True, HEAD_SIZE, HEAD_SIZE_PADDED,
    ).to(tl.float32)
    if HAS_RESIDUAL:
        residual = load_rows(
            token_pointers(
                residual_plane_ptr + head * residual_plane_stride_head, pages, positions,
                residual_plane_stride_page, HEAD_SIZE, PAGE_SIZE,
            ),
            columns, valid, True, HEAD_SIZE, HEAD_SIZE_PADDED,
        )
        key += residual.to(tl.float32) * (1.0 / RESIDUAL_SCALE)
    if FP8_KEY:
        exponents = token_pointers(
            exponent_plane_ptr + head * exponent_plane_stride_head, pages, positions,
            exponent_plane_stride_page, 1, PAGE_SIZE,
        )
        key *= load_scales(exponents, valid)[:, None]
    value = load_rows(
        token_pointers(
            value_plane_ptr + head * value_plane_stride_head, pages, positions,
            value_plane_stride_page, HEAD_SIZE, PAGE_SIZE,
        ),
        columns, valid, True, HEAD_SIZE, HEAD_SIZE_PADDED,
    )
    if FP8_VALUE:
        exponents = token_pointers(
            value_exponent_plane_ptr + head * value_exponent_plane_stride_head, pages, positions,
            value_exponent_plane_stride_page, 1, PAGE_SIZE,
        )
        value = value.to(tl.float32) * load_scales(exponents, valid)[:, None]
    target = (first + positions).to(tl.int64) * key_stride_token + head * key_stride_head
    mask = valid[:, None] & (columns < HEAD_SIZE)[None, :]
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
    _kv_gather_kernel[grid](
        key,
        value,
        *plane_arguments(planes),
        block_table,
        cu_seqlens,
        block_table.stride(0),
        key.stride(0),
        key.stride(1),
        key.shape[0],
        **_constants(planes),
    )


def compile_gather(planes: KVPlanes, dtype: torch.dtype) -> None:
    """Compiles what `gather_kv` launches for `planes` and outputs of `dtype`, and launches
    nothing, so that the first request with a prefix need not wait for it."""
    row = planes.num_kv_heads * planes.head_size
    _kv_gather_kernel.warmup(
        dtype, dtype, *plane_arguments(planes), torch.int32, torch.int32, 1, row,
        planes.head_size, 1, **_constants(planes), grid=(1,),
    )


def _constants(planes: KVPlanes) -> dict[str, int | float | bool]:
    return {
        "HEAD_SIZE": planes.head_size,
        "HEAD_SIZE_PADDED": triton.next_power_of_2(planes.head_size),
        "ROWS": ROWS,
        **plane_constants(planes),
        "num_warps": 4,
    }
