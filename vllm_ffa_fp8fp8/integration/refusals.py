"""What FFA_FP8FP8 does not do, said by name and with what to do instead."""

from typing import Any

from vllm_ffa_fp8fp8.integration.connectors import connector_problem
from vllm_ffa_fp8fp8.registry import BACKEND_NAME

HEAD_SIZES = (64, 80, 96, 128, 256)
DTYPES = ("float16", "bfloat16")
KV_CACHE_DTYPES = (None, "auto", "float16", "bfloat16")
PAGE_SIZE_BASE = 16
MAX_GROUP_SIZE = 16
MIN_COMPUTE_CAPABILITY = (8, 0)
MIN_CAPABILITY_OF_SINKS = (9, 0)  # FlashAttention 3, which prefill takes

OTHER_BACKEND = "choose another --attention-backend, e.g. FLASH_ATTN"
OTHER_KIND = (
    "name it with --attention-backend, which leaves layers of other kinds to vLLM's choice, or in "
    'backend_per_kind for "full_attention" alone'
)

ATTENTION_TYPES = {
    "encoder": "encoder attention",
    "encoder_only": "encoder-only attention",
    "encoder_decoder": "cross attention (encoder-decoder)",
}

# Flags of AttentionBackend.validate_configuration: what each asks for, and what to do.
UNSUPPORTED_FLAGS = {
    "use_mla": ("MLA (multi-head latent attention)", OTHER_BACKEND),
    "use_sparse": ("sparse attention", OTHER_BACKEND),
    "use_mm_prefix": (
        "full attention over multimodal prefixes (mm_prefix)",
        "serve text alone with --language-model-only, or " + OTHER_BACKEND,
    ),
    "use_per_head_quant_scales": (
        "a checkpoint with per-head KV cache scales",
        "use a checkpoint without them, or " + OTHER_BACKEND,
    ),
    "has_sliding_window": ("sliding window attention", OTHER_KIND),
    "use_rswa": ("R-SWA", OTHER_BACKEND),
    "use_non_causal": ("non-causal attention", OTHER_BACKEND),
    "use_pcp": (
        "prefill context parallelism (PCP)",
        "leave --prefill-context-parallel-size at 1, or " + OTHER_BACKEND,
    ),
    "use_dcp": (
        "decode context parallelism (DCP)",
        "leave --decode-context-parallel-size at 1, or " + OTHER_BACKEND,
    ),
    "use_adaptive_verification": (
        "adaptive verification of speculative tokens",
        "disable it in --speculative-config, or " + OTHER_BACKEND,
    ),
}


def refusal_reasons(
    *,
    head_size: int,
    dtype: Any,
    kv_cache_dtype: str | None,
    block_size: int | None,
    device_capability: tuple[int, int] | None = None,
    attn_type: str = "decoder",
    has_sink: bool = False,
    use_batch_invariant: bool = False,
    use_kv_connector: bool = False,  # `check_engine` knows which
    **flags: bool,
) -> list[str]:
    """Why this configuration of a layer cannot run, empty where it can.

    The arguments are those of vLLM's `AttentionBackend.validate_configuration`; `block_size` is
    in tokens, `device_capability` None where there is no GPU. A flag that this version does not
    know is refused when set.
    """
    reasons = []
    if head_size not in HEAD_SIZES:
        allowed = ", ".join(map(str, HEAD_SIZES))
        reasons.append(_text(f"head_size {head_size}", f"it takes {allowed}; {OTHER_BACKEND}"))
    if (name := str(dtype).removeprefix("torch.")) not in DTYPES:
        reasons.append(_text(f"dtype {name}", "set --dtype to bfloat16 or float16"))
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        reasons.append(
            _text(
                f"kv_cache_dtype {kv_cache_dtype!r}",
                "it has its own FP8 cache format; set --kv-cache-dtype to the model's dtype, "
                "bfloat16 or float16, also where auto stands for what the checkpoint says",
            )
        )
    elif kv_cache_dtype in DTYPES and name in DTYPES and kv_cache_dtype != name:
        reasons.append(
            _text(
                f"kv_cache_dtype {kv_cache_dtype} of a {name} model",
                f"leave --kv-cache-dtype at auto, or set --dtype to {kv_cache_dtype}",
            )
        )
    if block_size is not None and block_size % PAGE_SIZE_BASE:
        reasons.append(
            _text(f"block_size {block_size}", f"set --block-size to a multiple of {PAGE_SIZE_BASE}")
        )
    if device_capability is not None and tuple(device_capability) < MIN_COMPUTE_CAPABILITY:
        found = ".".join(map(str, device_capability))
        reasons.append(
            _text(f"compute capability {found}", f"it needs 8.0 or newer; {OTHER_BACKEND}")
        )
    if has_sink and device_capability and tuple(device_capability) < MIN_CAPABILITY_OF_SINKS:
        what = "attention with sinks before compute capability 9.0"
        reasons.append(_text(what, OTHER_BACKEND))
    if attn_type != "decoder":
        reasons.append(_text(_attention_type(attn_type), OTHER_BACKEND))
    if use_batch_invariant and device_capability is None:
        reasons.append(_text("batch invariance on the CPU", "unset VLLM_BATCH_INVARIANT"))
    for flag, is_set in flags.items():
        if is_set:
            what, advice = UNSUPPORTED_FLAGS.get(flag, (flag, OTHER_BACKEND))
            reasons.append(_text(what, advice))
    return reasons


