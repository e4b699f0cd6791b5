"""Every environment variable that this project reads."""

import os

ATTENTION_BACKEND_VARIABLE = "VLLM_ATTENTION_BACKEND"
CONFIG_VARIABLE = "FFA_FP8FP8_CONFIG"


def attention_backend() -> str | None:
    """The backend's name as the user wrote it in VLLM_ATTENTION_BACKEND, None where unset."""
    return os.environ.get(ATTENTION_BACKEND_VARIABLE)


def config() -> str | None:
    """A preset's name or the path of a YAML file, None where unset or empty."""
    return os.environ.get(CONFIG_VARIABLE) or None
