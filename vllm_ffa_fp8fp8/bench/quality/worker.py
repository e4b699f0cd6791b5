"""What `quality` asks of a worker, through `worker_extension_cls`."""

from vllm_ffa_fp8fp8.attention.geometry import named_impls, pruning_block_size
from vllm_ffa_fp8fp8.bench.serving_worker import BenchWorkerExtension


class QualityExtension(BenchWorkerExtension):
    def ffa_blocks_to_read(self, seq_lens: list[int]) -> int:
        """What `ffa_skip_stats` counts in all where a request decodes alone, one token after
        another, at such lengths."""
        total = 0
        for impl in named_impls(self.vllm_config).values():
            block_size = pruning_block_size(self.cache_config.block_size, impl.config)
            total += impl.num_kv_heads * sum(-(-seq_len // block_size) for seq_len in seq_lens)
        return total
