"""Projection of few tokens to Q, K and V, with norm, rotation and cache write, in one kernel.

Each program multiplies the weight rows of one head with a part of the hidden states. The last of
a head's programs adds up their sums, in order, and finishes the head: this needs a whole head.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..cache.cache_rows import store_key_rows, store_value_rows
from ..cache.page_layout import KVPlanes
from ..cache.paged_cache import page_shape, paged_cache
from ..runtime import compute_dtype, launch, pdl_arguments, wait_and_release
from .qkv_heads import QKVHeads, load_rotation, norm_and_rotate, rotation_partners, round_to
from .tuning import MAX_PROJECTED_TOKENS, ProjectionTuning


@triton.jit
def _load_positions(positions_ptr, slot_mapping_ptr, rows, num_tokens, num_slots):
    """Positions and slots of the tokens `rows`; 0 and -1 where there is none."""
    positions = tl.load(positions_ptr + rows, mask=rows < num_tokens, other=0).to(tl.int64)
    slots = tl.full(rows.shape, -1, tl.int64)
    if slot_mapping_ptr is not None:
        slots = tl.load(slot_mapping_ptr + rows, mask=rows < num_slots, other=-1).to(tl.int64)
    return positions, slots


@triton.jit
def _add_up(
    sums_ptr, rows, columns, mask, bias_ptr, split_stride,
    SPLITS: tl.constexpr, dtype: tl.constexpr,
):
    """`columns` of the projections in float32: the sums of all splits in order, and the bias,
    rounded to `dtype` as a linear layer rounds them."""
    places = sums_ptr + rows[:, None] + columns[None, :]
    loaded = ()
    for split in tl.static_range(SPLITS):
        place = places + split * split_stride
        loaded += (tl.load(place, mask=mask, other=0.0, cache_modifier=".cg"),)
    x = loaded[0]
    for split in tl.static_range(1, SPLITS):
        x += loaded[split]
    if bias_ptr is not None:
        bias_places = bias_ptr + tl.zeros_like(rows)[:, None] + columns[None, :]
        x += tl.load(bias_places, mask=mask, other=0.0).to(tl.float32)
    return round_to(x, dtype)


@triton.jit(  # batches share one compilation
    do_not_specialize=["num_tokens", "num_slots"],
    do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr"],
)
def _project_write_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    arrived_ptr,
    output_ptr,
    positions_ptr,
    slot_mapping_ptr,
    cos_sin_ptr,
    query_norm_ptr,
    key_norm_ptr,
    cache,
    num_tokens,
    num_slots,
    hidden_size,
    hidden_stride,
    weight_stride,
    output_stride,
    cos_sin_stride,
    epsilon,
    QKV: tl.constexpr,
    EVEN_HIDDEN: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    FINISH_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_and_release(PDL)
    HEAD_SIZE: tl.constexpr = QKV.HEAD_SIZE
    HEAD_SIZE_PADDED: tl.constexpr = QKV.HEAD_SIZE_PADDED
    FIRST_KEY: tl.constexpr = QKV.NUM_HEADS  # number of the first head of K
    FIRST_VALUE: tl.constexpr = FIRST_KEY + QKV.NUM_KV_HEADS
    WIDTH: tl.constexpr = (FIRST_VALUE + QKV.NUM_KV_HEADS) * HEAD_SIZE
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    head = tl.program_id(0)
    split = tl.program_id(1)
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    is_column = columns < HEAD_SIZE
    tokens = tl.arange(0, TOKENS)
    in_batch = tokens < num_tokens
    block = tl.arange(0, HIDDEN_BLOCK)
    rows = tl.arange(0, FINISH_ROWS)
    rotates = head < FIRST_VALUE
    num_rotated = tl.where(rotates, num_tokens, 0)
    # what the last program of a head needs is asked for by all, before they know who it is
    positions, slots = _load_positions(positions_ptr, slot_mapping_ptr, rows, num_tokens, num_slots)

    weight_rows = weight_ptr + (head * HEAD_SIZE + columns).to(tl.int64)[:, None] * weight_stride
    hidden_rows = hidden_ptr + tokens[None, :] * hidden_stride
    num_blocks = tl.cdiv(hidden_size, HIDDEN_BLOCK)
    first = num_blocks * split // SPLITS
    last = num_blocks * (split + 1) // SPLITS
    sums = tl.zeros([HEAD_SIZE_PADDED, TOKENS], dtype=tl.float32)
    for number in tl.range(first, last, num_stages=STAGES):
        places = number * HIDDEN_BLOCK + block
        weight_mask = is_column[:, None]
        hidden_mask = in_batch[None, :]
        if not EVEN_HIDDEN:
            weight_mask = weight_mask & (places < hidden_size)[None, :]
            hidden_mask = hidden_mask & (places < hidden_size)[:, None]
        if EVEN_HIDDEN and HEAD_SIZE == HEAD_SIZE_PADDED:
            weight = tl.load(weight_rows + places[None, :])
        else:
            weight = tl.load(weight_rows + places[None, :], mask=weight_mask, other=0.0)
        hidden = tl.load(hidden_rows + places[:, None], mask=hidden_mask, other=0.0)
        sums = tl.dot(weight.to(DOT_DTYPE), hidden.to(DOT_DTYPE), sums)  # [HEAD_SIZE, TOKENS]

    rotated = (rows < num_rotated)[:, None] & is_column[None, :]
    cos, sin = load_rotation(cos_sin_ptr, cos_sin_stride, positions, columns, rotated, QKV)
    split_stride = num_tokens * WIDTH
    sums_rows = sums_ptr + split * split_stride + tokens[None, :] * WIDTH
    tl.store(
        sums_rows + (head * HEAD_SIZE + columns)[:, None],
        sums,
        mask=is_column[:, None] & in_batch[None, :],
    )
    tl.debug_barrier()  # all of the program's sums are stored before it counts as arrived
    arrived = tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        tl.store(arrived_ptr + head, 0)
        head_columns = head * HEAD_SIZE + columns
        norm_ptr = query_norm_ptr
        if query_norm_ptr is not None:
            if head >= FIRST_KEY:
                norm_ptr = key_norm_ptr
        for _ in tl.range(0, num_tokens, FINISH_ROWS):
            next_rows = rows + FINISH_ROWS
            positions, next_slots = _load_positions(
                positions_ptr, slot_mapping_ptr, next_rows, num_tokens, num_slots
            )
            mask = (rows < num_tokens)[:, None] & is_column[None, :]
            x = _add_up(
                sums_ptr, rows * WIDTH, head_columns, mask, bias_ptr, split_stride,
                SPLITS, dtype,
            )
            if rotates:
                partners = rotation_partners(columns, QKV)
                partner = tl.gather(x, tl.broadcast_to(partners[None, :], x.shape), 1)
                x = norm_and_rotate(x, partner, cos, sin, columns, norm_ptr, epsilon, QKV)
            x = round_to(x, dtype)
            output_rows = output_ptr + rows.to(tl.int64)[:, None] * output_stride
            tl.store(output_rows + head_columns[None, :], x.to(dtype), mask=mask)
            if slot_mapping_ptr is not None:
                if head >= FIRST_KEY:
                    written = (slots >= 0)[:, None] & is_column[None, :]
                    if head < FIRST_VALUE:
                        kv_head = (head - FIRST_KEY).to(tl.int64)
                        store_key_rows(x, slots, kv_head, columns, written, cache, PAGE)
                    else:
                        kv_head = (head - FIRST_VALUE).to(tl.int64)
                        store_value_rows(x, slots, kv_head, columns, written, cache, PAGE)
            rows, slots = next_rows, next_slots
            rotated = (rows < num_rotated)[:, None] & is_column[None, :]
            cos, sin = load_rotation(cos_sin_ptr, cos_sin_stride, positions, columns, rotated, QKV)


@dataclass(frozen=True)
class ProjectionScratch:
    """Memory that a launch needs; launches that follow each other in a stream may share it.

    `sums` is float32 of at least `splits * num_tokens * width` elements, of any content;
    `arrived` int32 `[num_all_heads]`, zero before a launch and after it.
    """

    sums: torch.Tensor
    arrived: torch.Tensor

    @staticmethod
    def sums_shape(num_tokens: int, heads: QKVHeads, tuning: ProjectionTuning) -> tuple[int]:
        return (tuning.splits * num_tokens * heads.num_all_heads * heads.head_size,)

    @classmethod
    def allocate(
        cls, num_tokens: int, heads: QKVHeads, tuning: ProjectionTuning
    ) -> "ProjectionScratch":
        device = heads.cos_sin_cache.device
        shape = cls.sums_shape(num_tokens, heads, tuning)
        return cls(
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.zeros(heads.num_all_heads, dtype=torch.int32, device=device),
        )


def project_rope_and_write(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor,
    heads: QKVHeads,
    planes: KVPlanes | None,
    slot_mapping: torch.Tensor | None,
    output: torch.Tensor,
    scratch: ProjectionScratch,
    tuning: ProjectionTuning,
) -> None:
    """Projects `hidden_states`, rotates Q and K, and writes K and V to `planes`.

    Projections are rounded to the dtype of `hidden_states` as a linear layer rounds them, so that
    small and large batches get the same keys; Q and K once more when they are rotated. The same
    inputs and tuning give the same bits.

    Args:
        hidden_states: `[num_tokens, hidden_size]`, float16 or bfloat16, last dimension
            contiguous; at most MAX_PROJECTED_TOKENS tokens.
        weight: `[(num_heads + 2 * num_kv_heads) * head_size, hidden_size]`, same dtype, last
            dimension contiguous.
        bias: `[(num_heads + 2 * num_kv_heads) * head_size]` or None.
        positions, planes, slot_mapping: as `rope_and_write` takes them.
        output: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_size]`, same dtype: Q, K, V.
        scratch: see `ProjectionScratch`.
    """
    num_tokens, hidden_size = hidden_states.shape
    if num_tokens == 0:
        return
    width = heads.num_all_heads * heads.head_size
    assert num_tokens <= MAX_PROJECTED_TOKENS
    assert weight.shape == (width, hidden_size) and output.shape == (num_tokens, width)
    assert hidden_states.dtype == weight.dtype == output.dtype
    assert hidden_states.stride(1) == weight.stride(1) == output.stride(1) == 1
    assert positions.shape == (num_tokens,)
    assert scratch.sums.numel() >= tuning.splits * num_tokens * width
    assert scratch.arrived.numel() >= heads.num_all_heads
    write = planes is not None and slot_mapping is not None and slot_mapping.shape[0] > 0
    launch(
        _project_write_kernel, (heads.num_all_heads, tuning.splits),
        hidden_states,
        weight,
        bias,
        scratch.sums,
        scratch.arrived,
        output,
        positions,
        slot_mapping if write else None,
        heads.cos_sin_cache,
        heads.query_norm,
        heads.key_norm,
        paged_cache(planes if write else None),
        num_tokens,
        min(slot_mapping.shape[0], num_tokens) if write else 0,
        hidden_size,
        hidden_states.stride(0),
        weight.stride(0),
        output.stride(0),
        heads.cos_sin_cache.stride(0),
        heads.epsilon,
        QKV=heads.shape,
        EVEN_HIDDEN=hidden_size % tuning.hidden_block == 0,
        **tuning.launch(num_tokens, heads.head_size),
        DOT_DTYPE=compute_dtype(hidden_states.dtype),
        PAGE=page_shape(planes if write else None),
        **pdl_arguments(hidden_states.device),
    )
