"""Pruned decode attention over the paged cache: scan, attend, merge."""

import math

import torch
import triton

from .decode_attend import decode_attend_kernel
from .decode_merge import decode_merge_kernel
from .decode_plan import DecodePlan, DecodeScratch
from .decode_scan import decode_scan_kernel, decode_threshold_kernel
from .page_layout import KVPlanes
from .runtime import compute_dtype, overlap_supported

ANCHOR_TOKENS = 16
"""How many of a request's first and of its last tokens set the threshold."""


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
    min_context: int = 0,
    precomputed_threshold: torch.Tensor | bool = False,
    counters: torch.Tensor | None = None,
) -> None:
    """Attention of one query token a request over its cached keys and values.

    A block of tokens is skipped when every query head of its KV group scores below `threshold =
    max(base score over the first and last 16 tokens) - delta` on all its tokens; the block of
    the newest token is always kept. Scores of the decision come from the FP8 base alone, those
    of the softmax from base + residual. The softmax mass dropped is at most
    `num_dropped_tokens * 2^-delta`, up to the base's rounding.

    Launches only, no synchronisation: fit for CUDA graphs.

    Args:
        query: `[num_reqs, num_heads, head_size]`, float16 or bfloat16.
        planes: the cache; see `PageLayout.split`.
        block_table: int32 `[num_reqs, max_pages]`.
        seq_lens: int32 `[num_reqs]`; 0 is a padding row, whose output becomes 0.
        plan: `DecodePlan.update(seq_lens)`.
        scratch: for the plan's limits.
        output: like `query`; written.
        scale: factor on q . k, natural units (1 / sqrt(head_size) as a rule).
        delta: float32 `[num_reqs]` or `[1]`, log2 units, inf for no pruning; None: no request
            is pruned.
        min_context: requests with fewer tokens run unpruned.
        precomputed_threshold: a tensor: thresholds, float32 `[num_reqs, num_heads]`, log2 units;
            True: compute them in a kernel of their own; False: in every program of the scan.
        counters: int64 `[2]`, to which kept and all blocks are added.
    """
    num_reqs, num_heads, head_size = query.shape
    limits, tuning = plan.limits, plan.limits.tuning
    num_kv_heads = planes.num_kv_heads
    residual, exponent = planes.key_residual, planes.key_exponent
    fp8_key = planes.key.dtype == torch.float8_e4m3fn
    scale_log2 = scale * math.log2(math.e)
    # Where pages do not hold whole blocks, loads wait for loads of their own iteration, which
    # Triton 3.9 fails to compile with more than one stage.
    pipelined = planes.page_size % limits.block_size == 0
    exponent_strides = exponent.stride()[:2] if exponent is not None else (0, 0)
    pdl = tuning.overlap_launches and overlap_supported(query.device)
    grid = (plan.num_items, num_kv_heads)
    common = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "GROUP_PADDED": max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        "HEAD_SIZE": head_size,
        "HEAD_SIZE_PADDED": triton.next_power_of_2(head_size),
        "PAGE_SIZE": planes.page_size,
        "NORMALISE": fp8_key,
        "HAS_EXPONENT": exponent is not None,
        "DTYPE": compute_dtype(torch.float16 if fp8_key else query.dtype),
    }
    delta_stride = int(delta is not None and delta.shape[0] > 1)
    if delta is not None:
        threshold = scratch.threshold
        if isinstance(precomputed_threshold, torch.Tensor):
            threshold = precomputed_threshold
        elif precomputed_threshold:
            decode_threshold_kernel[(num_reqs, num_kv_heads)](
                threshold, query, planes.key, exponent, block_table, seq_lens, delta, scale_log2,
                delta_stride, query.stride(0), query.stride(1), block_table.stride(0),
                *planes.key.stride()[:3], *exponent_strides,
                ANCHOR_TOKENS=ANCHOR_TOKENS, num_warps=4, **common,
            )
        decode_scan_kernel[grid](
            scratch.kept_by_item, scratch.kept_counts, scratch.scores, query, planes.key,
            exponent, block_table, plan.work, threshold, delta, scale_log2, min_context,
            limits.num_score_blocks, delta_stride, scratch.kept_by_item.stride(0),
            query.stride(0), query.stride(1), block_table.stride(0), *planes.key.stride()[:3],
            *exponent_strides,
            BLOCK_SIZE=limits.block_size,
            SCAN_BLOCKS=max(1, tuning.scan_tokens // limits.block_size),
            ANCHOR_TOKENS=ANCHOR_TOKENS, HAS_THRESHOLD=precomputed_threshold is not False,
            STAGES=tuning.scan_stages if pipelined else 1, num_warps=tuning.scan_warps, PDL=pdl,
            EARLY_BLOCKS=tuning.early_blocks, **common,
        )
    decode_attend_kernel[grid](
        output, scratch.partial_output, scratch.partial_lse, scratch.kept_blocks,
        scratch.kept_by_item, scratch.kept_counts, scratch.scores, counters, query, planes.key,
        residual, exponent, planes.value, block_table, plan.work, delta, scale_log2, min_context,
        limits.num_score_blocks, delta_stride, scratch.kept_by_item.stride(0), query.stride(0),
        query.stride(1), output.stride(0), output.stride(1), block_table.stride(0),
        *planes.key.stride()[:3],
        *(residual.stride()[:3] if residual is not None else (0, 0, 0)),
        *exponent_strides, *planes.value.stride()[:3],
        BLOCK_SIZE=limits.block_size,
        ITEMS_PADDED=triton.next_power_of_2(limits.max_request_items), PRUNE=delta is not None,
        HAS_RESIDUAL=residual is not None, RESIDUAL_SCALE=planes.residual_scale,
        RECORD=counters is not None, VALUE_DTYPE=compute_dtype(planes.value.dtype),
        STAGES=tuning.attend_stages if pipelined else 1,
        DENSE_STAGES=tuning.dense_stages if pipelined else 1,
        num_warps=tuning.attend_warps, PDL=pdl and delta is not None,
        launch_pdl=pdl and delta is not None, EARLY_BLOCKS=tuning.early_blocks, **common,
    )
    decode_merge_kernel[(num_reqs, num_heads)](
        output, scratch.partial_output, scratch.partial_lse, plan.item_offsets,
        output.stride(0), output.stride(1),
        NUM_HEADS=num_heads, HEAD_SIZE=head_size,
        HEAD_SIZE_PADDED=triton.next_power_of_2(head_size), ITEMS=16, num_warps=4,
        PDL=pdl, launch_pdl=pdl,
    )
