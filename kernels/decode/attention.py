"""Pruned decode attention over the paged cache."""

import math

import torch
import triton

from ..cache.page_layout import KVPlanes
from ..runtime import compute_dtype, pdl_arguments
from .kernel import decode_kernel
from .plan import DecodePlan, DecodeScratch
from .scan import decode_threshold_kernel

ANCHOR_TOKENS = 16
"""How many of a request's first and of its last tokens set the threshold."""

MAX_QUERY_ROWS = 64
"""Query rows of a KV head, at most: its query heads, of all query tokens of a request."""


def decode_attention(
    query: torch.Tensor,
    planes: KVPlanes,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    plan: DecodePlan,
    scratch: DecodeScratch,
    output: torch.Tensor,
    *,
    scale: float,
    delta: torch.Tensor | None,
    query_start_loc: torch.Tensor | None = None,
    query_len: int | None = None,
    min_context: int = 0,
    precomputed_threshold: torch.Tensor | bool = False,
    counters: torch.Tensor | None = None,
    launch_pdl: bool = False,
) -> None:
    """Attention of a request's newest tokens over its cached keys and values.

    A block of tokens is skipped when every query row of its KV group (the group's heads, of all
    query tokens) scores below `threshold = max(base score over the first and last 16 tokens) -
    delta` on all its tokens; the blocks of the query tokens are always kept. Scores of the
    decision come from the FP8 base alone, those of the softmax from base + residual. The softmax
    mass dropped is at most `num_dropped_tokens * 2^-delta`, up to the base's rounding.

    One launch (two with `precomputed_threshold=True`), no synchronisation: fit for CUDA graphs.

    Args:
        query: `[num_tokens, num_heads, head_size]`, float16 or bfloat16: the newest tokens of
            every request, which see their past and themselves.
        planes: the cache; see `PageLayout.split`.
        block_table: int32 `[num_reqs, max_pages]`.
        seq_lens: int32 `[num_reqs]`, query tokens included; 0 is a padding row, whose output
            becomes 0.
        plan: `DecodePlan.update(seq_lens)`.
        scratch: for the plan's limits.
        output: like `query`; written.
        scale: factor on q . k, natural units (1 / sqrt(head_size) as a rule).
        query_start_loc: int32 `[num_reqs + 1]`: where the tokens of every request begin in
            `query`, up to `query_len` of them, none in padding rows; None: all have as many.
        query_len: the most query tokens of a request, at most MAX_QUERY_ROWS rows a KV head;
            None: as `query` has without `query_start_loc`.
        delta: float32 `[num_reqs]` or `[1]`, log2 units, inf for no pruning; None: no request
            is pruned.
        min_context: requests with fewer tokens run unpruned.
        precomputed_threshold: a tensor: thresholds, float32 `[num_tokens, num_heads]`,
            contiguous, log2 units, in use where `delta` is finite and the request not shorter than
            `min_context`; True: compute them in a kernel of their own; False: in every program.
        counters: int64 `[2]`, to which kept and all blocks are added.
        launch_pdl: start before the kernel ahead in the stream has ended (programmatic dependent
            launch, from compute capability 9.0 on; no effect elsewhere, nor where nothing is
            pruned and a program has a multiprocessor for itself). That kernel may write all that
            this one reads except `plan`, `block_table` and `query_start_loc`, and lets this one start, if at all, only
            after it has itself waited for the kernels before it, as those here do.
    """
    num_heads, head_size = query.shape[1:]
    num_reqs = seq_lens.shape[0]
    limits, tuning = plan.limits, plan.limits.tuning_of(num_reqs)
    if query_start_loc is None:
        query_len = query.shape[0] // num_reqs
        assert query.shape[0] == num_reqs * query_len
    assert query_len is not None and query_len <= limits.query_len
    assert query_start_loc is None or query_start_loc.shape == (num_reqs + 1,)
    num_kv_heads = planes.num_kv_heads
    group = num_heads // num_kv_heads
    rows = triton.next_power_of_2(group * query_len)
    assert num_heads % num_kv_heads == 0 and rows <= MAX_QUERY_ROWS
    assert (num_heads, num_kv_heads) == (limits.num_heads, limits.num_kv_heads)
    assert delta is None or delta.shape[0] in (1, num_reqs)
    assert query.stride(2) == output.stride(2) == block_table.stride(1) == 1
    residual, exponent = planes.key_residual, planes.key_exponent
    value_exponent = planes.value_exponent
    fp8_key = planes.key.dtype == torch.float8_e4m3fn
    # Hopper adds E4M3 products to 14 bits: enough for bfloat16, not for float16
    fp8_products = fp8_key and query.dtype == torch.bfloat16
    fp8_value = planes.value.dtype == torch.float8_e4m3fn
    scale_log2 = scale * math.log2(math.e)
    exponent_strides = exponent.stride()[:2] if exponent is not None else (0, 0)
    block_size = limits.block_size
    unit = math.gcd(planes.page_size, block_size)
    tile_blocks = limits.tile_blocks(num_reqs)
    if fp8_key and not fp8_products:
        tile_blocks = max(1, tile_blocks // 4)  # keys are converted, in registers
    num_warps = tuning.num_warps * (2 if rows > 32 else 1)
    merge_rows = tuning.merge_rows * 128 // max(128, triton.next_power_of_2(head_size))
    # programs that are to have a multiprocessor each would share those that are free early
    starts_early = delta is not None or tuning.dense_programs_per_processor > 1
    attend_stages = tuning.attend_stages if delta is not None else tuning.dense_stages
    common = {
        "KEY_STRIDE": planes.key.stride(2),
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "QUERY_LEN": query_len,
        "ROWS_PADDED": max(8, rows),
        "HEAD_SIZE": head_size,
        "HEAD_SIZE_PADDED": triton.next_power_of_2(head_size),
        "PAGE_SIZE": planes.page_size,
        "ANCHOR_TOKENS": ANCHOR_TOKENS,
        "PARTS": 2 if fp8_products else 1,
        "HAS_EXPONENT": exponent is not None,
        "DTYPE": compute_dtype(planes.key.dtype if fp8_products else query.dtype),
    }
    threshold = scratch.threshold
    delta_stride = int(delta is not None and delta.shape[0] > 1)
    if isinstance(precomputed_threshold, torch.Tensor):
        threshold = precomputed_threshold
        assert threshold.shape == query.shape[:2] and threshold.is_contiguous()
        assert threshold.dtype == torch.float32
    elif precomputed_threshold and delta is not None:
        decode_threshold_kernel[(num_reqs, num_kv_heads)](
            threshold, query, planes.key, exponent, block_table, seq_lens, query_start_loc,
            delta, scale_log2,
            delta_stride, query.stride(0), query.stride(1), block_table.stride(0),
            *planes.key.stride()[:2], *exponent_strides, num_warps=4, **common,
        )
    decode_kernel[(num_kv_heads, plan.num_items)](
        output, scratch.partial_output, scratch.partial_lse, scratch.scores, plan.arrivals,
        counters, query, planes.key, residual, exponent, planes.value, value_exponent, block_table,
        plan.work, query_start_loc, threshold, delta, scale_log2, min_context, delta_stride,
        query.stride(0), query.stride(1), output.stride(0), output.stride(1),
        block_table.stride(0), *planes.key.stride()[:2],
        *(residual.stride()[:2] if residual is not None else (0, 0)),
        *exponent_strides, *planes.value.stride()[:2],
        *(value_exponent.stride()[:2] if value_exponent is not None else (0, 0)),
        RESIDUAL_STRIDE=residual.stride(2) if residual is not None else 0,
        VALUE_STRIDE=planes.value.stride(2),
        BLOCK_SIZE=block_size,
        UNIT=unit,
        # a warp holds the places of a chunk, up to four elements a thread
        CHUNK_BLOCKS=max(tile_blocks, min(limits.chunk_blocks(num_reqs), 128 * unit // block_size)),
        TILE_BLOCKS=tile_blocks,
        WHOLE_PAGES=planes.whole_pages,
        PRUNE=delta is not None,
        HAS_THRESHOLD=precomputed_threshold is not False,
        HAS_RESIDUAL=residual is not None,
        HAS_VALUE_EXPONENT=value_exponent is not None,
        RESIDUAL_SCALE=planes.residual_scale,
        RECORD=counters is not None,
        VALUE_DTYPE=compute_dtype(torch.bfloat16 if fp8_value else planes.value.dtype),
        SCAN_STAGES=tuning.scan_stages,
        ATTEND_STAGES=attend_stages,
        MERGE_ROWS=rows,
        MERGE_SLOTS=max(1, merge_rows // max(1, rows // num_warps)),
        **pdl_arguments(query.device, launch_pdl and starts_early),
        num_warps=num_warps,
        maxnreg=tuning.max_registers if rows <= 16 else 255,
        **common,
    )
