"""FFA_FP8FP8: a vLLM attention backend with FP8 + FP8-residual keys and block-skipping decode."""


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("vllm-ffa-fp8fp8")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
