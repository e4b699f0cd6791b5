"""What is checked where an engine is configured: in the user's process, before workers start."""

from collections.abc import Mapping
from typing import Any

from vllm_ffa_fp8fp8.config import ADDITIONAL_CONFIG_KEY
from vllm_ffa_fp8fp8.integration.layer_kinds import check_full_attention
from vllm_ffa_fp8fp8.integration.model_layers import layers_of_model
from vllm_ffa_fp8fp8.registry import BACKEND_NAME


def check_model(vllm_config: Any, device_capability: tuple[int, int] | None) -> None:
    """ValueError for a model whose full attention FFA_FP8FP8 cannot run, or that has none. Workers
    would find the same when they make the layers, after a minute, and say so in their logs."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    found = layers_of_model(
        vllm_config.model_config,
        parallel_config=parallel,
        kv_cache_dtype=cache.cache_dtype,
        block_size=cache.block_size if cache.user_specified_block_size else None,
        device_capability=device_capability,
        use_non_causal=vllm_config.attention_config.use_non_causal,
        use_pcp=parallel.prefill_context_parallel_size > 1,
        use_dcp=parallel.decode_context_parallel_size > 1,
    )
    check_full_attention([of_kind.kind for of_kind in found])
    if reasons := [reason for of_kind in found for reason in of_kind.reasons]:
        raise ValueError("; ".join(reasons))


def warn_about_unused_options(additional_config: Any) -> None:
    """Once, where options of FFA_FP8FP8 are given and another backend runs."""
    if not isinstance(additional_config, Mapping) or ADDITIONAL_CONFIG_KEY not in additional_config:
        return
    from vllm.logger import init_logger

    init_logger(f"vllm.{__name__}").warning_once(
        "The options under %r of additional_config do nothing: %s was not chosen. Add "
        "--attention-backend %s, or attention_backend=%r.",
        ADDITIONAL_CONFIG_KEY,
        *[BACKEND_NAME] * 3,
    )
