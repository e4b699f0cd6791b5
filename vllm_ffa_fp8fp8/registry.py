"""What FFA_FP8FP8 is called, where it is, and how vLLM comes to know it."""

BACKEND_NAME = "FFA_FP8FP8"
BACKEND_PATH = "vllm_ffa_fp8fp8.attention.backend.FFAFP8FP8Backend"
FUSED_ATTENTION_OP = "vllm_ffa::fused_attention"


def register_backend():
    """Adds FFA_FP8FP8 to vLLM's registry, unless it is there, and returns its member."""
    from vllm.v1.attention.backends import registry

    if BACKEND_NAME not in registry.AttentionBackendEnum.__members__:
        registry.register_backend(BACKEND_NAME, BACKEND_PATH)
    return registry.AttentionBackendEnum[BACKEND_NAME]
