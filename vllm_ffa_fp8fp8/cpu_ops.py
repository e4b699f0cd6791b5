"""The layer's work on the CPU: the kernels' PyTorch oracles."""

import torch

from vllm_ffa_fp8fp8.kernels.page_layout import KVPlanes
from vllm_ffa_fp8fp8.kernels.reference import (
    decode_attention_reference,
    gather_kv_reference,
    prefill_attention_reference,
    write_kv_reference,
)
from vllm_ffa_fp8fp8.metadata import FFAFP8FP8Metadata, PrefillBatch


class CpuOps:
    def __init__(self, impl, vllm_config):
        self.impl = impl

    def make_plan(self, block_size: int) -> None:
        return None

    def reserve_scratch(self) -> None:
        pass

    def write(self, key, value, planes: KVPlanes, slot_mapping: torch.Tensor) -> None:
        write_kv_reference(key, value, planes, slot_mapping)

    def decode(
        self,
        query: torch.Tensor,  # [num_decodes, num_heads, head_size]
        planes: KVPlanes,
        metadata: FFAFP8FP8Metadata,
        delta: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        result, _ = decode_attention_reference(
            query,
            planes,
            metadata.block_table,
            metadata.seq_lens,
            block_size=metadata.block_size,
            scale=self.impl.scale,
            delta=delta,
            min_context=self.impl.config.min_context,
            counters=self.impl.counters,
        )
        output.copy_(result)

    def prefill(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,
        planes: KVPlanes,
        prefill: PrefillBatch,
        output: torch.Tensor,
    ) -> None:
        starts = prefill.query_start_loc_host
        for request, seq_len in enumerate(prefill.seq_lens_host):
            tokens = slice(starts[request], starts[request + 1])
            query_len = tokens.stop - tokens.start
            if query_len == 0:
                continue
            all_key, all_value = key[tokens], value[tokens]
            if query_len < seq_len:
                all_key, all_value = gather_kv_reference(
                    planes, prefill.block_table[request], seq_len, query.dtype
                )
            output[tokens] = prefill_attention_reference(
                query[tokens], all_key, all_value, self.impl.scale
            )
