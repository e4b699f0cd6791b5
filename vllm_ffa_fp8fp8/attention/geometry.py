"""What backend, metadata, ops and layers have to agree on: options, page, block, query tokens."""

from typing import Any

import torch
from vllm.config import get_current_vllm_config

from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.environment import fp8_available
from vllm_ffa_fp8fp8.integration.refusals import PAGE_SIZE_BASE, check_options, check_scan
from vllm_ffa_fp8fp8.kernels.cache.page_layout import CODE_TOKENS, PageLayout
from vllm_ffa_fp8fp8.kernels.decode.attention import MAX_QUERY_ROWS
from vllm_ffa_fp8fp8.registry import BACKEND_NAME

PREFERRED_PAGE_SIZE = 64
MAX_QUERY_LEN = 8
"""Query tokens of a request that decode takes."""
DECODED_ROWS = {torch.bfloat16: MAX_QUERY_ROWS, torch.float16: 32}
"""Query rows of a KV head (its query heads, of all query tokens) that decode takes, by the model's
dtype: more do not fit the shared memory of compute capability 8.9 (float16: were not tried)."""

_engine_config: FFAConfig | None = None


def read_engine_config() -> FFAConfig:
    """Reads the options of the engine being built, where its layers are made, and keeps them for
    `engine_config`. Raises ValueError for options that cannot be."""
    global _engine_config
    vllm_config = get_current_vllm_config()
    config = FFAConfig.from_vllm_config(vllm_config)
    check_options(config, fp8_available())
    check_scan(config, vllm_config)
    _engine_config = config
    return config


def engine_config() -> FFAConfig:
    """The options of the engine in this process, because vLLM asks for the cache spec outside of
    `set_current_vllm_config`."""
    assert _engine_config is not None, "no layer of FFA_FP8FP8 was made in this process"
    return _engine_config


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
        key_code=config.scans_codes,
    )


def page_multiple() -> int:
    """What tokens of a page have to be a multiple of, for the options of this process."""
    has_codes = _engine_config is not None and _engine_config.scans_codes
    return CODE_TOKENS if has_codes else PAGE_SIZE_BASE


def pruning_block_size(page_size: int, config: FFAConfig) -> int:
    """Tokens that are kept or skipped together, on vLLM's page."""
    return config.block_size_in(page_size)


def preferred_page_size(vllm_config) -> int:
    """Tokens of a page, as vLLM chooses it after the layers are loaded: what the user says, or
    what the backend prefers; other layers of a model can ask for more."""
    cache_config = vllm_config.cache_config
    if cache_config.user_specified_block_size:
        return cache_config.block_size
    return max(cache_config.DEFAULT_BLOCK_SIZE, PREFERRED_PAGE_SIZE)


def layer_impls(vllm_config) -> list:
    """The impls of all layers with this backend, of the model and of one that drafts for it."""
    return list(named_impls(vllm_config).values())


def named_impls(vllm_config) -> dict[str, Any]:
    """`layer_impls` by the names of their layers."""
    # a copy: threads ask while layers of a model that drafts are made
    layers = dict(vllm_config.compilation_config.static_forward_context)
    return {
        name: layer.impl
        for name, layer in layers.items()
        if hasattr(layer, "get_attn_backend")
        and layer.get_attn_backend().get_name() == BACKEND_NAME
    }


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
