"""The backend's face towards vLLM: names, capabilities, and the shape of its KV cache."""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.environment import fp8_available
from vllm_ffa_fp8fp8.kernels.decode_attention import MAX_QUERY_ROWS
from vllm_ffa_fp8fp8.kernels.page_layout import PageLayout
from vllm_ffa_fp8fp8.plugin import BACKEND_NAME
from vllm_ffa_fp8fp8.refusals import check_kv_cache_spec, check_options, refusal_reasons

PREFERRED_PAGE_SIZE = 64
MAX_QUERY_LEN = 8
"""Query tokens of a request that decode takes."""
DECODED_ROWS = {torch.bfloat16: MAX_QUERY_ROWS, torch.float16: 32}
"""Query rows of a KV head (its query heads, of all query tokens) that decode takes, by the model's
dtype: more do not fit the shared memory of compute capability 8.9 (float16: were not tried)."""


def page_layout(head_size: int, dtype: torch.dtype, config: FFAConfig) -> PageLayout:
    """The page on this platform: FP8 base + residual, or 16-bit keys where FP8 is missing. V is
    FP8 only where the options ask for it."""
    fp8 = fp8_available()
    return PageLayout(
        head_size,
        dtype,
        fp8_key=fp8,
        residual=fp8 and config.use_fp8_residual,
        fp8_value=config.v_cache_dtype == "fp8",
    )


def pruning_block_size(page_size: int, config: FFAConfig) -> int:
    """Tokens that are kept or skipped together: the option, else the largest power of two that
    divides vLLM's page, up to 128."""
    return config.block_size or math.gcd(page_size, 128)


def layer_impls(vllm_config) -> list:
    """The impls of all layers with this backend, of the model and of one that drafts for it."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [
        layer.impl
        for layer in layers
        if hasattr(layer, "get_attn_backend") and layer.get_attn_backend() is FFAFP8FP8Backend
    ]


def decode_query_len(vllm_config) -> int:
    """The most query tokens of a request that decode: its newest token and the drafts after it.

    More drafts than the decode kernel takes are verified as prefills are computed.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return 1
    query_len = 1 + (speculative.num_speculative_tokens or 0)
    group = max(impl.num_heads // impl.num_kv_heads for impl in layer_impls(vllm_config))
    rows = query_len * group
    dtype = vllm_config.model_config.dtype
    fits = query_len <= MAX_QUERY_LEN and rows <= DECODED_ROWS[dtype]
    return query_len if fits else 1


class FFAFP8FP8Backend(AttentionBackend):
    """Attention over a paged cache of FP8 base + FP8 residual keys, with block-skipping decode."""

    forward_includes_kv_cache_update: bool = False

    config: ClassVar[FFAConfig | None] = None
    """The options of the engine in this process; set where its layers are made, because vLLM asks
    for the cache spec outside of `set_current_vllm_config`."""

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls():
        from vllm_ffa_fp8fp8.impl import FFAFP8FP8Impl

        return FFAFP8FP8Impl

    @staticmethod
    def get_builder_cls():
        from vllm_ffa_fp8fp8.metadata import FFAFP8FP8MetadataBuilder

        return FFAFP8FP8MetadataBuilder

    @classmethod
    def validate_configuration(cls, **configuration) -> list[str]:
        return refusal_reasons(**configuration)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(default_block_size, PREFERRED_PAGE_SIZE)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

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
        assert cls.config is not None
        layout = page_layout(spec.head_size, spec.dtype, cls.config)
        return replace(spec, dtype=torch.uint8, state_content_bytes=layout.bytes_per_token)

    @classmethod
    def set_config(cls) -> FFAConfig:
        """Reads the options of the engine being built and keeps them for `customize_spec`."""
        config = FFAConfig.from_vllm_config(get_current_vllm_config())
        check_options(config, fp8_available())
        cls.config = config
        return config
