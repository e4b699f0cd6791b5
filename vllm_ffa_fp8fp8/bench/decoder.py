"""Our decode attention over the inputs of one shape: checked, timed, profiled."""

from dataclasses import replace
from typing import Any

import torch

from vllm_ffa_fp8fp8.bench.cells import Shape
from vllm_ffa_fp8fp8.bench.inputs import DELTA, Inputs
from vllm_ffa_fp8fp8.bench.rounding import most_rounding
from vllm_ffa_fp8fp8.bench.steering import steer
from vllm_ffa_fp8fp8.bench.timing import time_graph
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.kernels.cache.kv_write import write_kv
from vllm_ffa_fp8fp8.kernels.cache.page_layout import KVPlanes
from vllm_ffa_fp8fp8.kernels.counters import new_counters
from vllm_ffa_fp8fp8.kernels.decode.attention import dealt, decode_attention
from vllm_ffa_fp8fp8.kernels.decode.limits import DecodeLimits
from vllm_ffa_fp8fp8.kernels.decode.plan import DecodePlan, DecodeScratch
from vllm_ffa_fp8fp8.kernels.reference import decode_attention_reference
from vllm_ffa_fp8fp8.option_values import RULES

TOLERANCE = 1e-2
CHECKED_REQUESTS = 2


class CheckFailed(Exception):
    """An output is wrong, so its time means nothing."""


class Decoder:
    """Decode attention.

    Args:
        prune: with `DELTA`; without it every block is kept, as in the preset `exact`.
        tuning: fields of `DecodeTuning` to change.
        value_dtype: of the cached values.
        write: write the newest tokens to the cache before each launch, as a layer does.
        config: options of a launch; without it pages are blocks and `DELTA` is delta.
        layer: whose draws are taken by the rule share.
    """

    def __init__(
        self,
        shape: Shape,
        prune: bool,
        tuning: dict[str, Any],
        device: str = "cuda",
        value_dtype: torch.dtype = torch.bfloat16,
        write: bool = False,
        config: FFAConfig | None = None,
        layer: int = 0,
    ):
        self.shape, self.device, self.write = shape, torch.device(device), write
        self.layer = layer
        self.config = config or FFAConfig(rule="threshold", delta=DELTA)
        geometry = shape.geometry
        self.block_size = self.config.block_size_in(geometry.page_size)
        limits = DecodeLimits.on_device(
            self.device, num_reqs=shape.batch, seq_len=shape.seq_len,
            num_heads=geometry.num_heads, num_kv_heads=geometry.num_kv_heads,
            head_size=geometry.head_size, block_size=self.block_size,
            rule=self.config.rule if prune else "none", value_dtype=value_dtype,
        )  # fmt: skip
        limits = replace(limits, tuning=replace(limits.tuning_of(shape.batch), **tuning))
        self.limit = torch.tensor([self.config.limit], device=self.device) if prune else None
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
            output, scale=self.scale, counters=counters, layer=self.layer,
            **{RULES[self.config.rule]: self.limit},
            precomputed_threshold=self.config.precomputed_threshold, launch_pdl=True,
        )  # fmt: skip

    def run(self, inputs: Inputs, planes: KVPlanes) -> tuple[torch.Tensor, int, int]:
        """The output, like the query, and kept and all blocks, counted by KV head."""
        dtype = inputs.query.dtype
        if self.device.type == "cpu":
            dtype = torch.float32  # interpreted casts truncate
        output = torch.full(inputs.query.shape, float("nan"), dtype=dtype, device=self.device)
        num_kv_heads = self.shape.geometry.num_kv_heads
        counters = new_counters(num_kv_heads, self.device)
        self.launch(inputs, planes, output, counters)
        kept, total = counters.sum(0)[:2].tolist()
        return output, kept, total

    def dealt(self, inputs: Inputs, planes: KVPlanes) -> list[dict[str, int]]:
        """How programs share each request, for the oracle."""
        return dealt(self.plan, planes, inputs.query.dtype)

    def search(self, inputs: Inputs, planes: KVPlanes, kept: float) -> float:
        """Sets delta so that a fraction near `kept` is kept, and returns it, log2 units; below 0
        it stands for a threshold above the first and last tokens, which no option gives."""

        def measure(over_anchors: float) -> float:
            self.limit.fill_(-over_anchors)
            _, found, total = self.run(inputs, planes)
            return found / total

        threshold, _ = steer(measure, kept, tolerance=kept / 50, most_probes=24)
        self.limit.fill_(-threshold)
        return -threshold

    def reference(self, inputs: Inputs, planes: KVPlanes, factor: float = 1.0) -> torch.Tensor:
        """The oracle's output of the first requests, with `factor` times the limit."""
        some = slice(0, CHECKED_REQUESTS)
        limit = None if self.limit is None else self.limit * factor
        output, _ = decode_attention_reference(
            inputs.query[some], planes, inputs.block_table[some], inputs.seq_lens[some],
            block_size=self.block_size, scale=self.scale, **{RULES[self.config.rule]: limit},
            layer=self.layer, dealt=self.dealt(inputs, planes),
        )  # fmt: skip
        return output

    def check(self, inputs: Inputs, planes: KVPlanes) -> tuple[float, float]:
        """Relative error against the reference on the first requests, and the kept fraction. By
        the rule share the error may be that of draws which rounded scores decide, too.

        Raises CheckFailed where their output is wrong, any is not finite, or other blocks are kept
        than were planted.
        """
        output, kept, total = self.run(inputs, planes)
        some = slice(0, CHECKED_REQUESTS)
        expected = self.reference(inputs, planes)
        slack = torch.zeros_like(expected[..., 0])
        if self.limit is not None and self.config.rule == "share":
            off = 2 ** most_rounding(inputs, self.scale, CHECKED_REQUESTS)
            for factor in (1 / off, off):
                other = self.reference(inputs, planes, factor)
                slack += 2 * (other - expected).norm(dim=-1)
        error = relative_error(output[some], expected)
        blocks = -(-self.shape.seq_len // self.block_size)
        every = self.shape.batch * self.shape.geometry.num_kv_heads * blocks
        planted = every if self.limit is None else inputs.num_kept
        if not (
            output.isfinite().all()
            and excess(output[some], expected, slack) < TOLERANCE
            and (planted is None or kept == planted)
            and total == every
        ):
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


def excess(output: torch.Tensor, expected: torch.Tensor, slack: torch.Tensor) -> float:
    """Relative error beyond `slack`, which is the Euclidean norm of what each row,
    `[..., head_size]`, may be off by."""
    off = (output - expected).norm(dim=-1) - slack
    return (off.clamp(min=0).norm() / expected.norm()).item()


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
