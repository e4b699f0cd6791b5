"""The backend's face towards vLLM: names, capabilities, and the shape of its KV cache."""

from dataclasses import replace

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_ffa_fp8fp8.attention.geometry import (
    PREFERRED_PAGE_SIZE,
    engine_config,
    page_layout,
    page_multiple,
)
from vllm_ffa_fp8fp8.attention.impl import FFAFP8FP8Impl
from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8MetadataBuilder
from vllm_ffa_fp8fp8.integration.refusals import check_kv_cache_spec, refusal_reasons
from vllm_ffa_fp8fp8.registry import BACKEND_NAME


class FFAFP8FP8Backend(AttentionBackend):
    """Attention over a paged cache of FP8 base + FP8 residual keys, with block-skipping decode."""

    forward_includes_kv_cache_update: bool = False
    # what a model's own operator writes to the cache is not in this backend's format
    supports_kv_cache_update_bypass: bool = False

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls():
        return FFAFP8FP8Impl

    @staticmethod
    def get_builder_cls():
        return FFAFP8FP8MetadataBuilder

    @classmethod
    def validate_configuration(cls, **configuration) -> list[str]:
        return refusal_reasons(**configuration)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(page_multiple())]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(default_block_size, PREFERRED_PAGE_SIZE)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # those that carry bytes: `connector_problem`

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # both keep the bytes of one (block, head) together, which the planes are cut from
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        check_kv_cache_spec(spec)
        if spec.state_content_bytes is not None:
            return spec
        layout = page_layout(spec.head_size, spec.dtype, engine_config())
        return replace(spec, dtype=torch.uint8, state_content_bytes=layout.bytes_per_token)
