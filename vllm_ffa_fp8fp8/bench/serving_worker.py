"""What `bench serving` asks of a worker, through `worker_extension_cls`."""

from collections.abc import Callable

import torch

from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8MetadataBuilder
from vllm_ffa_fp8fp8.attention.stats import WorkerExtension
from vllm_ffa_fp8fp8.integration.compat import backend_names


class BenchWorkerExtension(WorkerExtension):
    """For measurements only: an engine's delta or tau is fixed in use."""

    def ffa_set_limit(self, limit: float) -> int:
        """Sets delta, log2 units, or tau, as the rule has it; in place, so that CUDA graphs see
        it. Returns how many metadata builders took it."""
        return self._set_limits(lambda rule: limit)

    def ffa_move_limit(self, over_anchors: float) -> int:
        """The same for a threshold over the anchors, log2 units, which no delta of an option
        gives; by share, for the exponent of tau."""
        return self._set_limits(
            lambda rule: 2.0**over_anchors if rule == "share" else -over_anchors
        )

    @torch.inference_mode()  # the tensors were made in it
    def _set_limits(self, limit_of: Callable[[str], float]) -> int:
        builders = [
            builder
            for groups in self.model_runner.attn_groups
            for group in groups
            for builder in group.metadata_builders
            if isinstance(builder, FFAFP8FP8MetadataBuilder) and builder.limits is not None
        ]
        for builder in builders:
            builder.limits.change(limit_of(builder.rule))
        return len(builders)

    def ffa_backend_names(self) -> str:
        return backend_names(self)
