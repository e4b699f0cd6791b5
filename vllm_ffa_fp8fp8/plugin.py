"""The entry points by which vLLM loads this plugin. They load nothing that vLLM has not loaded:
every vLLM process on a machine with the plugin runs them, whether the backend is chosen or not."""

from vllm_ffa_fp8fp8.registry import register_backend


def register_early() -> None:
    """Entry point of `vllm.platform_plugins`: names the backend before any configuration is built.

    General plugins load too late for `LLM(attention_config={"backend": "FFA_FP8FP8"})`. Returns
    None: this is no platform.
    """
    from vllm_ffa_fp8fp8.integration import compat, patches

    if not compat.unsupported_vllm():
        register_backend()
        patches.make_backend_picklable()


def register() -> None:
    """Entry point of `vllm.general_plugins`: everything that vLLM needs to offer the backend."""
    from vllm.logger import init_logger

    from vllm_ffa_fp8fp8.integration import compat, patches

    logger = init_logger(f"vllm.{__name__}")
    if problem := compat.unsupported_vllm():
        logger.warning_once(problem)
        return
    try:
        register_backend()
        patches.apply()
    except Exception:  # whatever it is, vLLM without FFA_FP8FP8 is to go on
        logger.warning("The attention backend FFA_FP8FP8 is not available.", exc_info=True)
