"""The patches behind what requests choose and what `/metrics` shows."""

from collections.abc import Callable
from functools import partial
from typing import Any

from vllm_ffa_fp8fp8.integration.request_limits import check_requests
from vllm_ffa_fp8fp8.integration.stat_logger import report_metrics
from vllm_ffa_fp8fp8.integration.worker_steps import note_requests_v1, note_requests_v2


def apply(once_loaded: Callable[[str, Callable], None], is_chosen: Callable[[Any], bool]) -> None:
    """Applies them when the modules that they change are loaded; `is_chosen` says whether a
    VllmConfig has our backend."""
    once_loaded("vllm.v1.engine.input_processor", partial(check_requests, is_chosen))
    once_loaded("vllm.v1.metrics.loggers", partial(report_metrics, is_chosen))
    once_loaded("vllm.v1.worker.gpu_model_runner", note_requests_v1)
    once_loaded("vllm.v1.worker.gpu.model_runner", note_requests_v2)
