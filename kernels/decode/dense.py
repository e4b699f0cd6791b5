"""Pruned decode over dense tensors, FP8 base and FP8 residual, without a page table."""

import math

import torch
import triton

from ..cache.page_layout import KVPlanes
from ..counters import new_counters
from ..runtime import INTERPRETED
from .attention import decode_attention
from .limits import DecodeLimits
from .plan import DecodePlan, DecodeScratch


def attn_forward_decode_fp8fp8(
    q: torch.Tensor,
    k_fp8: torch.Tensor,
    v: torch.Tensor,
    *,
    k_residual: torch.Tensor | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    BS: int = 128,
    SBS: int | None = None,
    delta: float = 5.0,
    precomputed_threshold: torch.Tensor | None = None,
    use_fp8_residual: bool = True,
    return_skip_ratio: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, float]:
    """Decode attention over contiguous tensors, with the kernels of the paged cache.

    Every request is one page. The residual is `K - k_fp8`, unscaled. Rows of K and V begin at
    multiples of 16 bytes, as those of contiguous tensors do. Needs a CUDA GPU, or
    TRITON_INTERPRET=1.

    Args:
        q: `[B, 1, HQ, K]`, float16 or bfloat16.
        k_fp8: `[B, T, HKV, K]`, float8_e4m3fn, or q's dtype where FP8 is not available.
        v: `[B, T, HKV, V]`, of q's dtype, V = K.
        k_residual: like `k_fp8`, if K is FP8; needed there if `use_fp8_residual`.
        scale: factor on q . k; 1 / sqrt(K) if None.
        logits_soft_cap: a score s becomes `cap * tanh(s / cap)`, natural units; None or 0: no cap.
        BS: tokens of a block; 16, 32, 64 or 128.
        SBS: tokens that are kept or skipped together, a divisor of BS; BS if None.
        delta: log2 units; inf for no pruning.
        precomputed_threshold: float32 `[B, HQ]`, log2 units, used as it is; otherwise the largest
            base score, capped, of the first and the last 16 tokens minus `delta`.
        use_fp8_residual: add the residual to the keys of kept blocks.
        return_skip_ratio: also return the fraction of (block, KV head) pairs skipped, which waits
            for the device.

    Returns:
        `[B, HQ, V]` of q's dtype, and the skip ratio if asked for.

    Raises:
        ValueError: shapes, dtypes, block sizes or devices are not as above.
    """
    block_size = BS if SBS is None else SBS
    _check(q, k_fp8, v, k_residual, BS, block_size, delta, precomputed_threshold, use_fp8_residual)
    if logits_soft_cap is not None and not 0 <= logits_soft_cap < math.inf:
        raise ValueError(f"logits_soft_cap must be finite and >= 0, got {logits_soft_cap}")
    batch, _, num_heads, head_size = q.shape
    seq_len, num_kv_heads = k_fp8.shape[1:3]
    residual = k_residual if use_fp8_residual else None

    planes = KVPlanes(
        key=k_fp8.transpose(1, 2),  # [B, HKV, T, K]
        key_residual=None if residual is None else residual.transpose(1, 2),
        key_exponent=None,
        value=v.transpose(1, 2),
        page_size=max(block_size, triton.next_power_of_2(seq_len)),  # one kernel, many lengths
        residual_scale=1.0,
        whole_pages=False,
    )
    device = q.device
    limits = DecodeLimits.on_device(
        device,
        num_reqs=batch,
        seq_len=seq_len,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        key_dtype=k_fp8.dtype,
        value_dtype=v.dtype,
    )
    seq_lens = torch.full((batch,), seq_len, dtype=torch.int32, device=device)
    threshold = False
    if precomputed_threshold is not None:
        threshold = precomputed_threshold.float().contiguous()
    output = torch.empty(batch, num_heads, head_size, dtype=q.dtype, device=device)
    counters = None
    if return_skip_ratio:
        counters = new_counters(num_kv_heads, device)
    decode_attention(
        q[:, 0],
        planes,
        torch.arange(batch, dtype=torch.int32, device=device)[:, None],
        seq_lens,
        DecodePlan.allocate(limits, device).update(seq_lens),
        DecodeScratch.allocate(limits, device),
        output,
        scale=head_size**-0.5 if scale is None else scale,
        logits_soft_cap=logits_soft_cap,
        delta=torch.tensor([delta], dtype=torch.float32, device=device),
        precomputed_threshold=threshold,
        counters=counters,
    )
    if counters is None:
        return output
    kept, total = counters.sum(0)[:2].tolist()
    return output, 1.0 - kept / total


