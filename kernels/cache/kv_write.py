"""Writes new keys and values to their slots of the paged cache, in the formats of its planes."""

import torch
import triton
import triton.language as tl

from ..runtime import launch, pdl_arguments, wait_and_release
from .cache_rows import store_key_rows, store_value_rows
from .page_layout import KVPlanes
from .paged_cache import page_shape, paged_cache


@triton.jit(  # batches share one compilation
    do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slot_mapping_ptr"]
)
def _kv_write_kernel(
    key_ptr,
    value_ptr,
    slot_mapping_ptr,
    cache,
    num_tokens,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_and_release(PDL)
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PAGE.HEAD_SIZE_PADDED)
    slots = tl.load(slot_mapping_ptr + rows, mask=rows < num_tokens, other=-1).to(tl.int64)
    mask = (slots >= 0)[:, None] & (columns < PAGE.HEAD_SIZE)[None, :]
    rows = rows.to(tl.int64)

    value_rows = rows * value_stride_token + head * value_stride_head
    value = tl.load(value_ptr + value_rows[:, None] + columns[None, :], mask=mask, other=0.0)
    store_value_rows(value, slots, head, columns, mask, cache, PAGE)
    key_rows = rows * key_stride_token + head * key_stride_head
    key = tl.load(key_ptr + key_rows[:, None] + columns[None, :], mask=mask, other=0.0)
    store_key_rows(key, slots, head, columns, mask, cache, PAGE)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, planes: KVPlanes, slot_mapping: torch.Tensor
) -> None:
    """Writes `key` and `value` to `planes` at `slot_mapping`.

    With base `b`, residual `r` and exponent `e`, the stored key is `(b + r / 32) * 2^(e - 127)`.
    The error against the key, for rows whose largest element is at least 2^-119:

    - bfloat16: none where `|k|` is at least 2^-14 of the row's largest element, since base and
      residual hold 4 significant bits each; at most 2^-22 of that element below.
    - float16: at most 2^-9 of `|k|` from 2^-13 of the row's largest element on.
    - without the residual: at most 2^-4 of `|k|` from 2^-13 of the row's largest element on, and
      at most 2^-17 of that element below.

    Values in the model's dtype are stored as they are, E4M3 ones like keys without the residual.
    Without it, elements that round up to 2^16 (float16) or 2^128 (bfloat16), from 31/32 of that
    on, come back infinite.

    Args:
        key, value: `[num_tokens, num_kv_heads, head_size]`, float16 or bfloat16, last dimension
            contiguous; rows beyond `slot_mapping`, and slots beyond them, are ignored.
        planes: the cache; see `PageLayout.split`.
        slot_mapping: int64 `[<= num_tokens]`, page * page_size + offset; negative slots are
            padding and are not written.
    """
    num_tokens = min(slot_mapping.shape[0], key.shape[0])
    if num_tokens == 0:
        return
    assert key.stride(-1) == 1 and value.stride(-1) == 1
    rows = 4 if num_tokens <= 1024 else 16
    launch(
        _kv_write_kernel, (triton.cdiv(num_tokens, rows), planes.num_kv_heads),
        key,
        value,
        slot_mapping,
        paged_cache(planes),
        num_tokens,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        PAGE=page_shape(planes),
        ROWS=rows,
        **pdl_arguments(key.device),
        num_warps=4,
    )
