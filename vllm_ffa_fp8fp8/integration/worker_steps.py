"""What a worker is told of its steps, before their attention metadata is built."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_ffa_fp8fp8.integration.request_limits import worker_limits

when_idle: list[Callable[[], None]] = []
"""Called when no request is left, once after the last step."""


def note_requests_v1() -> None:
    """Wraps `_update_states` of the V1 model runner, after which a step's batch has its order.

    Symptom without it: metadata builders do not see `extra_args`, and all requests get the
    engine's delta; the last steps before a pause are not in `/metrics`. Can go when
    CommonAttentionMetadata has the requests' sampling parameters.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def note(runner, scheduler_output) -> None:
        worker_limits.note_v1(scheduler_output, runner.input_batch.req_ids)

    _after(GPUModelRunner, "_update_states", note)


def note_requests_v2() -> None:
    """Wraps `add_requests` of the V2 model runner, after which new requests have their slots.

    Symptom and end: as those of `note_requests_v1`.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def note(runner, scheduler_output) -> None:
        worker_limits.note_v2(scheduler_output, runner.req_states.req_id_to_index)

    _after(GPUModelRunner, "add_requests", note)


def _after(runner_class: type, name: str, note: Callable[[Any, Any], None]) -> None:
    """Has `note(runner, scheduler_output)` called after that method of the class."""
    original = getattr(runner_class, name)
    if getattr(original, "by_ffa_fp8fp8", False):
        return

    @functools.wraps(original)
    def method(self, scheduler_output):
        result = original(self, scheduler_output)
        note(self, scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            for call in when_idle:
                call()
        return result

    method.by_ffa_fp8fp8 = True
    setattr(runner_class, name, method)
