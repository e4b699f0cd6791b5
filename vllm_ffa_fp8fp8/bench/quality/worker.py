"""What `quality` and `calibrate` ask of a worker, through `worker_extension_cls`."""

import torch
from vllm.model_executor.models.utils import extract_layer_index

from vllm_ffa_fp8fp8.attention.geometry import named_impls
from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8MetadataBuilder
from vllm_ffa_fp8fp8.bench.serving_worker import BenchWorkerExtension


class QualityExtension(BenchWorkerExtension):
    def ffa_blocks_to_read(self, seq_lens: list[int]) -> int:
        """What `ffa_skip_stats` counts in all where a request decodes alone, one token after
        another, at such lengths."""
        total, impls = 0, named_impls(self.vllm_config)
        for group in (group for groups in self.model_runner.attn_groups for group in groups):
            builder = group.metadata_builders[0]
            if isinstance(builder, FFAFP8FP8MetadataBuilder):
                blocks = sum(-(-seq_len // builder.block_size) for seq_len in seq_lens)
                total += blocks * sum(impls[name].num_kv_heads for name in group.layer_names)
        return total

    def ffa_measure_errors(self) -> None:
        """From here on every layer decodes twice, the second time reading everything; outside of
        CUDA graphs only, which call no Python."""
        for impl in named_impls(self.vllm_config).values():
            impl.ops = _MeasuredOps(impl)

    def ffa_layer_errors(self) -> dict[int, list[float]]:
        """Of each layer, since the last call, the sums of squares of what skipping changed in the
        decodes' outputs, and of these outputs with everything read; empty where that is not
        measured."""
        impls = named_impls(self.vllm_config).items()
        ops = {name: impl.ops for name, impl in impls if isinstance(impl.ops, _MeasuredOps)}
        return {extract_layer_index(name): measured.take() for name, measured in ops.items()}


class _MeasuredOps:
    """A layer's ops, whose `decode` also sums up the squares of its errors."""

    def __init__(self, impl):
        self._impl, self._ops = impl, impl.ops
        self._squares: list[torch.Tensor] = []

    def __getattr__(self, name: str):
        return getattr(self._ops, name)

    def decode(self, query, planes, metadata, limit, output) -> None:
        self._ops.decode(query, planes, metadata, limit, output)
        pruned = output.double()  # its own kernel: between two decodes there must be one
        counters, self._impl.counters = self._impl.counters, None
        exact = torch.empty_like(output)
        self._ops.decode(query, planes, metadata, None, exact)
        self._impl.counters = counters
        exact = exact.double()
        squares = [(pruned - exact).square().sum(), exact.square().sum()]
        self._squares.append(torch.stack(squares))

    def take(self) -> list[float]:
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum(0).tolist() if squares else [0.0, 0.0]
