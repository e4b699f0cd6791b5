"""What `bench serving` asks of a worker, through `worker_extension_cls`."""

import torch

from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8MetadataBuilder
from vllm_ffa_fp8fp8.attention.stats import WorkerExtension
from vllm_ffa_fp8fp8.integration.compat import backend_names


class BenchWorkerExtension(WorkerExtension):
    """For measurements only: an engine's delta is fixed in use."""

    @torch.inference_mode()  # the tensors were made in it
    def ffa_set_delta(self, delta: float) -> int:
        """Sets delta, log2 units, below 0 for a threshold over the anchors; in place, so that CUDA
        graphs see it. Returns how many metadata builders took it."""
        builders = [
            builder
            for groups in self.model_runner.attn_groups
            for group in groups
            for builder in group.metadata_builders
            if isinstance(builder, FFAFP8FP8MetadataBuilder) and builder.delta is not None
        ]
        for builder in builders:
            builder.delta.fill_(delta)
            builder.delta.tolist()  # waits for it
        return len(builders)

    def ffa_backend_names(self) -> str:
        return backend_names(self)
