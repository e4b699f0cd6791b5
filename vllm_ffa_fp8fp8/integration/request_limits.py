"""Requests that choose for themselves how much is skipped: `SamplingParams(extra_args={"ffa_delta":
6.0})`, `vllm_xargs` in the OpenAI API. What they may ask for, and how a worker learns of it."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from vllm_ffa_fp8fp8.option_values import RULES, is_int

if TYPE_CHECKING:  # every vLLM process of this environment loads this module
    import numpy as np

    from vllm_ffa_fp8fp8.config import FFAConfig

PREFIX = "ffa_"
REQUEST_KEYS = {rule: PREFIX + option for rule, option in RULES.items()}


class RequestLimits:
    """What the requests of a worker asked for: float, None for the engine's own limit."""

    def __init__(self):
        self._of_request: dict[str, float] = {}  # of those that the V1 model runner has
        self._of_slot: dict[int, float] = {}  # by the slots of the V2 model runner
        self._rows: list[float | None] = []

    def of_batch(self, slots: "np.ndarray | None") -> list[float | None]:
        """Of a batch, row by row; rows that are missing at the end asked for nothing.

        `slots`: `CommonAttentionMetadata.req_idx`. None is the order of the step: of V1, or of the
        batch before, to which a model drafts.
        """
        if slots is not None:
            asked = self._of_slot
            self._rows = [asked.get(slot) for slot in slots.tolist()] if asked else []
        return self._rows

    def note_v1(self, scheduler_output: Any, req_ids: Sequence[str]) -> None:
        """A step of V1: its new and its finished requests, and the order of its batch."""
        asked = self._of_request
        for req_id in scheduler_output.finished_req_ids:
            asked.pop(req_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            _put(asked, request.req_id, request.sampling_params)
        self._rows = [asked.get(req_id) for req_id in req_ids] if asked else []

    def note_v2(self, scheduler_output: Any, slots: Mapping[str, int]) -> None:
        """New requests of V2, each in a slot that was another's before."""
        for request in scheduler_output.scheduled_new_reqs:
            _put(self._of_slot, slots[request.req_id], request.sampling_params)


worker_limits = RequestLimits()
"""Those of this process, which has one worker."""


def check_request(extra_args: Mapping[str, Any] | None, config: "FFAConfig") -> None:
    """ValueError for what a request may not ask of an engine with such options."""
    for key, value in (extra_args or {}).items():
        if not (isinstance(key, str) and key.startswith(PREFIX)):
            continue
        own = REQUEST_KEYS[config.rule]
        if key not in REQUEST_KEYS.values():
            close = get_close_matches(key, [own], n=1)
            raise ValueError(
                f"FFA_FP8FP8 knows no extra argument {key!r} of a request"
                f"{f' (did you mean {own!r}?)' if close else f'; it takes {own!r}'}"
            )
        if key != own:
            raise ValueError(
                f"FFA_FP8FP8 takes no {key!r} from a request: this engine's rule is "
                f"{config.rule!r}; send {own!r} instead"
            )
        (_check_delta if config.rule == "threshold" else _check_tau)(value, config)


def check_requests(is_chosen: Callable[[Any], bool]) -> None:
    """Wraps InputProcessor.process_inputs, through which each request goes in the process that
    took it, before it is queued.

    Symptom without it: a bad `ffa_delta` is ignored, or fails in the worker with all requests of
    its step. Can go when vLLM lets plugins validate `extra_args`.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_ffa_fp8fp8.config import FFAConfig

    original = InputProcessor.process_inputs
    if getattr(original, "by_ffa_fp8fp8", False):
        return

    @functools.wraps(original)
    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        if extra_args := getattr(params, "extra_args", None):
            if not hasattr(self, "ffa_config"):
                chosen = is_chosen(self.vllm_config)
                self.ffa_config = FFAConfig.from_vllm_config(self.vllm_config) if chosen else None
            if self.ffa_config is not None:
                try:
                    check_request(extra_args, self.ffa_config)
                except ValueError as error:  # of other kinds vLLM's server makes a 500
                    raise VLLMValidationError(str(error), parameter="extra_args") from None
        return original(self, request_id, prompt, params, *args, **kwargs)

    process_inputs.by_ffa_fp8fp8 = True
    InputProcessor.process_inputs = process_inputs


def _check_delta(value: Any, config: "FFAConfig") -> None:
    least = config.min_request_delta
    if not _is_number(value) or not value >= least:
        raise ValueError(
            f"'ffa_delta' = {value!r} ({type(value).__name__}) of a request is not valid; allowed "
            f"is a number >= {least:g} (log2 units"
            f"{', at least what the option min_request_delta says' if least else ''})"
        )
    if not config.prunes and value < math.inf:
        _refuse_without_limit("ffa_delta", "delta, such as 1000, that keeps everything")


def _check_tau(value: Any, config: "FFAConfig") -> None:
    most = config.max_request_tau
    if not _is_number(value) or not 0 <= value <= most or value >= 1:
        upper = "below 1" if most >= 1 else f"up to {most:g}, the option max_request_tau"
        raise ValueError(
            f"'ffa_tau' = {value!r} ({type(value).__name__}) of a request is not valid; allowed "
            f"is a number from 0, which reads everything, {upper} (a share of the softmax)"
        )
    if not config.prunes and value > 0:
        _refuse_without_limit("ffa_tau", "tau, such as 1e-6, that reads everything")


def _refuse_without_limit(key: str, instead: str) -> None:
    raise ValueError(
        f"FFA_FP8FP8 takes no {key!r} from a request: this engine was started without pruning; "
        f"start it with a {instead}, and requests can choose theirs"
    )


def _is_number(value: Any) -> bool:
    return is_int(value) or isinstance(value, float)


def _put(limits: dict, key: Any, sampling_params: Any) -> None:
    extra_args = getattr(sampling_params, "extra_args", None) or {}
    asked = [extra_args[name] for name in REQUEST_KEYS.values() if name in extra_args]
    if asked:
        limits[key] = float(asked[0])
    else:
        limits.pop(key, None)
