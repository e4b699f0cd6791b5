"""FlashAttention 3 as vLLM calls it in decode, with a bf16 and with an fp8 cache."""

import math

import torch

from vllm_ffa_fp8fp8.bench.cells import FA3_FP8, Shape
from vllm_ffa_fp8fp8.bench.decoder import CheckFailed, relative_error
from vllm_ffa_fp8fp8.bench.inputs import Inputs
from vllm_ffa_fp8fp8.bench.timing import time_graph

HEAD_SIZES = (64, 96, 128, 192, 256)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float8_e4m3fn: 1e-1}
SPLITS = (0, 32)  # FlashAttention's own choice; vLLM's, with a schedule made beforehand


def missing_peers(head_size: int) -> str | None:
    """Why FlashAttention 3 cannot run here, or None."""
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import (
            fa_version_unsupported_reason,
            is_fa_version_supported,
        )
    except (ImportError, AssertionError) as error:
        return f"vLLM's FlashAttention is missing: {error}"
    if not is_fa_version_supported(3):
        return f"no FlashAttention 3 here: {fa_version_unsupported_reason(3)}"
    if head_size not in HEAD_SIZES:
        return f"FlashAttention 3 has no head size {head_size}"
    return None


def time_peer(
    shape: Shape,
    sets: list[Inputs],
    peer: str,
    write: bool = False,
    exact: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[float, float]:
    """Microseconds of the better of two schedules, and the relative error of its output; with
    `write` behind vLLM's write of the newest tokens to the cache.

    With `exact`, the output of the first requests of the first set, the error is against that, and
    what rounding does to it is no failure. `scale` is the factor on q . k, 1 / sqrt(head_size) if
    None. Raises CheckFailed where an output is wrong.
    """
    from vllm._custom_ops import reshape_and_cache_flash
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    dtype = torch.float8_e4m3fn if peer == FA3_FP8 else torch.bfloat16
    geometry, device = shape.geometry, sets[0].query.device
    scale = geometry.head_size**-0.5 if scale is None else scale
    cu_query_lens = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
    descale, cache_dtype = None, "auto"
    if peer == FA3_FP8:
        descale = torch.ones(shape.batch, geometry.num_kv_heads, device=device)
        cache_dtype = "fp8"
    one = torch.ones(1, device=device)
    tensors = [
        (
            *(stored(tensor, dtype) for tensor in (s.query, s.key, s.value)),
            s.block_table,
            s.seq_lens,
            s.newest,
        )
        for s in sets
    ]
    outputs = [torch.full_like(s.query, float("nan")) for s in sets]

    def launch(query, key, value, block_table, seq_lens, newest, output, schedule):
        if write:
            reshape_and_cache_flash(
                newest.key, newest.value, key, value, newest.slot_mapping, cache_dtype, one, one
            )
        flash_attn_varlen_func(
            query, key, value, 1, cu_query_lens, shape.seq_len, seqused_k=seq_lens,
            softmax_scale=scale, causal=True, block_table=block_table,
            out=output, fa_version=3, q_descale=descale, k_descale=descale, v_descale=descale,
            **schedule,
        )  # fmt: skip

    expected = exact
    if exact is None:
        expected = dense_reference(*tensors[0][:5], scale=scale)
    times, errors = [], []
    for splits in SPLITS:
        schedule = {}
        if splits:
            metadata = get_scheduler_metadata(
                batch_size=shape.batch, max_seqlen_q=1, max_seqlen_k=shape.seq_len,
                num_heads_q=geometry.num_heads, num_heads_kv=geometry.num_kv_heads,
                headdim=geometry.head_size, cache_seqlens=sets[0].seq_lens, qkv_dtype=dtype,
                cu_seqlens_q=cu_query_lens, page_size=geometry.page_size, causal=True,
                num_splits=splits,
            )  # fmt: skip
            schedule = {"scheduler_metadata": metadata, "num_splits": splits}
        launch(*tensors[0], outputs[0], schedule)
        errors.append(relative_error(outputs[0][: len(expected)], expected))
        if not errors[-1] < (TOLERANCE[dtype] if exact is None else math.inf):
            raise CheckFailed(f"{shape}: {peer} is wrong, error {errors[-1]:.1e}")
        times.append(
            time_graph(
                [
                    lambda t=t, o=o, s=schedule: launch(*t, o, s)
                    for t, o in zip(tensors, outputs, strict=True)
                ]
            )
        )
    return min(zip(times, errors, strict=True))


def stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`; what is too large becomes the largest number, as in vLLM's cache."""
    if tensor.dtype == dtype:
        return tensor
    largest = torch.finfo(dtype).max
    return tensor.clamp(-largest, largest).to(dtype)


def dense_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    requests: int = 1,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Attention of the first requests in `dtype`, `[requests, num_heads, head_size]`."""
    outputs = []
    for request in range(requests):
        pages, seq_len = block_table[request].long(), int(seq_lens[request])
        for head, rows in enumerate(query[request].to(dtype).chunk(key.shape[2])):
            keys, values = (
                plane[pages][..., head, :].flatten(0, 1)[:seq_len].to(dtype)
                for plane in (key, value)
            )
            outputs.append(torch.softmax(rows @ keys.T * scale, dim=-1) @ values)
    return torch.cat(outputs).view(requests, *query.shape[1:])
