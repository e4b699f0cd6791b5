"""Our decode attention over the inputs of one shape: checked, timed, profiled."""

from dataclasses import replace
from typing import Any

import torch

from vllm_ffa_fp8fp8.bench.cells import Shape
from vllm_ffa_fp8fp8.bench.inputs import DELTA, Inputs
from vllm_ffa_fp8fp8.bench.timing import time_graph
from vllm_ffa_fp8fp8.kernels.cache.kv_write import write_kv
from vllm_ffa_fp8fp8.kernels.cache.page_layout import KVPlanes
from vllm_ffa_fp8fp8.kernels.decode.attention import decode_attention
from vllm_ffa_fp8fp8.kernels.decode.plan import DecodeLimits, DecodePlan, DecodeScratch
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference

TOLERANCE = 1e-2
CHECKED_REQUESTS = 2


class CheckFailed(Exception):
    """An output is wrong, so its time means nothing."""


class Decoder:
    """Decode attention with pages as blocks.

    Args:
        prune: with `DELTA`; without it every block is kept, as in the preset `exact`.
        tuning: fields of `DecodeTuning` to change.
        value_dtype: of the cached values.
        write: write the newest tokens to the cache before each launch, as a layer does.
    """

    def __init__(
        self,
        shape: Shape,
        prune: bool,
        tuning: dict[str, Any],
        device: str = "cuda",
        value_dtype: torch.dtype = torch.bfloat16,
        write: bool = False,
    ):
        self.shape, self.device, self.write = shape, torch.device(device), write
        geometry = shape.geometry
        limits = DecodeLimits.on_device(
            self.device, num_reqs=shape.batch, seq_len=shape.seq_len,
            num_heads=geometry.num_heads, num_kv_heads=geometry.num_kv_heads,
            head_size=geometry.head_size, block_size=geometry.page_size,
            prunes=prune, value_dtype=value_dtype,
        )  # fmt: skip
        limits = replace(limits, tuning=replace(limits.tuning_of(shape.batch), **tuning))
        self.delta = torch.tensor([DELTA], device=self.device) if prune else None
        self.scratch = DecodeScratch.allocate(limits, self.device)
        seq_lens = torch.full((shape.batch,), shape.seq_len, dtype=torch.int32, device=self.device)
        self.plan = DecodePlan.allocate(limits, self.device).update(seq_lens)
        self.scale = geometry.head_size**-0.5

    def launch(self, inputs: Inputs, planes: KVPlanes, output, counters=None) -> None:
        if self.write:
            newest = inputs.newest
            write_kv(newest.key, newest.value, planes, newest.slot_mapping)
        decode_attention(
            inputs.query, planes, inputs.block_table, inputs.seq_lens, self.plan, self.scratch,
            output, scale=self.scale, delta=self.delta, counters=counters,
            launch_pdl=True,
        )  # fmt: skip

    def check(self, inputs: Inputs, planes: KVPlanes) -> tuple[float, float]:
        """Relative error against the reference on the first requests, and the kept fraction.

        Raises CheckFailed where their output is wrong, any is not finite, or other blocks are kept
        than were planted.
        """
        dtype = inputs.query.dtype
        if self.device.type == "cpu":
            dtype = torch.float32  # interpreted casts truncate
        output = torch.full(inputs.query.shape, float("nan"), dtype=dtype, device=self.device)
        num_kv_heads = self.shape.geometry.num_kv_heads
        counters = torch.zeros(num_kv_heads, 3, dtype=torch.int64, device=self.device)
        self.launch(inputs, planes, output, counters)
        some = slice(0, CHECKED_REQUESTS)
        expected, _ = decode_attention_reference(
            inputs.query[some], planes, inputs.block_table[some], inputs.seq_lens[some],
            block_size=self.shape.geometry.page_size, scale=self.scale, delta=self.delta,
        )  # fmt: skip
        error = relative_error(output[some], expected)
        kept, total, _ = counters.sum(0).tolist()
        every = self.shape.batch * num_kv_heads * self.shape.pages
        wanted = (inputs.num_kept if self.delta is not None else every, every)
        if not (output.isfinite().all() and error < TOLERANCE and (kept, total) == wanted):
            raise CheckFailed(f"{self.shape}: error {error:.1e}, {kept} of {total} blocks kept")
        return error, kept / total

    def time(self, sets: list[Inputs], planes: list[KVPlanes]) -> float:
        """Microseconds of one launch."""
        return time_graph(self._launches(sets, planes))

    def profile(self, sets: list[Inputs], planes: list[KVPlanes]) -> str:
        """Mean microseconds of each kernel."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for launch in self._launches(sets, planes) * max(1, 8 // len(sets)):
                launch()
            torch.cuda.synchronize()
        return ", ".join(
            f"{event.key.removesuffix('_kernel')} {event.device_time_total / event.count:.1f}"
            for event in profiler.key_averages()
        )

    def _launches(self, sets: list[Inputs], planes: list[KVPlanes]) -> list:
        outputs = [torch.empty_like(inputs.query) for inputs in sets]
        return [
            lambda arguments=arguments: self.launch(*arguments)
            for arguments in zip(sets, planes, outputs, strict=True)
        ]


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the whole tensor, in the Euclidean norm; NaN where the output has one."""
    return ((output.float() - expected).norm() / expected.norm()).item()


def compiled_kernels() -> list[str]:
    """Registers, spills and shared memory of every kernel that was compiled."""
    import importlib
    import pkgutil

    from triton.runtime.jit import JITFunction

    from vllm_ffa_fp8fp8 import kernels

    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    ]
    functions = {f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)}
    return [
        f"{function.__name__}: {kernel.n_regs} registers, {kernel.n_spills} spills, "
        f"{kernel.metadata.shared} bytes shared, {kernel.metadata.num_warps} warps"
        for function in sorted(functions, key=lambda function: function.__name__)
        for caches in function.device_caches.values()
        for kernel in caches[0].values()
    ]
