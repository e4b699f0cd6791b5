"""How kernels store rows of keys and values at slots of the paged cache."""

import triton
import triton.language as tl

from .fp8_split import round_to_e4m3, scale_rows, split_e4m3
from .paged_cache import row_tile


@triton.jit
def slot_rows(plane, slots, head, STRIDE_TOKEN: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Pointers to the rows of `plane` at `slots`; `head` is the KV head, int64, a scalar or one a
    slot."""
    rows = slots // PAGE_SIZE * plane.stride_page + head * plane.stride_head
    return plane.pointer + rows + slots % PAGE_SIZE * STRIDE_TOKEN


@triton.jit
def store_key_rows(key, slots, head, columns, mask, cache, PAGE: tl.constexpr):
    """Stores `key`, `[ROWS, HEAD_SIZE_PADDED]` of any float dtype, split where the cache is FP8.

    `slots` is int64 `[ROWS]`, negative where nothing is written; `head` is the KV head, an int64
    scalar or `[ROWS]`; `mask` excludes those slots and the columns beyond HEAD_SIZE, which hold
    zeros. `cache, PAGE`: of `paged_cache` and `page_shape`.
    """
    rows = slot_rows(cache.key, slots, head, PAGE.KEY_STRIDE, PAGE.PAGE_SIZE)
    key_target = row_tile(rows, columns)
    if cache.key_exponent.pointer is not None:
        base, residual, exponent = split_e4m3(key.to(tl.float32), PAGE.RESIDUAL_SCALE)
        tl.store(key_target, base.to(tl.float8e4nv), mask=mask)
        rows = slot_rows(cache.key_exponent, slots, head, 1, PAGE.PAGE_SIZE)
        tl.store(rows, exponent.to(tl.uint8), mask=slots >= 0)
        if cache.key_residual.pointer is not None:
            rows = slot_rows(
                cache.key_residual, slots, head, PAGE.RESIDUAL_STRIDE, PAGE.PAGE_SIZE
            )
            tl.store(row_tile(rows, columns), residual.to(tl.float8e4nv), mask=mask)
    else:
        tl.store(key_target, key.to(cache.key.pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_value_rows(value, slots, head, columns, mask, cache, PAGE: tl.constexpr):
    """Stores `value`, `[ROWS, HEAD_SIZE_PADDED]`, rounded to E4M3 where the cache's values are.

    Arguments as those of `store_key_rows`; columns beyond HEAD_SIZE hold zeros.
    """
    rows = slot_rows(cache.value, slots, head, PAGE.VALUE_STRIDE, PAGE.PAGE_SIZE)
    target = row_tile(rows, columns)
    if cache.value_exponent.pointer is not None:
        scaled, exponent = scale_rows(value.to(tl.float32))
        tl.store(target, round_to_e4m3(scaled).to(tl.float8e4nv), mask=mask)
        rows = slot_rows(cache.value_exponent, slots, head, 1, PAGE.PAGE_SIZE)
        tl.store(rows, exponent.to(tl.uint8), mask=slots >= 0)
    else:
        tl.store(target, value.to(cache.value.pointer.dtype.element_ty), mask=mask)
