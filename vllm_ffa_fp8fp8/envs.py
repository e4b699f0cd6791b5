"""Every environment variable that this project reads."""

import os

ATTENTION_BACKEND_VARIABLE = "VLLM_ATTENTION_BACKEND"
CONFIG_VARIABLE = "FFA_FP8FP8_CONFIG"
METRICS_VARIABLE = "FFA_FP8FP8_METRICS_DIR"
PLUGINS_VARIABLE = "VLLM_PLUGINS"


def attention_backend() -> str | None:
    """The backend's name as the user wrote it in VLLM_ATTENTION_BACKEND, None where unset."""
    return os.environ.get(ATTENTION_BACKEND_VARIABLE)


def batch_invariant() -> bool:
    """VLLM_BATCH_INVARIANT, as vLLM reads it."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def compile_threads() -> int:
    """VLLM_TRITON_JIT_WARMUP_NUM_THREADS, as vLLM reads it: threads that compile at a time."""
    from vllm import envs

    return max(1, envs.VLLM_TRITON_JIT_WARMUP_NUM_THREADS)


def config() -> str | None:
    """A preset's name or the path of a YAML file, None where unset or empty."""
    return os.environ.get(CONFIG_VARIABLE) or None


def metrics_directory() -> str | None:
    """Where workers write their figures, which the process that starts them sets."""
    return os.environ.get(METRICS_VARIABLE)


def prometheus_directory() -> str | None:
    """PROMETHEUS_MULTIPROC_DIR, which vLLM sets where there are several API servers."""
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR")


def plugins() -> list[str] | None:
    """The only plugins that vLLM loads, None where VLLM_PLUGINS is unset: all."""
    value = os.environ.get(PLUGINS_VARIABLE)
    return None if value is None else value.split(",")
