"""What depends on vLLM's version, apart from its interface for backends and from `patches`."""

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from types import CodeType
from typing import Any

SUPPORTED_VLLM = ">=0.32,<0.34"
_FIRST, _FIRST_UNSUPPORTED = (0, 32), (0, 34)


def unsupported_vllm(version_tuple: tuple | None = None) -> str | None:
    """What is wrong with the installed vLLM's version and what to do, or None.

    A build without a version of its own (a development checkout: 0.0 or 0.1) is taken as new.
    """
    from vllm.version import __version__, __version_tuple__

    release = tuple((version_tuple or __version_tuple__)[:2])
    if release in ((0, 0), (0, 1)) or _FIRST <= release < _FIRST_UNSUPPORTED:
        return None
    found = __version__ if version_tuple is None else ".".join(map(str, version_tuple))
    return (
        f"vllm-ffa-fp8fp8 supports vLLM {SUPPORTED_VLLM}, but {found} is installed: the attention "
        f"backend FFA_FP8FP8 is not available. Install a supported vLLM, or another release of "
        f"vllm-ffa-fp8fp8."
    )


def load_flash_attention(
    head_size: int,
    batch_invariant: bool = False,
    sinks: Any = None,
    logits_soft_cap: float | None = None,
):
    """FlashAttention for prefill on CUDA: the build that vLLM brings, else `flash-attn`.

    Returns `attend(query, key, value, cu_query_lens, cu_seq_lens, max_query_len, max_seq_len,
    scale, output)`, causal with the last query at the last key, on packed `[tokens, heads,
    head_size]` tensors. `batch_invariant`: a request's keys are never split among programs, which
    only vLLM's build can promise. `sinks`, `[num_heads]`: scores without a value, which only its
    versions 3 and 4 take. `logits_soft_cap`: of scores, natural units. Raises ImportError when
    there is none that can.
    """
    from vllm.v1.attention.backends import fa_utils

    has_sinks = sinks is not None
    version = fa_utils.get_flash_attn_version(
        head_size=head_size, has_sinks=has_sinks, requires_softcap=bool(logits_soft_cap)
    )
    if has_sinks and version not in (3, 4):
        raise ImportError(
            "FFA_FP8FP8 needs FlashAttention 3 or 4 for attention with sinks, and this vLLM brings "
            "neither for this GPU and head size; choose another --attention-backend"
        )
    if version is not None:

        def attend(query, key, value, cu_query, cu_seq, max_query, max_seq, scale, output):
            fa_utils.flash_attn_varlen_func(
                query, key, value, max_query, cu_query, max_seq, cu_seq,
                softmax_scale=scale, causal=True, out=output, fa_version=version,
                num_splits=int(batch_invariant),  # 0: as many as FlashAttention finds good
                s_aux=sinks, softcap=logits_soft_cap or 0.0,
            )  # fmt: skip

        return attend
    if batch_invariant:
        raise ImportError(
            "FFA_FP8FP8 needs vLLM's FlashAttention for batch invariance, and this vLLM brings "
            "none for this GPU and head size; unset VLLM_BATCH_INVARIANT"
        )
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(
            "FFA_FP8FP8 needs FlashAttention for prefill: this vLLM brings none for this GPU and "
            "head size; pip install flash-attn"
        ) from error

    capped = {"softcap": logits_soft_cap} if logits_soft_cap else {}
    if capped and "softcap" not in signature(flash_attn_varlen_func).parameters:
        raise ImportError(
            "FFA_FP8FP8 needs flash-attn 2.6 or newer for a soft cap of logits; "
            "pip install -U flash-attn"
        )

    def attend(query, key, value, cu_query, cu_seq, max_query, max_seq, scale, output):
        output.copy_(
            flash_attn_varlen_func(
                query,
                key,
                value,
                cu_query,
                cu_seq,
                max_query,
                max_seq,
                softmax_scale=scale,
                causal=True,
                **capped,
            )  # fmt: skip
        )

    return attend