def check_platform(platform: Any) -> None:
    """ValueError unless `platform`, a vLLM Platform, is CUDA or CPU."""
    if platform.is_cuda() or platform.is_cpu():
        return
    names = {"ROCm": platform.is_rocm(), "XPU": platform.is_xpu(), "TPU": platform.is_tpu()}
    name = next((name for name, found in names.items() if found), platform.device_name)
    refuse(f"the platform {name}", "it runs on CUDA and on CPU; remove --attention-backend")


def check_options(options: Any, has_fp8: bool) -> None:
    """ValueError for what `options`, an FFAConfig, ask of a device that does not have it."""
    if options.v_cache_dtype == "fp8" and not has_fp8:
        refuse(
            "v_cache_dtype fp8 on a GPU without FP8 (compute capability before 8.9)",
            "leave v_cache_dtype at auto, or use an Ada, Hopper or newer GPU",
        )


def check_scan(options: Any, vllm_config: Any) -> None:
    """ValueError for what cannot be together with codes of keys, where `options` ask for them."""
    if not options.scans_codes:
        return
    from vllm_ffa_fp8fp8.kernels.cache.page_layout import CODE_TOKENS

    cache = vllm_config.cache_config
    if cache.user_specified_block_size and cache.block_size % CODE_TOKENS:
        refuse(
            f"block_size {cache.block_size} with scan int4",
            f"set --block-size to a multiple of {CODE_TOKENS}, or scan to base",
        )
    if vllm_config.speculative_config is not None and vllm_config.kv_transfer_config is not None:
        # a block may be sent away before its last tokens, drafts, are certain and have codes
        refuse(
            "scan int4 with drafts and a KV connector together",
            "drop --speculative-config or --kv-transfer-config, or set scan to base",
        )


def check_engine(vllm_config: Any) -> None:
    """ValueError for what `vllm_config` asks of the engine around the layers."""
    if vllm_config.parallel_config.use_ubatching:
        refuse("microbatches (dual-batch overlap)", f"drop --enable-dbo, or {OTHER_BACKEND}")
    if problem := connector_problem(vllm_config):
        refuse(*problem)
    speculative = vllm_config.speculative_config
    if speculative is None or not _drafts_are_ours(vllm_config):
        return
    # Both give prefills lengths on the host that lie below those on the device.
    if speculative.method == "draft_model":
        refuse(
            "drafts of a separate model (method draft_model)",
            "draft with ngram, eagle or mtp, or give that model another backend: "
            '"attention_backend": "FLASH_ATTN" in --speculative-config, with '
            "VLLM_USE_V2_MODEL_RUNNER=0, since vLLM's V2 model runner ignores it",
        )
    if speculative.parallel_drafting and speculative.method not in ("dflash", "dspark"):
        refuse(
            "parallel drafting (P-EAGLE)",
            'drop "parallel_drafting" from --speculative-config, or give the drafts another '
            '"attention_backend" there',
        )


