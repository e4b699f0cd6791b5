"""Smoke test of the fused projection, rotation and FP8 + FP8 write: prints what differs.

    python -m vllm_ffa_fp8fp8.kernels.fused_kproj_rope_fp8fp8

For each shape: the largest differences from float64 of Q, K and V, and of the K and V that lie in
the cache, relative to the largest element. Runs interpreted where there is no GPU.
"""

import os
import sys

import torch

from .cache.page_layout import PageLayout
from .cache_reference import gather_kv_reference
from .projection.project_write import ProjectionScratch, project_rope_and_write
from .projection.qkv_heads import QKVHeads
from .projection.reference import rotate_reference
from .projection.rope_write import rope_and_write
from .projection.tuning import projection_tuning_on
from .runtime import INTERPRETED

PAGE_SIZE, NUM_TOKENS = 16, 5
LIMITS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
SHAPES = {  # query heads, KV heads, head size, rotary dim, neox style, norm, dtype
    "llama": (8, 2, 128, 128, True, False, torch.bfloat16),
    "qwen3": (4, 4, 128, 128, True, True, torch.bfloat16),
    "qwen2": (7, 1, 64, 64, True, False, torch.float16),
    "phi": (3, 3, 80, 32, True, False, torch.float16),
    "gpt-j": (4, 1, 256, 64, False, False, torch.bfloat16),
}


def differences(shape: str, device: str) -> tuple[dict[str, dict[str, float]], float]:
    """For each kernel, the differences by name; and how large they may be."""
    num_heads, num_kv_heads, head_size, rotary_dim, is_neox_style, norm, dtype = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    angles = torch.arange(64)[:, None] * 1e4 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(device, dtype)
    norms = (normal(head_size), normal(head_size), 1e-6) if norm else ()
    heads = QKVHeads(num_heads, num_kv_heads, head_size, cos_sin, is_neox_style, *norms)
    width, hidden_size = heads.num_all_heads * head_size, 256
    hidden, weight = normal(NUM_TOKENS, hidden_size), normal(width, hidden_size) / 16
    bias = normal(width)
    positions = torch.arange(7, 7 + NUM_TOKENS, device=device)
    slots = torch.arange(NUM_TOKENS, device=device) + 3

    linear = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    qkv = linear.to(dtype)  # what a linear layer gives
    query, key, value = linear.unflatten(1, (-1, head_size)).split(
        [num_heads, num_kv_heads, num_kv_heads], 1
    )
    expected = {
        "q": rotate_reference(query, positions, heads, heads.query_norm, torch.float64),
        "k": rotate_reference(key, positions, heads, heads.key_norm, torch.float64),
        "v": value,
    }
    expected |= {"cached k": expected["k"], "cached v": value}
    layout = PageLayout(head_size, dtype)
    shape = (1, num_kv_heads, PAGE_SIZE, layout.bytes_per_token)
    found = {}
    for kernel in ("project_rope_and_write", "rope_and_write"):
        cache = torch.zeros(shape, dtype=torch.uint8, device=device)
        planes, output = layout.split(cache), qkv.clone()
        if kernel == "rope_and_write":
            rope_and_write(output, positions, heads, planes, slots, output)
        else:
            output.fill_(torch.nan)
            tuning = projection_tuning_on(cos_sin.device, heads.num_all_heads, hidden_size)
            scratch = ProjectionScratch.allocate(NUM_TOKENS, heads, tuning)
            project_rope_and_write(
                hidden, weight, bias, positions, heads, planes, slots, output, scratch, tuning
            )
        pages = torch.zeros(1, dtype=torch.int32, device=device)
        cached = gather_kv_reference(planes, pages, PAGE_SIZE, torch.float64)
        tensors = *output.unflatten(1, (-1, head_size)).split(
            [num_heads, num_kv_heads, num_kv_heads], 1
        ), *(plane[slots] for plane in cached)
        found[kernel] = {
            name: ((tensor.double() - exact).abs().max() / exact.abs().max()).item()
            for (name, exact), tensor in zip(expected.items(), tensors, strict=True)
        }
    return found, LIMITS[dtype]


def main() -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        arguments = [sys.executable, "-m", f"{__package__}.fused_kproj_rope_fp8fp8"]
        os.execve(sys.executable, arguments, os.environ | {"TRITON_INTERPRET": "1"})
    device = "cpu" if INTERPRETED else "cuda"
    print(f"largest differences from float64, relative to the largest element, on {device}")
    passed = True
    for shape in SHAPES:
        found, limit = differences(shape, device)
        for kernel, errors in found.items():
            text = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
            print(f"{shape:6} {kernel:23} {text}")
            passed &= all(error < limit for error in errors.values())  # NaN is not
    if not passed:
        raise SystemExit("FAILED: a difference is beyond the rounding of the dtype")
    print("ok")


if __name__ == "__main__":
    main()
