"""What a request may ask for, and that its rows get it, in the order of both model runners."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_ffa_fp8fp8.attention.limit_rows import LimitRows
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.integration.request_limits import RequestLimits, check_request

THRESHOLD, SHARE = FFAConfig(rule="threshold"), FFAConfig(rule="share")
FLOOR = FFAConfig(rule="threshold", min_request_delta=4)
CEILING = FFAConfig(rule="share", max_request_tau=0.1)
EXACT, EXACT_SHARE = FFAConfig(rule="threshold", delta=None), FFAConfig(rule="share", tau=None)


@pytest.mark.parametrize("config, asked", [
    (THRESHOLD, None),
    (THRESHOLD, {"kv_transfer_params": {}, 5: 6}),
    (THRESHOLD, {"ffa_delta": 0}),
    (THRESHOLD, {"ffa_delta": 6.5}),
    (THRESHOLD, {"ffa_delta": math.inf}),
    (FLOOR, {"ffa_delta": 4}),
    (SHARE, {"ffa_tau": 0}),
    (SHARE, {"ffa_tau": 0.999}),
    (CEILING, {"ffa_tau": 0.1}),
    (EXACT, {"ffa_delta": math.inf}),
    (EXACT_SHARE, {"ffa_tau": 0.0}),
])  # fmt: skip
def test_requests_may_ask(config, asked):
    check_request(asked, config)


@pytest.mark.parametrize("config, asked, said", [
    (THRESHOLD, {"ffa_delta": "6"}, ["'ffa_delta' = '6' (str)", "a number >= 0"]),
    (THRESHOLD, {"ffa_delta": None}, ["'ffa_delta' = None", "a number >= 0"]),
    (THRESHOLD, {"ffa_delta": True}, ["'ffa_delta' = True (bool)"]),
    (THRESHOLD, {"ffa_delta": [6.0]}, ["'ffa_delta' = [6.0] (list)"]),
    (THRESHOLD, {"ffa_delta": math.nan}, ["'ffa_delta' = nan"]),
    (THRESHOLD, {"ffa_delta": -0.5}, ["'ffa_delta' = -0.5"]),
    (FLOOR, {"ffa_delta": 3.9}, ["'ffa_delta' = 3.9", ">= 4", "min_request_delta"]),
    (THRESHOLD, {"ffa_tau": 0.1}, ["no 'ffa_tau'", "rule is 'threshold'", "'ffa_delta'"]),
    (THRESHOLD, {"ffa_dleta": 5.0}, ["'ffa_dleta'", "did you mean 'ffa_delta'?"]),
    (THRESHOLD, {"ffa_block_size": 16}, ["'ffa_block_size'", "it takes 'ffa_delta'"]),
    (SHARE, {"ffa_delta": 5.0}, ["no 'ffa_delta'", "rule is 'share'", "'ffa_tau'"]),
    (SHARE, {"ffa_tau": 1}, ["'ffa_tau' = 1 (int)", "below 1"]),
    (SHARE, {"ffa_tau": -0.1}, ["'ffa_tau' = -0.1", "from 0"]),
    (SHARE, {"ffa_tau": math.nan}, ["'ffa_tau' = nan"]),
    (SHARE, {"ffa_tau": "0.1"}, ["'ffa_tau' = '0.1' (str)"]),
    (CEILING, {"ffa_tau": 0.2}, ["'ffa_tau' = 0.2", "up to 0.1", "max_request_tau"]),
    (EXACT, {"ffa_delta": 6.0}, ["without pruning", "start it with a delta"]),
    (EXACT_SHARE, {"ffa_tau": 0.1}, ["without pruning", "start it with a tau"]),
])  # fmt: skip
def test_what_requests_may_not_ask_is_named(config, asked, said):
    with pytest.raises(ValueError) as raised:
        check_request(asked, config)
    for part in said:
        assert part in str(raised.value)


def request(req_id, **extra_args):
    return SimpleNamespace(
        req_id=req_id, sampling_params=SimpleNamespace(extra_args=extra_args or None)
    )


def step(*new, finished=()):
    return SimpleNamespace(scheduled_new_reqs=new, finished_req_ids=set(finished))


def test_rows_of_the_v1_runner_follow_its_order():
    limits = RequestLimits()
    limits.note_v1(step(request("a", ffa_delta=6), request("b")), ["b", "a"])
    assert limits.of_batch(None) == [None, 6.0]
    limits.note_v1(step(request("c", ffa_delta=2.5, other=1)), ["a", "b", "c"])
    assert limits.of_batch(None) == limits.of_batch(None) == [6.0, None, 2.5]
    # an identifier that is used again is another request's
    limits.note_v1(step(request("a"), finished=["a", "c"]), ["b", "a"])
    assert limits.of_batch(None) == []


def test_rows_of_the_v2_runner_follow_its_slots():
    limits, slots = RequestLimits(), {"a": 3, "b": 0, "c": 3}
    limits.note_v2(step(request("a", ffa_tau=0.5), request("b")), slots)
    assert limits.of_batch(np.array([0, 3])) == [None, 0.5]
    assert limits.of_batch(np.array([3, 0])) == [0.5, None]
    assert limits.of_batch(None) == [0.5, None]  # a draft's batch
    limits.note_v2(step(request("c"), finished=["a"]), slots)
    assert limits.of_batch(np.array([3, 0])) == limits.of_batch(None) == []


def test_a_pooling_request_asks_for_nothing():
    limits = RequestLimits()
    limits.note_v1(step(SimpleNamespace(req_id="a", sampling_params=None)), ["a"])
    assert limits.of_batch(None) == []


def test_rows_keep_their_place_in_memory():
    rows = LimitRows(10.0, 4, torch.device("cpu"))
    place = rows.tensor.data_ptr()
    assert rows.update([None, 6.0, math.inf]).tolist() == [10.0, 6.0, math.inf, 10.0]
    rows.tensor.fill_(7.0)
    assert rows.update([None, 6.0, math.inf]).tolist() == [7.0] * 4  # nothing was asked anew
    assert rows.update([2.0]).tolist() == [2.0, 10.0, 10.0, 10.0]
    assert rows.update([]).tolist() == [10.0] * 4
    assert rows.tensor.data_ptr() == place and rows.tensor.dtype == torch.float32
