"""`worker_extension_cls="vllm_ffa_fp8fp8.stats.WorkerExtension"`: where users find it."""

from vllm_ffa_fp8fp8.attention.stats import WorkerExtension

__all__ = ["WorkerExtension"]
