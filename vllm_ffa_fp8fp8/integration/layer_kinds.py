"""Models that mix kinds of layers: full attention runs FFA_FP8FP8, all else what vLLM gives it by
default. Changes to vLLM as in `patches`."""

import functools
import sys
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

from vllm_ffa_fp8fp8.integration.refusals import refuse
from vllm_ffa_fp8fp8.registry import BACKEND_NAME

FULL_ATTENTION = "full_attention"
LAYERS = "vllm.model_executor.layers.attention"


def leave_other_kinds_to_vllm() -> None:
    """Wraps `get_attn_backend` where layers ask for it: those with a sliding window or with local
    chunks are answered as if FFA_FP8FP8 were not named, unless `backend_per_kind` names it for
    windows.

    Symptom without it: every layer of Gemma 3, gpt-oss or Llama 4 is offered FFA_FP8FP8, which
    refuses all but the full ones, and the engine does not start. vLLM's own `backend_per_kind`
    takes local chunks for full attention. Can go when a backend can say which kinds it is for.
    """
    for name in (f"{LAYERS}.attention", f"{LAYERS}.chunked_local_attention"):
        module = sys.modules[name]
        original = module.get_attn_backend
        if not getattr(original, "by_ffa_fp8fp8", False):
            has_chunks = name.endswith("chunked_local_attention")
            module.get_attn_backend = _by_kind(original, has_chunks)


def _by_kind(original: Any, has_chunks: bool) -> Any:
    @functools.wraps(original)
    def get_attn_backend(*args, **kwargs):
        if has_chunks or kwargs.get("has_sliding_window"):
            with _ours_not_named():
                return original(*args, **kwargs)
        return original(*args, **kwargs)

    get_attn_backend.by_ffa_fp8fp8 = True
    return get_attn_backend


@contextmanager
def _ours_not_named():
    """While a layer of another kind asks: FFA_FP8FP8 is named neither for all layers nor for full
    attention."""
    from vllm.config import get_current_vllm_config

    attention = get_current_vllm_config().attention_config
    backend, kinds = attention.backend, attention.backend_per_kind
    if is_ours(backend):
        attention.backend = None
    if is_ours(kinds.get(FULL_ATTENTION)):
        attention.backend_per_kind = {k: v for k, v in kinds.items() if k != FULL_ATTENTION}
    try:
        yield
    finally:
        attention.backend, attention.backend_per_kind = backend, kinds


def say_what_runs() -> None:
    """Wraps the platform's `update_block_size_for_backend`, which vLLM calls once all layers are
    made: logs which backend runs which kind of layer where there are several, and refuses a model
    of which FFA_FP8FP8 runs none.

    Symptom without it: nobody can see which layers are pruned; a model of sliding windows alone
    runs without FFA_FP8FP8 though it was named. Can go when vLLM logs a backend for each kind.
    """
    from vllm.platforms import current_platform

    platform_class = type(current_platform)
    original = platform_class.update_block_size_for_backend.__func__
    if getattr(original, "by_ffa_fp8fp8", False):
        return

    @functools.wraps(original)
    def update_block_size_for_backend(cls, vllm_config, *args, **kwargs):
        result = original(cls, vllm_config, *args, **kwargs)
        if is_chosen(vllm_config) and vllm_config.model_config is not None:
            _say_what_runs(vllm_config)
        return result

    update_block_size_for_backend.by_ffa_fp8fp8 = True
    platform_class.update_block_size_for_backend = classmethod(update_block_size_for_backend)


def is_chosen(vllm_config: Any) -> bool:
    """Whether some layer, of the model or of one that drafts for it, is to have our backend."""
    drafts = vllm_config.speculative_config
    return is_named(vllm_config) or drafts is not None and is_ours(drafts.attention_backend)


def is_named(vllm_config: Any) -> bool:
    attention = vllm_config.attention_config
    return any(map(is_ours, (attention.backend, *attention.backend_per_kind.values())))


def is_ours(backend: Any) -> bool:
    return getattr(backend, "name", None) == BACKEND_NAME


def _say_what_runs(vllm_config: Any) -> None:
    from vllm.logger import init_logger

    specs = _specs_by_kind_and_backend(vllm_config)
    ours = {key: found for key, found in specs.items() if key[1] == BACKEND_NAME}
    others = {key: found for key, found in specs.items() if key not in ours}
    has_all_layers = vllm_config.parallel_config.pipeline_parallel_size == 1
    if has_all_layers and is_named(vllm_config):
        check_full_attention([kind for kind, _ in specs])
    if not ours or not others:
        return
    manages_kinds = not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    init_logger(f"vllm.{__name__}").info_once(
        "%s runs %s; vLLM's choice for the others: %s.%s",
        BACKEND_NAME,
        ", ".join(f"{kind} ({_layers(found)})" for (kind, _), found in ours.items()),
        ", ".join(f"{kind} ({_layers(found)}) {name}" for (kind, name), found in others.items()),
        _fill(specs) if manages_kinds else "",
    )


def _layers(found: list[Any]) -> str:
    return f"{len(found)} layer{'s' * (len(found) > 1)}"


def check_full_attention(kinds: list[str]) -> None:
    """ValueError where `kinds`, those of all layers of a model, have no full attention."""
    if FULL_ATTENTION in kinds:
        return
    advice = "remove --attention-backend"
    if "sliding_window" in kinds:
        advice += ", or add --disable-sliding-window, with which the window is the longest context"
    refuse(f"a model without full attention (it has {', '.join(kinds) or 'no attention'})", advice)


def _specs_by_kind_and_backend(vllm_config: Any) -> dict[tuple[str, str], list[Any]]:
    """What the layers with a cache store of a block, by the kind of layer and its backend."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.kv_cache_interface import AttentionSpec, get_kv_cache_spec_kind

    found = defaultdict(list)
    for layer in vllm_config.compilation_config.static_forward_context.values():
        if not hasattr(layer, "get_attn_backend"):
            continue
        backend = layer.get_attn_backend()
        with set_current_vllm_config(vllm_config):
            spec = layer.get_kv_cache_spec(vllm_config)
            if isinstance(spec, AttentionSpec):
                spec = backend.customize_spec(spec)
        if spec is not None:
            found[get_kv_cache_spec_kind(spec).value, backend.get_name()].append(spec)
    return dict(found)


def _fill(specs: dict[tuple[str, str], list[Any]]) -> str:
    """How much of a page each kind uses: vLLM's cache manager makes all pages as large as the
    largest, gives smaller ones more tokens where that fits, and leaves the rest empty."""
    page = max(spec.page_size_bytes for found in specs.values() for spec in found)
    fills = {}
    for (kind, _), (spec, *_) in specs.items():
        used = spec.real_page_size_bytes
        if page % spec.page_size_bytes == 0:
            used *= page // spec.page_size_bytes
        fills[kind] = used / page
    listed = ", ".join(f"{share:.1%} by {kind}" for kind, share in fills.items())
    return f" Pages have {page:,} bytes, filled to {listed}."
