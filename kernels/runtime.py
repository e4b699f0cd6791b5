"""What the kernels need to know of where they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
}

HOPPER_SHARED_MEMORY = 232_448
"""Bytes that a program can have on compute capability 9.0."""

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
    if device.type == "meta":  # see `compile_only`
        device = torch.device("cuda", torch.cuda.current_device())
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)


@contextmanager
def compile_only() -> Iterator[None]:
    """Launchers compile here what they would launch, and launch nothing: their tensors may be on
    the meta device, which stands for the current GPU."""
    token = _compiles_only.set(True)
    try:
        yield
    finally:
        _compiles_only.reset(token)


def launch(kernel, grid: tuple[int, ...], *args, **kwargs) -> None:
    """`kernel[grid](*args, **kwargs)`, or its compilation alone in `compile_only`."""
    if _compiles_only.get():
        kernel.warmup(*args, grid=grid, **kwargs)
    else:
        kernel[grid](*args, **kwargs)


def pdl_arguments(device: torch.device, wanted: bool = True) -> dict[str, bool]:
    """Arguments of a launch that starts early where the device can and it is `wanted`: of the
    kernel, whose constexpr PDL says whether it has to wait, and of Triton."""
    pdl = wanted and supports_pdl(device)
    return {"PDL": pdl, "launch_pdl": pdl}


@triton.jit
def wait_and_release(PDL: tl.constexpr):
    """Waits for the kernels ahead in the stream, then lets the next one start.

    In this order, so that what the next one reads before its own wait was written by kernels that
    have ended.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
