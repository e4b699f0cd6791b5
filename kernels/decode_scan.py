"""Decode, step 1: scores every block from the FP8 base alone and lists the blocks to keep."""

import triton
import triton.language as tl

from .decode_query import load_query
from .fp8_split import exponent_to_scale
from .paged_rows import block_entries, entry_page, load_rows, token_pages


@triton.jit
def base_scores(
    query, factor, key_ptr, pages, offsets, key_scales, valid, columns,
    key_stride_page, key_stride_token,
    HEAD_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
):
    """Scores from the base, log2 units, float32 `[GROUP_PADDED, ROWS]`, -inf where not valid."""
    base = load_rows(
        key_ptr, pages, offsets, key_stride_page, key_stride_token, columns, valid,
        HEAD_SIZE, HEAD_SIZE_PADDED,
    )
    scores = tl.dot(query, tl.trans(base.to(query.dtype))) * factor[:, None] * key_scales[None, :]
    return tl.where(valid[None, :], scores, float("-inf"))


@triton.jit
def load_key_scales(
    exponent_ptr, pages, offsets, valid, exponent_stride_page, HAS_EXPONENT: tl.constexpr
):
    """The powers of two that keys are stored without, float32 `[ROWS]`; ones if there are none."""
    if HAS_EXPONENT:
        exponents = tl.load(
            exponent_ptr + pages * exponent_stride_page + offsets, mask=valid, other=127
        )
        scales = exponent_to_scale(exponents)
    else:
        scales = tl.full([offsets.shape[0]], 1.0, tl.float32)
    return scales


@triton.jit
def anchor_threshold(
    query, factor, key_ptr, exponent_ptr, block_table_row_ptr, seq_len, delta, columns,
    key_stride_page, key_stride_token, exponent_stride_page,
    PAGE_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
    HAS_EXPONENT: tl.constexpr, ANCHOR_TOKENS: tl.constexpr,
):
    """The largest base score of a request's first and last tokens minus delta, `[GROUP_PADDED]`."""
    rows = tl.arange(0, 2 * ANCHOR_TOKENS)
    positions = tl.where(rows < ANCHOR_TOKENS, rows, seq_len - 2 * ANCHOR_TOKENS + rows)
    valid = (positions >= 0) & (positions < seq_len)
    positions = tl.maximum(positions, 0)
    pages = token_pages(block_table_row_ptr, positions, valid, PAGE_SIZE)
    offsets = positions % PAGE_SIZE
    key_scales = load_key_scales(
        exponent_ptr, pages, offsets, valid, exponent_stride_page, HAS_EXPONENT
    )
    scores = base_scores(
        query, factor, key_ptr, pages, offsets, key_scales, valid, columns,
        key_stride_page, key_stride_token, HEAD_SIZE, HEAD_SIZE_PADDED,
    )
    return tl.max(scores, axis=1) - delta