def _drafts_are_ours(vllm_config: Any) -> bool:
    """Whether a model that drafts, of method draft_model or with parallel drafting, gets our
    backend: vLLM selects one for it where none is given, but V2 gives draft_model the target's."""
    attention, speculative = vllm_config.attention_config, vllm_config.speculative_config
    backends = [speculative.attention_backend, *attention.backend_per_kind.values()]
    if speculative.method == "draft_model" and vllm_config.use_v2_model_runner:
        backends.append(attention.backend)
    return any(getattr(backend, "name", None) == BACKEND_NAME for backend in backends)


def check_batch_invariance(has_drafts: bool) -> None:
    """ValueError for what VLLM_BATCH_INVARIANT=1 cannot be together with: drafts of the tokens
    to come, because those that are verified together decide together what is skipped."""
    if has_drafts:
        refuse(
            "speculative decoding with batch invariance",
            "unset VLLM_BATCH_INVARIANT, or drop --speculative-config",
        )


def check_impl_arguments(
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    alibi_slopes: list[float] | None = None,
    sliding_window: int | None = None,
    attn_type: str = "decoder",
    kv_sharing_target_layer_name: str | None = None,
    **extra_impl_args: Any,
) -> None:
    """ValueError for what only the impl's `__init__` gets to see: its arguments, less those that
    `refusal_reasons` judges. A head count is that of one rank; an extra argument is refused
    unless it is None or False."""
    num_kv_heads = num_kv_heads or num_heads
    group_size = num_heads / num_kv_heads
    if not group_size.is_integer() or not 1 <= group_size <= MAX_GROUP_SIZE:
        refuse(
            f"{num_heads} query heads over {num_kv_heads} KV heads",
            f"a KV head may serve 1 to {MAX_GROUP_SIZE} query heads; {OTHER_BACKEND}",
        )
    if alibi_slopes is not None:
        refuse("ALiBi (alibi_slopes)", OTHER_BACKEND)
    if sliding_window is not None:
        refuse(f"sliding window attention ({sliding_window} tokens)", OTHER_KIND)
    if attn_type != "decoder":
        refuse(_attention_type(attn_type), OTHER_BACKEND)
    if kv_sharing_target_layer_name is not None:
        refuse(
            f"sharing the KV cache of another layer ({kv_sharing_target_layer_name})", OTHER_BACKEND
        )
    extra_impl_args.pop("sinks", None)  # `refusal_reasons` judges them
    if extra_impl_args.get("dual_chunk_attention_config") is not None:
        refuse("dual chunk attention", OTHER_BACKEND)
    for name, value in extra_impl_args.items():
        if value is not None and value is not False:
            refuse(f"the attention argument {name}={value!r}", OTHER_BACKEND)


def check_kv_cache_spec(spec: Any) -> None:
    """ValueError unless `spec`, a layer's KVCacheSpec, is plain causal full attention with keys
    and values of one head size."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    # A window or chunk on a full-attention spec: the layer was demoted to full attention's cache.
    if getattr(spec, "sliding_window", None) is not None:
        refuse(f"sliding window attention ({spec.sliding_window} tokens)", OTHER_KIND)
    if getattr(spec, "attention_chunk_size", None) is not None:
        refuse(f"chunked local attention ({spec.attention_chunk_size} tokens)", OTHER_KIND)
    if type(spec) is not FullAttentionSpec:
        refuse(f"the cache of {type(spec).__name__}", OTHER_BACKEND)
    if spec.head_size_v != spec.head_size:
        refuse(f"head_size_v {spec.head_size_v} beside head_size {spec.head_size}", OTHER_BACKEND)
    if spec.non_causal:
        refuse("non-causal attention", OTHER_BACKEND)


def _attention_type(attn_type: str) -> str:
    value = getattr(attn_type, "value", attn_type)
    return ATTENTION_TYPES.get(value, f"attention type {value!r}")


def _text(what: str, advice: str) -> str:
    return f"{BACKEND_NAME} does not support {what}: {advice}"


def refuse(what: str, advice: str) -> None:
    """ValueError: this is not supported, do that instead."""
    raise ValueError(_text(what, advice))
