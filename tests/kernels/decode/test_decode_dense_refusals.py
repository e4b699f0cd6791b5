"""What the dense interface refuses, and what it says."""

import pytest
import torch

from vllm_ffa_fp8fp8.kernels import attn_forward_decode_fp8fp8

HALF, FP8 = torch.float16, torch.float8_e4m3fn


def inputs(**replaced) -> dict:
    """Good arguments, some replaced."""
    good = {
        "q": torch.zeros(2, 1, 8, 64, dtype=HALF),
        "k_fp8": torch.zeros(2, 40, 2, 64, dtype=FP8),
        "v": torch.zeros(2, 40, 2, 64, dtype=HALF),
        "k_residual": torch.zeros(2, 40, 2, 64, dtype=FP8),
    }
    return good | replaced


def keys(*shape: int, dtype=FP8) -> dict:
    """k_fp8, its residual and v of one shape."""
    key = torch.zeros(shape, dtype=dtype)
    return {"k_fp8": key, "k_residual": key, "v": torch.zeros(shape, dtype=HALF)}


@pytest.mark.parametrize(
    "replaced, message",
    [
        ({"q": torch.zeros(2, 8, 64, dtype=HALF)}, r"q must be .*\[B, 1, HQ, K\], got"),
        ({"q": torch.zeros(2, 2, 8, 64, dtype=HALF)}, "q must be float16 or bfloat16"),
        ({"q": torch.zeros(2, 1, 8, 64)}, "got torch.float32"),
        (keys(40, 2, 64), r"k_fp8 must be \[B, T, HKV, K\]"),
        (keys(3, 40, 2, 64), r"k_fp8 must be \[B, T, HKV, K\]"),
        (keys(2, 40, 2, 80), r"k_fp8 must be \[B, T, HKV, K\]"),
        (keys(2, 0, 2, 64), r"k_fp8 must be \[B, T, HKV, K\]"),
        (keys(2, 40, 2, 64, dtype=torch.bfloat16), "k_fp8 must be float8_e4m3fn or torch.float16"),
        ({"v": torch.zeros(2, 40, 2, 32, dtype=HALF)}, r"v must be torch.float16 .*\(V = K\)"),
        ({"v": torch.zeros(2, 40, 2, 64)}, "got torch.float32"),
        (keys(2, 40, 3, 64), r"groups of 1 to 16 heads, got 8 query heads over 3 KV heads"),
        ({"q": torch.zeros(2, 1, 34, 64, dtype=HALF)}, r"got 34 query heads over 2 KV heads"),
        (
            {"q": torch.zeros(2, 1, 8, 72, dtype=HALF), **keys(2, 40, 2, 72)},
            "K must be a multiple of 16",
        ),
        (
            {"v": torch.zeros(2, 40, 64, 2, dtype=HALF).transpose(2, 3)},
            "last dimension contiguous",
        ),
        ({"v": torch.zeros(2, 40, 2, 68, dtype=HALF)[..., :64]}, "v must begin at multiples of 16"),
        (
            {"k_fp8": torch.zeros(2 * 40 * 2 * 64 + 8, dtype=FP8)[8:].view(2, 40, 2, 64)},
            "k_fp8, k_residual and v must begin at multiples of 16 bytes: pass tensor.clone",
        ),
        ({"k_residual": None}, "use_fp8_residual needs k_residual"),
        ({"k_residual": torch.zeros(2, 39, 2, 64, dtype=FP8)}, "like k_fp8"),
        ({"k_residual": torch.zeros(2, 40, 2, 64, dtype=HALF)}, "float8_e4m3fn, like k_fp8"),
        (
            {"k_fp8": torch.zeros(2, 40, 2, 64, dtype=HALF)},
            "k_residual must be float8_e4m3fn, like k_fp8, got .* beside torch.float16",
        ),
        ({"SBS": 0}, "got 128, 0"),
        ({"BS": 48}, "BS and SBS must be 16, 32, 64 or 128, SBS a divisor, got 48, 48"),
        ({"BS": 256}, "got 256, 256"),
        ({"BS": 64, "SBS": 128}, "SBS a divisor, got 64, 128"),
        ({"SBS": 8}, "got 128, 8"),
        ({"delta": -1.0}, r"delta must be >= 0 \(log2 units\), got -1.0"),
        ({"delta": float("nan")}, "delta must be >= 0"),
        (
            {"precomputed_threshold": torch.zeros(2, 2)},
            r"precomputed_threshold must be \[B, HQ\], got \(2, 2\)",
        ),
    ],
)
def test_refusals(replaced, message):
    with pytest.raises(ValueError, match=message):
        attn_forward_decode_fp8fp8(**inputs(**replaced))
