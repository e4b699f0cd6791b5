"""What the layers counted, read through vLLM's `worker_extension_cls` and `collective_rpc`."""

from typing import Any

import torch

from vllm_ffa_fp8fp8.attention.geometry import layer_impls


class WorkerExtension:
    """`LLM(..., worker_extension_cls="vllm_ffa_fp8fp8.stats.WorkerExtension")`."""

    @torch.inference_mode()  # where vLLM makes layers in it, counters can be changed nowhere else
    def ffa_skip_stats(self, reset: bool = True) -> dict[str, Any]:
        """Counts of this worker since the last reset, over all decode steps and layers.

        `kept_blocks` and `total_blocks` are blocks times KV heads, and 0 unless the option
        `record_skip_ratio` is on. `cache_bytes_per_token` covers all layers and KV heads.
        """
        impls = layer_impls(self.vllm_config)
        kept = total = 0
        for impl in impls:
            if impl.counters is not None:
                layer_kept, layer_total = impl.counters.tolist()
                kept, total = kept + layer_kept, total + layer_total
                if reset:
                    impl.counters.zero_()
        return {
            "kept_blocks": kept,
            "total_blocks": total,
            "cache_bytes_per_token": sum(
                impl.layout.bytes_per_token * impl.num_kv_heads for impl in impls
            ),
            "backend_layers": len(impls),
            "dense_layers": sum(bool(impl.is_dense) for impl in impls),
        }
