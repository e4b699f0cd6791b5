"""What would run each kind of a model's layers, told from its configuration alone: before weights
are loaded and workers start."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_ffa_fp8fp8.integration.layer_kinds import FULL_ATTENTION
from vllm_ffa_fp8fp8.integration.refusals import check_impl_arguments, refusal_reasons

KINDS = {
    "attention": FULL_ATTENTION,
    "full_attention": FULL_ATTENTION,
    "hybrid": FULL_ATTENTION,
    "sliding_attention": "sliding_window",
    "sliding_window": "sliding_window",
    "chunked_attention": "chunked_local_attention",
}
"""Kinds of layers as vLLM names their caches, by what configurations call them; others by the
name that they have there."""
WITH_SINKS = ("gpt_oss",)
WITH_ALIBI = ("bloom",)
"""Types of models, or what these begin with, whose layers have that where the model's
configuration says so, or always."""
WITH_WINDOWS_EVERYWHERE = ("mistral", "mixtral", "phi3", "starcoder2")
"""Types of models whose configuration has a window and names no kinds. Of others like that the
layers are taken for full attention: which of them have the window only their code knows."""


@dataclass(frozen=True)
class LayersOfKind:
    """The layers of one kind.

    Args:
        kind: as vLLM names the kind of their cache, such as full_attention.
        layers: their numbers.
        size: tokens of a window or chunk; None where there is none.
        reasons: why FFA_FP8FP8 cannot run them; of full attention alone, as others are vLLM's.
    """

    kind: str
    layers: tuple[int, ...]
    size: int | None = None
    reasons: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.kind == FULL_ATTENTION


def layers_of_model(model_config: Any, **engine: Any) -> list[LayersOfKind]:
    """The kinds of layers of a model, as far as its configuration tells, full attention first.

    Args:
        model_config: vLLM's ModelConfig.
        engine: as `refusal_reasons` takes it; `parallel_config` besides, where heads are shared
            among ranks.
    """
    numbers: dict[str, list[int]] = {}
    for layer, kind in enumerate(_kinds(model_config)):
        numbers.setdefault(kind, []).append(layer)
    found = []
    for kind, layers in sorted(numbers.items(), key=lambda item: item[0] != FULL_ATTENTION):
        reasons = ()
        if kind == FULL_ATTENTION:
            reasons = tuple(_reasons(model_config, layers, **engine))
        found.append(LayersOfKind(kind, tuple(layers), _size(model_config, kind), reasons))
    return found


def full_head_size(model_config: Any) -> int:
    """Elements of a head of K in full attention."""
    text = model_config.hf_text_config
    return getattr(text, "global_head_dim", None) or model_config.get_head_size()


def _kinds(model_config: Any) -> Iterator[str]:
    """The kind of each layer."""
    text = model_config.hf_text_config
    named = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None)
    has_windows = _window(model_config) is not None
    if coded := getattr(text, "attn_type_list", None):
        named = ["attention" if code == 1 else "linear_attention" for code in coded]
    if not named:
        everywhere = has_windows and text.model_type in WITH_WINDOWS_EVERYWHERE
        only = "sliding_window" if everywhere else FULL_ATTENTION
        named = [only] * model_config.get_total_num_hidden_layers()
    for name in named:
        kind = KINDS.get(name, name)
        yield FULL_ATTENTION if kind == "sliding_window" and not has_windows else kind


def _window(model_config: Any) -> int | None:
    if model_config.disable_sliding_window:  # then no context is longer than it
        return None
    return model_config.get_sliding_window()


def _size(model_config: Any, kind: str) -> int | None:
    if kind == "sliding_window":
        return _window(model_config)
    if kind == "chunked_local_attention":
        return getattr(model_config.hf_text_config, "attention_chunk_size", None)
    return None


def _reasons(
    model_config: Any, layers: list[int], parallel_config: Any = None, **engine: Any
) -> Iterator[str]:
    text = model_config.hf_text_config
    model_type = getattr(text, "model_type", "")
    yield from refusal_reasons(
        head_size=full_head_size(model_config),
        dtype=model_config.dtype,
        attn_type=_attention_type(model_config),
        use_mla=model_config.use_mla,
        use_mm_prefix=model_config.is_mm_prefix_lm,
        use_rswa=model_config.rswa_window is not None,
        has_sink=model_type.startswith(WITH_SINKS),
        **engine,
    )
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    first_shared = model_config.get_total_num_hidden_layers() - shared
    arguments = {
        **_heads(model_config, parallel_config),
        "alibi_slopes": [] if model_type in WITH_ALIBI or getattr(text, "alibi", False) else None,
        "kv_sharing_target_layer_name": f"the last {shared} layers have none"
        if shared and layers[-1] >= first_shared
        else None,
    }
    try:
        check_impl_arguments(**arguments)
    except ValueError as error:
        yield str(error)


def _heads(model_config: Any, parallel_config: Any) -> dict[str, int]:
    if model_config.use_mla:  # which has no heads of this kind
        return {"num_heads": 1}
    if parallel_config is None:
        return {
            "num_heads": model_config.model_arch_config.total_num_attention_heads,
            "num_kv_heads": model_config.get_total_num_kv_heads(),
        }
    return {
        "num_heads": model_config.get_num_attention_heads(parallel_config),
        "num_kv_heads": model_config.get_num_kv_heads(parallel_config),
    }


def _attention_type(model_config: Any) -> str:
    kind = model_config.attn_type
    return kind if kind in ("encoder", "encoder_only", "encoder_decoder") else "decoder"