@triton.jit
def spread_to_rows(values, SCAN_BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Repeats numbers of blocks, `[SCAN_BLOCKS]`, for their rows, `[SCAN_BLOCKS * BLOCK_SIZE]`."""
    blocks = tl.arange(0, SCAN_BLOCKS)
    rows = tl.arange(0, SCAN_BLOCKS * BLOCK_SIZE)
    spread = tl.zeros([SCAN_BLOCKS * BLOCK_SIZE], values.dtype)
    for block in tl.static_range(SCAN_BLOCKS):
        value = tl.sum(tl.where(blocks == block, values, 0), axis=0)
        spread = tl.where(rows // BLOCK_SIZE == block, value, spread)
    return spread


@triton.jit
def decode_scan_kernel(
    kept_by_item_ptr,
    kept_counts_ptr,
    scores_ptr,
    query_ptr,
    key_ptr,
    exponent_ptr,
    block_table_ptr,
    work_ptr,
    threshold_ptr,
    delta_ptr,
    scale_log2,
    min_context,
    num_score_blocks,
    delta_stride,
    kept_stride_head,
    query_stride_request,
    query_stride_head,
    block_table_stride,
    key_stride_page,
    key_stride_head,
    key_stride_token,
    exponent_stride_page,
    exponent_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCAN_BLOCKS: tl.constexpr,
    ANCHOR_TOKENS: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_EXPONENT: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    EARLY_BLOCKS: tl.constexpr,
):
    """One program: one work item, one KV head.

    Writes the entries of the item's kept blocks in order to `kept_by_item[head, blocks of the
    requests before + first block of the item ...]` and their number to `kept_counts[item, head]`;
    the scores of kept blocks, log2 units, to `scores[blocks of the requests before + block,
    heads]`, if the request's blocks are among the first `num_score_blocks`.
    """
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.load(work_ptr + item * 8)
    if request < 0:
        return
    index = tl.load(work_ptr + item * 8 + 1)
    num_items = tl.load(work_ptr + item * 8 + 2)
    num_blocks = tl.load(work_ptr + item * 8 + 3)
    block_offset = tl.load(work_ptr + item * 8 + 4)
    seq_len = tl.load(work_ptr + item * 8 + 5)
    block_begin = index * num_blocks // num_items
    block_end = (index + 1) * num_blocks // num_items
    if PDL:
        if num_blocks <= num_items * EARLY_BLOCKS:
            tl.extra.cuda.gdc_launch_dependents()
    block_table_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    kept_ptr = (
        kept_by_item_ptr + kv_head.to(tl.int64) * kept_stride_head + block_offset + block_begin
    )
    scan_blocks = tl.arange(0, SCAN_BLOCKS)
    delta = tl.load(delta_ptr + request * delta_stride)
    if (seq_len < min_context) | (delta == float("inf")):
        for block in range(block_begin, block_end, SCAN_BLOCKS):
            blocks = block + scan_blocks
            entries = block_entries(
                block_table_row_ptr, blocks, blocks < block_end, PAGE_SIZE, BLOCK_SIZE
            )
            tl.store(kept_ptr + blocks - block_begin, entries, mask=blocks < block_end)
        tl.store(kept_counts_ptr + item * NUM_KV_HEADS + kv_head, block_end - block_begin)
        return

    group = tl.arange(0, GROUP_PADDED)
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    query, factor = load_query(
        query_ptr + request.to(tl.int64) * query_stride_request
        + kv_head * GROUP * query_stride_head,
        query_stride_head, group, columns, scale_log2, GROUP, HEAD_SIZE, NORMALISE, DTYPE,
    )
    key_ptr += kv_head.to(tl.int64) * key_stride_head
    if HAS_EXPONENT:
        exponent_ptr += kv_head.to(tl.int64) * exponent_stride_head
    rows = tl.arange(0, SCAN_BLOCKS * BLOCK_SIZE)
    scan_end = tl.minimum(block_end * BLOCK_SIZE, seq_len)
    WHOLE_BLOCKS: tl.constexpr = PAGE_SIZE % BLOCK_SIZE == 0
    if WHOLE_BLOCKS:  # pages run ahead of their use by the pipeline's depth, exponents by one
        blocks = block_begin + scan_blocks
        entries = block_entries(
            block_table_row_ptr, blocks, blocks < block_end, PAGE_SIZE, BLOCK_SIZE
        )
        positions = block_begin * BLOCK_SIZE + rows
        pages = spread_to_rows(entry_page(entries, PAGE_SIZE, BLOCK_SIZE), SCAN_BLOCKS, BLOCK_SIZE)
        key_scales = load_key_scales(
            exponent_ptr, pages, positions % PAGE_SIZE, positions < scan_end,
            exponent_stride_page, HAS_EXPONENT,
        )
    if HAS_THRESHOLD:
        threshold = tl.load(
            threshold_ptr + (request * NUM_KV_HEADS + kv_head) * GROUP + group,
            mask=group < GROUP,
            other=0.0,
        )
    else:
        threshold = anchor_threshold(
            query, factor, key_ptr, exponent_ptr, block_table_row_ptr, seq_len, delta, columns,
            key_stride_page, key_stride_token, exponent_stride_page,
            PAGE_SIZE, HEAD_SIZE, HEAD_SIZE_PADDED, HAS_EXPONENT, ANCHOR_TOKENS,
        )
    # rows that pad the group never keep a block
    threshold = tl.where(group < GROUP, threshold, float("inf"))

    num_kept = 0
    newest_block = num_blocks - 1
    for block in tl.range(block_begin, block_end, SCAN_BLOCKS, num_stages=STAGES):
        blocks = block + scan_blocks
        positions = block * BLOCK_SIZE + rows
        valid = positions < scan_end
        offsets = positions % PAGE_SIZE
        if WHOLE_BLOCKS:
            next_blocks = blocks + SCAN_BLOCKS
            next_entries = block_entries(
                block_table_row_ptr, next_blocks, next_blocks < block_end, PAGE_SIZE, BLOCK_SIZE
            )
            next_positions = positions + SCAN_BLOCKS * BLOCK_SIZE
            next_pages = spread_to_rows(
                entry_page(next_entries, PAGE_SIZE, BLOCK_SIZE), SCAN_BLOCKS, BLOCK_SIZE
            )
            next_key_scales = load_key_scales(
                exponent_ptr, next_pages, next_positions % PAGE_SIZE, next_positions < scan_end,
                exponent_stride_page, HAS_EXPONENT,
            )
            pages = spread_to_rows(
                entry_page(entries, PAGE_SIZE, BLOCK_SIZE), SCAN_BLOCKS, BLOCK_SIZE
            )
        else:
            entries = blocks.to(tl.int64) << 32
            pages = token_pages(block_table_row_ptr, positions, valid, PAGE_SIZE)
            key_scales = load_key_scales(
                exponent_ptr, pages, offsets, valid, exponent_stride_page, HAS_EXPONENT
            )
        scores = base_scores(
            query, factor, key_ptr, pages, offsets, key_scales, valid, columns,
            key_stride_page, key_stride_token, HEAD_SIZE, HEAD_SIZE_PADDED,
        )
        margin = tl.max(scores - threshold[:, None], axis=0)  # [SCAN_BLOCKS * BLOCK_SIZE]
        margin = tl.max(tl.reshape(margin, (SCAN_BLOCKS, BLOCK_SIZE)), axis=1)
        keep = (margin >= 0.0) | (blocks == newest_block)
        keep = (keep & (blocks < block_end)).to(tl.int32)
        place = num_kept + tl.cumsum(keep, axis=0) - keep
        tl.store(kept_ptr + place, entries, mask=keep != 0)
        tile_kept = tl.sum(keep, axis=0)
        if (tile_kept > 0) & (block_offset + num_blocks <= num_score_blocks):
            kept_rows = spread_to_rows(keep, SCAN_BLOCKS, BLOCK_SIZE) != 0
            score_rows = (block_offset + block + rows // BLOCK_SIZE).to(tl.int64)
            score_rows = score_rows * (NUM_KV_HEADS * GROUP * BLOCK_SIZE) + rows % BLOCK_SIZE
            tl.store(
                scores_ptr + (kv_head * GROUP + group)[:, None] * BLOCK_SIZE + score_rows[None, :],
                scores,
                mask=(group < GROUP)[:, None] & kept_rows[None, :],
            )
        num_kept += tile_kept
        if WHOLE_BLOCKS:
            entries = next_entries
            key_scales = next_key_scales
    tl.store(kept_counts_ptr + item * NUM_KV_HEADS + kv_head, num_kept)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def decode_threshold_kernel(
    threshold_ptr,
    query_ptr,
    key_ptr,
    exponent_ptr,
    block_table_ptr,
    seq_lens_ptr,
    delta_ptr,
    scale_log2,
    delta_stride,
    query_stride_request,
    query_stride_head,
    block_table_stride,
    key_stride_page,
    key_stride_head,
    key_stride_token,
    exponent_stride_page,
    exponent_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ANCHOR_TOKENS: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_EXPONENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: the thresholds of one request and KV head, of `[num_reqs, num_heads]`."""
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + request)
    if seq_len == 0:
        return
    group = tl.arange(0, GROUP_PADDED)
    columns = tl.arange(0, HEAD_SIZE_PADDED)
    query, factor = load_query(
        query_ptr + request.to(tl.int64) * query_stride_request
        + kv_head * GROUP * query_stride_head,
        query_stride_head, group, columns, scale_log2, GROUP, HEAD_SIZE, NORMALISE, DTYPE,
    )
    key_ptr += kv_head.to(tl.int64) * key_stride_head
    if HAS_EXPONENT:
        exponent_ptr += kv_head.to(tl.int64) * exponent_stride_head
    threshold = anchor_threshold(
        query, factor, key_ptr, exponent_ptr,
        block_table_ptr + request.to(tl.int64) * block_table_stride,
        seq_len, tl.load(delta_ptr + request * delta_stride), columns,
        key_stride_page, key_stride_token, exponent_stride_page,
        PAGE_SIZE, HEAD_SIZE, HEAD_SIZE_PADDED, HAS_EXPONENT, ANCHOR_TOKENS,
    )
    tl.store(
        threshold_ptr + (request * NUM_KV_HEADS + kv_head) * GROUP + group,
        threshold,
        mask=group < GROUP,
    )
