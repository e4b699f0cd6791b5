"""What the kernels need to know of where they run."""

from functools import lru_cache

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
}

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True under TRITON_INTERPRET=1, where the kernels run on the CPU."""


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which tiles of `dtype` enter `tl.dot`.

    The interpreter holds bfloat16 and E4M3 as integers, so its arithmetic is only right in float32.
    """
    if INTERPRETED and dtype != torch.float16:
        return tl.float32
    return TRITON_DTYPES[dtype]


@lru_cache
def supports_pdl(device: torch.device) -> bool:
    """Whether a kernel can start before the one ahead of it in the stream has ended
    (programmatic dependent launch): from compute capability 9.0 on.

    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
