"""Pruned decode attention over the paged cache."""

import math

import torch
import triton

from ..cache.page_layout import KVPlanes
from ..cache.paged_cache import page_shape, paged_cache
from ..cache.paged_rows import block_shape
from ..counters import COUNTERS
from ..runtime import compute_dtype, launch, pdl_arguments
from .code_scan import ENCODERS, CodeScan
from .draw import draw_kernel
from .kernel import KernelTuning, decode_kernel
from .limits import DecodeLimits
from .plan import DecodePlan, DecodeScratch
from .query import QueryShape, head_rows
from .scan import ANCHOR_TOKENS, decode_threshold_kernel
from .weigh import weigh_kernel

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
    delta: torch.Tensor | None = None,
    tau: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    logits_soft_cap: float | None = None,
    layer: int = 0,
    query_start_loc: torch.Tensor | None = None,
    query_len: int | None = None,
    min_context: int = 0,
    precomputed_threshold: torch.Tensor | bool = False,
    counters: torch.Tensor | None = None,
    launch_pdl: bool = False,
) -> None:
    """Attention of a request's newest tokens over its cached keys and values.

    With `delta` a block of tokens is skipped when every query row of its KV group (the group's
    heads, of all query tokens) scores below `threshold = max(base score over the first and last
    16 tokens) - delta` on all its tokens; the blocks of the query tokens are always kept. Scores
    of the decision come from the FP8 base alone, those of the softmax from base + residual. The
    softmax mass dropped is at most `num_dropped_tokens * 2^-delta`, up to the base's rounding.

    With `tau` a block is read with probability `min(1, share / tau)` and counts the inverse as
    often, where its share is the largest over the query heads of a KV head of its part of the
    softmax; see `choose_blocks`, and docs/accuracy.md for the bound of the error.

    One launch (two with `tau` or `precomputed_threshold=True`), no synchronisation: fit for CUDA
    graphs.

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
        delta: float32 `[num_reqs]` or `[1]`, log2 units, inf for no pruning.
        tau: float32 `[num_reqs]` or `[1]`, a share of the softmax, 0 to read everything. Not
            beside `delta`, and as the plan's limits have their `rule`; neither: no request is
            pruned.
        sinks: `[num_heads]`, natural units, contiguous: of each head a score that takes part in the
            softmax, and in what is skipped, and has no value; None: none.
        logits_soft_cap: a score s, natural units, becomes `cap * tanh(s / cap)`, in what is
            skipped, too, and sinks do not; None or 0: no cap.
        layer: tells the draws of layers apart.
        min_context: requests with fewer tokens run unpruned.
        precomputed_threshold: a tensor: thresholds of capped scores, float32 `[num_tokens,
            num_heads]`, contiguous, log2 units, in use where `delta` is finite and the request not
            shorter than `min_context`; True: compute them in a kernel of their own; False: in every
            program.
        counters: of `new_counters`, contiguous, to which is added.
        launch_pdl: start before the kernel ahead in the stream has ended (programmatic dependent
            launch, from compute capability 9.0 on; no effect elsewhere, nor where nothing is
            pruned and a program has a multiprocessor for itself). That kernel may write all that
            this one reads except `plan`, `block_table` and `query_start_loc`, and lets this one
            start, if at all, only after it has itself waited for the kernels before it, as those
            here do.
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
    assert delta is None or tau is None
    limit = delta if tau is None else tau
    rule = "none" if limit is None else "threshold" if tau is None else "share"
    assert rule in ("none", limits.rule)
    assert limit is None or limit.shape[0] in (1, num_reqs)
    assert sinks is None or (sinks.shape == (num_heads,) and sinks.is_contiguous())
    counters_shape = (num_kv_heads, len(COUNTERS))
    assert counters is None or (counters.shape == counters_shape and counters.is_contiguous())
    assert block_table.stride(1) == 1 and planes.page_size % ANCHOR_TOKENS.value == 0
    fp8_key = planes.key.dtype == torch.float8_e4m3fn
    # Hopper adds E4M3 products to 14 bits: enough for bfloat16, not for float16
    fp8_products = fp8_key and query.dtype == torch.bfloat16
    fp8_value = planes.value.dtype == torch.float8_e4m3fn
    num_warps = tuning.num_warps * (2 if rows > 32 else 1)
    # programs that are to have a multiprocessor each would share those that are free early
    starts_early = limit is not None or tuning.dense_programs_per_processor > 1
    common = {
        "query": head_rows(query),
        "cache": paged_cache(planes),
        "block_table_ptr": block_table,
        "block_table_stride": block_table.stride(0),
        "query_start_loc_ptr": query_start_loc,
        "limit_ptr": limit,
        "limit_stride": int(limit is not None and limit.shape[0] == num_reqs),
        "scale_log2": scale * math.log2(math.e),
        "soft_cap": logits_soft_cap * math.log2(math.e) if logits_soft_cap else None,
        "PAGE": page_shape(planes),
        "QUERY": QueryShape(
            num_kv_heads, group, query_len, group * query_len, max(8, rows),
            PARTS=2 if fp8_products else 1,
        ),
        "DTYPE": compute_dtype(planes.key.dtype if fp8_products else query.dtype),
    }
    threshold = None
    if isinstance(precomputed_threshold, torch.Tensor):
        threshold = precomputed_threshold
        assert threshold.shape == query.shape[:2] and threshold.is_contiguous()
        assert threshold.dtype == torch.float32
    elif precomputed_threshold and delta is not None:
        threshold = scratch.threshold
        launch(
            decode_threshold_kernel, (num_reqs, num_kv_heads), threshold,
            seq_lens_ptr=seq_lens, num_warps=4, **common,
        )
    tunings = {
        "TUNING": _kernel_tuning(
            limits, num_reqs, planes, rows, num_warps, rule=rule, query_dtype=query.dtype
        ),
        "num_warps": num_warps,
        "maxnreg": tuning.max_registers if rows <= 16 else 255,
    }
    value_dtype = compute_dtype(torch.bfloat16 if fp8_value else planes.value.dtype)
    pdl = pdl_arguments(query.device, launch_pdl and starts_early)
    grid = (num_kv_heads, plan.num_items)
    if rule != "share":
        launch(
            decode_kernel, grid, head_rows(output), scratch, plan.work, plan.arrivals,
            threshold_ptr=threshold, sinks_ptr=sinks, min_context=min_context,
            counters_ptr=counters, BLOCK=block_shape(limits.span, planes.page_size),
            COUNTED=limits.block_size, PRUNE=rule != "none", VALUE_DTYPE=value_dtype,
            **pdl, **tunings, **common,
        )
        return
    common |= {
        "min_context": min_context,
        "SPAN": block_shape(limits.span, planes.page_size),
        "BLOCK": block_shape(limits.block_size, planes.page_size),
    }
    codes, weigh_tunings, num_weighing = None, tunings, plan.num_items
    if planes.key_code is not None:
        codes = CodeScan(tuning.code_runs, tuning.code_stages, limits.code_lag)
        # the newest tokens alone
        newest = tunings["TUNING"]._replace(CHUNK_BLOCKS=2, TILE_BLOCKS=1, SCAN_STAGES=2)
        weigh_tunings = {
            "TUNING": newest,
            "num_warps": tuning.code_warps * (2 if rows > 32 or head_size > 128 else 1),
            "maxnreg": tuning.code_registers if rows <= 16 else 255,
        }
        num_weighing = ENCODERS.value + num_weighing * newest.WEIGH_PARTS
    weigh_grid = (num_kv_heads, num_weighing)
    launch(
        weigh_kernel, weigh_grid, scratch, plan.work, plan.mass_places, plan.arrivals, seq_lens,
        num_reqs, CODES=codes, **pdl, **weigh_tunings, **common,
    )
    launch(
        draw_kernel, grid, head_rows(output), scratch, plan.work, plan.mass_places, plan.arrivals,
        layer=layer, sinks_ptr=sinks, counters_ptr=counters, VALUE_DTYPE=value_dtype,
        **pdl_arguments(query.device), **tunings, **common,
    )


def chunk_spans(
    limits: DecodeLimits, num_reqs: int, planes: KVPlanes, query_dtype: torch.dtype
) -> int:
    """How many spans a program draws from, or scans, before it attends to some of them."""
    # a warp holds the places of a chunk, up to four elements a thread
    held = 128 // block_shape(limits.span, planes.page_size).PER_BLOCK
    tile = tile_spans(limits, num_reqs, planes, query_dtype)
    return max(tile, min(limits.chunk_blocks(num_reqs), held))


def dealt(
    plan: DecodePlan, planes: KVPlanes, query_dtype: torch.dtype
) -> list[dict[str, int]]:
    """How programs share each request of the plan's batch: arguments of the oracle,
    `choose_blocks_reference`."""
    items = {request: count for request, _, count, _ in plan.work.tolist() if request >= 0}
    chunk = chunk_spans(plan.limits, len(items), planes, query_dtype)
    shared = {"span": plan.limits.span, "chunk_spans": chunk}
    return [shared | {"num_items": items[request]} for request in sorted(items)]


def tile_spans(
    limits: DecodeLimits, num_reqs: int, planes: KVPlanes, query_dtype: torch.dtype
) -> int:
    """How many spans of them it scans at a time."""
    spans = limits.tile_blocks(num_reqs)
    if planes.key.dtype == torch.float8_e4m3fn and query_dtype != torch.bfloat16:
        spans = max(1, spans // 4)  # keys are converted in registers
    return spans


def _kernel_tuning(
    limits: DecodeLimits, num_reqs: int, planes: KVPlanes, rows: int, num_warps: int,
    *, rule: str, query_dtype: torch.dtype,
) -> KernelTuning:
    tuning = limits.tuning_of(num_reqs)
    # beside 64 query rows the buffers of four do not fit the shared memory of 8.9 and 12.0
    attend_stages = {
        "none": tuning.dense_stages, "threshold": tuning.attend_stages, "share": tuning.share_stages
    }[rule]
    if rule == "share" and limits.capability[0] == 10:
        attend_stages = 1  # Triton 3.9 ends in an assertion where it pipelines runs of 16 there
    merge_rows = tuning.merge_rows * 128 // max(128, triton.next_power_of_2(planes.head_size))
    return KernelTuning(
        chunk_spans(limits, num_reqs, planes, query_dtype),
        tile_spans(limits, num_reqs, planes, query_dtype),
        tuning.scan_stages,
        attend_stages if rows <= 32 else min(attend_stages, 3),
        rows,
        max(1, merge_rows // max(1, rows // num_warps)),
        tuning.code_parts if planes.key_code is not None else 1,
    )
