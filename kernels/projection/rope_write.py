"""Norm and rotation of projected Q and K, and the write of K and V to the cache, in one kernel."""

import torch
import triton
import triton.language as tl

from ..cache.cache_rows import store_key_rows, store_value_rows
from ..cache.page_layout import KVPlanes
from ..cache.paged_cache import page_shape, paged_cache
from ..runtime import launch, pdl_arguments, wait_and_release
from .qkv_heads import QKVHeads, load_rotation, norm_and_rotate, rotation_partners, round_to
from .tuning import RopeWriteTuning, rope_write_tuning


@triton.jit
def _load_rows(row_ptr, rows, columns, mask):
    return tl.load(row_ptr + rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit(  # batches share one compilation
    do_not_specialize=["num_tokens", "num_slots"],
    do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr"],
)
def _rope_write_kernel(
    qkv_ptr,
    rotated_ptr,
    positions_ptr,
    slot_mapping_ptr,
    cos_sin_ptr,
    query_norm_ptr,
    key_norm_ptr,
    cache,
    num_tokens,
    num_slots,
    qkv_stride,
    rotated_stride,
    cos_sin_stride,
    epsilon,
    QKV: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_and_release(PDL)
    QUERY_PROGRAMS: tl.constexpr = (QKV.NUM_HEADS + HEADS - 1) // HEADS
    KEY_PROGRAMS: tl.constexpr = (QKV.NUM_KV_HEADS + HEADS - 1) // HEADS
    PROGRAMS: tl.constexpr = QUERY_PROGRAMS + KEY_PROGRAMS
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    program = tl.program_id(0) % PROGRAMS
    rows = tl.arange(0, TOKENS * HEADS)  # of a token's heads, token after token
    tokens = tl.program_id(0) // PROGRAMS * TOKENS + rows // HEADS
    columns = tl.arange(0, QKV.HEAD_SIZE_PADDED)
    partners = rotation_partners(columns, QKV)
    in_batch = tokens < num_tokens
    positions = tl.load(positions_ptr + tokens, mask=in_batch, other=0).to(tl.int64)
    qkv_rows = tokens.to(tl.int64) * qkv_stride
    rotated_rows = tokens.to(tl.int64) * rotated_stride

    if program < QUERY_PROGRAMS:
        heads = program * HEADS + rows % HEADS
        mask = (in_batch & (heads < QKV.NUM_HEADS))[:, None] & (columns < QKV.HEAD_SIZE)[None, :]
        places = qkv_rows + heads * QKV.HEAD_SIZE
        query = _load_rows(qkv_ptr, places, columns, mask).to(tl.float32)
        partner = _load_rows(qkv_ptr, places, partners, mask).to(tl.float32)
        cos, sin = load_rotation(cos_sin_ptr, cos_sin_stride, positions, columns, mask, QKV)
        query = norm_and_rotate(query, partner, cos, sin, columns, query_norm_ptr, epsilon, QKV)
        query = round_to(query, dtype).to(dtype)
        if IN_PLACE:
            tl.debug_barrier()  # other threads may not have read their partners yet
        places = rotated_rows + heads * QKV.HEAD_SIZE
        tl.store(rotated_ptr + places[:, None] + columns[None, :], query, mask=mask)
    else:
        heads = (program - QUERY_PROGRAMS) * HEADS + rows % HEADS
        in_batch = in_batch & (heads < QKV.NUM_KV_HEADS)
        is_column = (columns < QKV.HEAD_SIZE)[None, :]
        mask = in_batch[:, None] & is_column
        places = qkv_rows + (QKV.NUM_HEADS + heads) * QKV.HEAD_SIZE
        key = _load_rows(qkv_ptr, places, columns, mask).to(tl.float32)
        partner = _load_rows(qkv_ptr, places, partners, mask).to(tl.float32)
        if slot_mapping_ptr is not None:
            has_slot = in_batch & (tokens < num_slots)
            slots = tl.load(slot_mapping_ptr + tokens, mask=has_slot, other=-1).to(tl.int64)
            written = (slots >= 0)[:, None] & is_column
            value_places = places + QKV.NUM_KV_HEADS * QKV.HEAD_SIZE
            value = _load_rows(qkv_ptr, value_places, columns, written)
        cos, sin = load_rotation(cos_sin_ptr, cos_sin_stride, positions, columns, mask, QKV)
        key = norm_and_rotate(key, partner, cos, sin, columns, key_norm_ptr, epsilon, QKV)
        key = round_to(key, dtype)
        if IN_PLACE:
            tl.debug_barrier()
        places = rotated_rows + (QKV.NUM_HEADS + heads) * QKV.HEAD_SIZE
        tl.store(rotated_ptr + places[:, None] + columns[None, :], key.to(dtype), mask=mask)
        if slot_mapping_ptr is not None:
            store_key_rows(key, slots, heads.to(tl.int64), columns, written, cache, PAGE)
            store_value_rows(value, slots, heads.to(tl.int64), columns, written, cache, PAGE)


def rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    heads: QKVHeads,
    planes: KVPlanes | None,
    slot_mapping: torch.Tensor | None,
    rotated: torch.Tensor,
    tuning: RopeWriteTuning | None = None,
) -> None:
    """Rotates Q and K of `qkv` into `rotated`, and writes K and V to `planes` at `slot_mapping`.

    K is rounded to the dtype of `qkv` before it is split, so that cache and `rotated` agree.

    Args:
        qkv: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_size]`, float16 or bfloat16, last
            dimension contiguous.
        positions: int64 or int32 `[num_tokens]`, each below the rows of `heads.cos_sin_cache`.
        planes, slot_mapping: as `write_kv` takes them, or None to write nothing.
        rotated: `[num_tokens, >= (num_heads + num_kv_heads) * head_size]`, dtype of `qkv`; Q and
            K lie in it as in `qkv`. It may be `qkv` itself, but not overlap it otherwise.
        tuning: how the work is cut; the default fits the number of tokens.
    """
    num_tokens = qkv.shape[0]
    if num_tokens == 0:
        return
    assert qkv.shape[1] == heads.num_all_heads * heads.head_size
    assert qkv.stride(1) == 1 and rotated.stride(1) == 1 and rotated.dtype == qkv.dtype
    assert positions.shape == (num_tokens,)
    tuning = tuning or rope_write_tuning(num_tokens)
    programs = sum(triton.cdiv(n, tuning.heads) for n in (heads.num_heads, heads.num_kv_heads))
    write = planes is not None and slot_mapping is not None and slot_mapping.shape[0] > 0
    launch(
        _rope_write_kernel, (programs * triton.cdiv(num_tokens, tuning.tokens),),
        qkv,
        rotated,
        positions,
        slot_mapping if write else None,
        heads.cos_sin_cache,
        heads.query_norm,
        heads.key_norm,
        paged_cache(planes if write else None),
        num_tokens,
        slot_mapping.shape[0] if write else 0,
        qkv.stride(0),
        rotated.stride(0),
        heads.cos_sin_cache.stride(0),
        heads.epsilon,
        QKV=heads.shape,
        TOKENS=tuning.tokens,
        HEADS=tuning.heads,
        IN_PLACE=rotated is qkv or rotated.data_ptr() == qkv.data_ptr() != 0,  # 0: no memory
        PAGE=page_shape(planes if write else None),
        **pdl_arguments(qkv.device),
        num_warps=tuning.warps,
    )