FUSABLE_ATTENTION = (
    ("vllm.model_executor.models.llama", "LlamaAttention"),
    ("vllm.model_executor.models.mistral", "MistralAttention"),
    ("vllm.model_executor.models.qwen2", "Qwen2Attention"),
    ("vllm.model_executor.models.qwen3", "Qwen3Attention"),
)
"""Attention modules whose forward is `qkv_proj`, norms of q and k heads (see `head_norms`),
`rotary_emb`, `attn`, `o_proj`; MistralAttention's may scale q besides."""


def is_fusable_forward(forward: Callable) -> bool:
    """Whether `forward`, a class's function, does what one of FUSABLE_ATTENTION does: it is that
    function, or one compiled to the same code, as many models have. What somebody else has put in
    a function's place is not."""
    code = _code(forward)
    for module_name, class_name in FUSABLE_ATTENTION:
        module = import_module(module_name)
        original = _code(getattr(module, class_name).forward)
        if code is None or original is None or original.co_filename != module.__file__:
            continue
        if all(getattr(code, part) == getattr(original, part) for part in _BEHAVIOUR):
            return True
    return False


_BEHAVIOUR = ("co_code", "co_names", "co_varnames", "co_consts")


def _code(function: Any) -> CodeType | None:
    if getattr(function, "by_ffa_fp8fp8", False):  # our own wrapper
        function = function.__wrapped__
    return getattr(function, "__code__", None)


def head_norms(attention: Any) -> tuple[Any, Any] | None:
    """The norms of q and k heads that a module with a fusable forward applies, or None."""
    if not hasattr(attention, "q_norm") or not getattr(attention, "qk_norm", True):
        return None
    return attention.q_norm, attention.k_norm


def attention_problem(attention: Any, head_size: int) -> str | None:
    """Why norms and rotation of `attention`, a module with a fusable forward, are not those of
    the kernels, or None."""
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    rotary = attention.rotary_emb
    forwards = ("forward_native", "forward_cuda", "forward_cpu")
    if any(
        getattr(type(rotary), name, 0) is not getattr(RotaryEmbedding, name) for name in forwards
    ):
        return f"{type(rotary).__name__} has a rotation of its own"
    if rotary.head_size != head_size or not hasattr(rotary, "cos_sin_cache"):
        return "its rotation is not over the attention's heads"
    if getattr(attention, "do_llama_4_scaling", False):
        return "it scales q by position"
    for norm in head_norms(attention) or ():
        plain = type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
        if not plain or tuple(norm.weight.shape) != (head_size,):
            return f"{type(norm).__name__} is not a plain norm of a head"
    return None


def projection_problem(linear: Any, vllm_config: Any) -> str | None:
    """Why `linear`, the QKV projection, is not a plain matrix of this GPU's own, or None."""
    from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod

    if vllm_config.lora_config is not None:
        return "LoRA is on"
    if type(linear) is not QKVParallelLinear:
        return f"{type(linear).__name__} is not a plain matrix"
    if type(linear.quant_method) is not UnquantizedLinearMethod:
        return f"it is quantised ({type(linear.quant_method).__name__})"
    if linear.tp_size > 1:
        return "it is tensor-parallel"
    if linear.skip_bias_add:
        return "it leaves its bias to others"
    return None


def layer_name_encoder() -> Callable[[str], Any]:
    """What makes of a layer's name the argument of an operator that takes vLLM's LayerNameType."""
    from vllm.utils.torch_utils import _encode_layer_name

    return _encode_layer_name


def attention_context(layer_name: Any) -> tuple[Any, Any, Any, Any]:
    """The step's metadata, the layer of that encoded name, its KV cache and the step's slots, int64
    `[<= num_tokens]`; no metadata and no slots in the profiling run; within a forward context."""
    from vllm.model_executor.layers.attention import attention
    from vllm.utils.torch_utils import _resolve_layer_name

    return attention.get_attention_context(_resolve_layer_name(layer_name))


def backend_names(worker: Any) -> str:
    """The names of the attention backends of a worker's layers."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    attention = [layer for layer in layers if hasattr(layer, "get_attn_backend")]
    return ", ".join(sorted({layer.get_attn_backend().get_name() for layer in attention}))
