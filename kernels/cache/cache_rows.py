"""What kernels take of the cache's planes, and how they store rows of keys and values at slots."""

import torch
import triton
import triton.language as tl

from .fp8_split import round_to_e4m3, scale_rows, split_e4m3
from .page_layout import KVPlanes


@triton.jit
def store_key_rows(
    key, slots, head, columns, mask,
    key_plane_ptr, residual_plane_ptr, exponent_plane_ptr,
    key_plane_stride_page, key_plane_stride_head,
    residual_plane_stride_page, residual_plane_stride_head,
    exponent_plane_stride_page, exponent_plane_stride_head,
    PAGE_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, FP8_KEY: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, RESIDUAL_SCALE: tl.constexpr,
):
    """Stores `key`, `[ROWS, HEAD_SIZE_PADDED]` of any float dtype, split where the cache is FP8.

    `slots` is int64 `[ROWS]`, negative where nothing is written; `head` is the KV head, an int64
    scalar or `[ROWS]`; `mask` excludes those slots and the columns beyond HEAD_SIZE, which hold
    zeros.
    """
    page = slots // PAGE_SIZE
    row = slots % PAGE_SIZE
    offset = row[:, None] * HEAD_SIZE + columns[None, :]
    key_rows = page * key_plane_stride_page + head * key_plane_stride_head
    key_target = key_plane_ptr + key_rows[:, None] + offset
    if FP8_KEY:
        base, residual, exponent = split_e4m3(key.to(tl.float32), RESIDUAL_SCALE)
        tl.store(key_target, base.to(tl.float8e4nv), mask=mask)
        exponent_rows = page * exponent_plane_stride_page + head * exponent_plane_stride_head
        tl.store(exponent_plane_ptr + exponent_rows + row, exponent.to(tl.uint8), mask=slots >= 0)
        if HAS_RESIDUAL:
            residual_rows = page * residual_plane_stride_page + head * residual_plane_stride_head
            residual_target = residual_plane_ptr + residual_rows[:, None] + offset
            tl.store(residual_target, residual.to(tl.float8e4nv), mask=mask)
    else:
        tl.store(key_target, key.to(key_plane_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_value_rows(
    value, slots, head, columns, mask,
    value_plane_ptr, value_exponent_plane_ptr,
    value_plane_stride_page, value_plane_stride_head,
    value_exponent_plane_stride_page, value_exponent_plane_stride_head,
    PAGE_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, FP8_VALUE: tl.constexpr,
):
    """Stores `value`, `[ROWS, HEAD_SIZE_PADDED]`, rounded to E4M3 where the cache's values are.

    Arguments as those of `store_key_rows`; columns beyond HEAD_SIZE hold zeros.
    """
    page = slots // PAGE_SIZE
    row = slots % PAGE_SIZE
    rows = page * value_plane_stride_page + head * value_plane_stride_head + row * HEAD_SIZE
    target = value_plane_ptr + rows[:, None] + columns[None, :]
    if FP8_VALUE:
        scaled, exponent = scale_rows(value.to(tl.float32))
        tl.store(target, round_to_e4m3(scaled).to(tl.float8e4nv), mask=mask)
        rows = page * value_exponent_plane_stride_page + head * value_exponent_plane_stride_head
        target = value_exponent_plane_ptr + rows + row
        tl.store(target, exponent.to(tl.uint8), mask=slots >= 0)
    else:
        tl.store(target, value.to(value_plane_ptr.dtype.element_ty), mask=mask)


def plane_arguments(planes: KVPlanes | None) -> tuple[torch.Tensor | int | None, ...]:
    """What a kernel takes of `planes`: five pointers, then their strides of page and head.

    None is for a launch that writes no cache.
    """
    if planes is None:
        return (None,) * 5 + (0,) * 10
    tensors = (
        planes.key, planes.key_residual, planes.key_exponent, planes.value, planes.value_exponent
    )
    strides = (tensor.stride()[:2] if tensor is not None else (0, 0) for tensor in tensors)
    return *tensors, *(stride for pair in strides for stride in pair)


def plane_constants(planes: KVPlanes | None) -> dict[str, int | float | bool]:
    """The constexpr arguments that go with `plane_arguments`."""
    return {
        "PAGE_SIZE": planes.page_size if planes else 16,
        "FP8_KEY": planes is not None and planes.key_exponent is not None,
        "HAS_RESIDUAL": planes is not None and planes.key_residual is not None,
        "FP8_VALUE": planes is not None and planes.value_exponent is not None,
        "RESIDUAL_SCALE": planes.residual_scale if planes else 1.0,
    }
