"""Everything that depends on vLLM's version."""

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


def load_flash_attention(head_size: int, batch_invariant: bool = False):
    """FlashAttention for prefill on CUDA: the build that vLLM brings, else `flash-attn`.

    Returns `attend(query, key, value, cu_query_lens, cu_seq_lens, max_query_len, max_seq_len,
    scale, output)`, causal with the last query at the last key, on packed `[tokens, heads,
    head_size]` tensors. `batch_invariant`: a request's keys are never split among programs, which
    only vLLM's build can promise. Raises ImportError when there is neither.
    """
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(head_size=head_size)
    if version is not None:

        def attend(query, key, value, cu_query, cu_seq, max_query, max_seq, scale, output):
            fa_utils.flash_attn_varlen_func(
                query, key, value, max_query, cu_query, max_seq, cu_seq,
                softmax_scale=scale, causal=True, out=output, fa_version=version,
                num_splits=int(batch_invariant),  # 0: as many as FlashAttention finds good
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
            "head size; install the extra: pip install 'vllm-ffa-fp8fp8[flash-attn]'"
        ) from error

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
            )  # fmt: skip
        )

    return attend