def _rows_are_aligned(tensor: torch.Tensor) -> bool:
    steps = [tensor.stride(dim) for dim in range(3) if tensor.shape[dim] > 1]
    return all(n % 16 == 0 for n in (tensor.data_ptr(), *(n * tensor.itemsize for n in steps)))


def _check(q, k, v, residual, BS, SBS, delta, threshold, use_residual) -> None:
    if q.ndim != 4 or q.shape[1] != 1 or q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"q must be float16 or bfloat16 [B, 1, HQ, K], got {q.dtype} {q.shape}")
    if k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[1] == 0:
        raise ValueError(f"k_fp8 must be [B, T, HKV, K] beside q {q.shape}, got {k.shape}")
    if k.dtype not in (torch.float8_e4m3fn, q.dtype):
        raise ValueError(f"k_fp8 must be float8_e4m3fn or {q.dtype}, got {k.dtype}")
    if v.shape != k.shape or v.dtype != q.dtype:
        raise ValueError(f"v must be {q.dtype} {k.shape} (V = K), got {v.dtype} {v.shape}")
    if q.shape[2] % k.shape[2] or q.shape[2] // k.shape[2] > 16:
        heads = f"{q.shape[2]} query heads over {k.shape[2]} KV heads"
        raise ValueError(f"q and k_fp8 must have groups of 1 to 16 heads, got {heads}")
    if q.shape[3] % 16 or any(t.stride(-1) != 1 for t in (q, k, v)):
        raise ValueError("K must be a multiple of 16, and the last dimension contiguous")
    fp8 = k.dtype == torch.float8_e4m3fn
    if residual is None and use_residual and fp8:
        raise ValueError("use_fp8_residual needs k_residual, float8_e4m3fn, like k_fp8")
    if residual is not None:
        if not fp8 or residual.shape != k.shape or residual.dtype != k.dtype:
            found = f"{residual.dtype} {tuple(residual.shape)} beside {k.dtype} {tuple(k.shape)}"
            raise ValueError(f"k_residual must be float8_e4m3fn, like k_fp8, got {found}")
        if residual.stride(-1) != 1:
            raise ValueError("the last dimension of k_residual must be contiguous")
    if any(t is not None and not _rows_are_aligned(t) for t in (k, v, residual)):
        raise ValueError(
            "the rows of k_fp8, k_residual and v must begin at multiples of 16 bytes: pass "
            "tensor.clone(memory_format=torch.contiguous_format)"
        )
    if any(t is not None and t.shape[1] * t.stride(1) >= 2**31 for t in (k, v, residual)):
        raise ValueError("k_fp8, k_residual and v must have fewer than 2^31 elements a request")
    if not (q.is_cuda or INTERPRETED):
        raise ValueError(f"q must be on a CUDA GPU (or set TRITON_INTERPRET=1), got {q.device}")
    if BS not in (16, 32, 64, 128) or SBS not in (16, 32, 64, 128) or BS % SBS:
        raise ValueError(f"BS and SBS must be 16, 32, 64 or 128, SBS a divisor, got {BS}, {SBS}")
    if not delta >= 0:
        raise ValueError(f"delta must be >= 0 (log2 units), got {delta}")
    if threshold is not None and threshold.shape != q.shape[::2]:
        raise ValueError(f"precomputed_threshold must be [B, HQ], got {tuple(threshold.shape)}")
