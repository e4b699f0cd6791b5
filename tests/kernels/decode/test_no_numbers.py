"""What is no number in one request's keys or queries reaches no other request, nor the counters."""

import math

import pytest
import torch
from cases import Batch, Case, make_batch, own_layer, run_decode
from share_cases import run_share, share_limits

from vllm_ffa_fp8fp8.kernels import write_kv
from vllm_ffa_fp8fp8.kernels.counters import SHARE_UNITS, new_counters

BAD = 1
"""The request that has them."""
FORMATS = [
    {},
    {"residual": False, "fp8_value": True},
    {"fp8_key": False, "residual": False},
]
DELTA, TAU = 3.0, 0.05


def batch_with(device: str, where: str | None, number: float, **shape) -> Batch:
    """Requests whose pages lie among one another, and bad numbers in some of one's rows."""
    case = Case((70, 90, 1, 50), 64, 2, 2, page_size=16, block_size=16, **shape)
    batch = make_batch(case)
    first, length = sum(case.lengths[:BAD]), case.lengths[BAD]
    if where == "key":
        batch.key[first + 3 : first + length : 17, 0] = number
    elif where == "query":
        batch.query()[BAD, 1] = number
    storage = batch.storage.to(device)
    planes = case.layout.split(own_layer(storage, case.interleaved))
    write_kv(batch.key.to(device), batch.value.to(device), planes, batch.slots().to(device))
    batch.storage.copy_(storage)
    return batch


def decode(batch: Batch, device: str, rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    counters = new_counters(batch.case.num_kv_heads, device)
    if rule == "share":
        run = run_share(batch, device, share_limits(batch.case), TAU)
        return run.output, run.counters
    output, _ = run_decode(batch, device, torch.tensor([DELTA]), counters=counters)
    return output, counters.cpu()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["threshold", "share"])
@pytest.mark.parametrize("shape", FORMATS, ids=str)
def test_others_keep_their_bits(device, rule, shape):
    clean, _ = decode(batch_with(device, None, 0.0, **shape), device, rule)
    others = [request for request in range(4) if request != BAD]
    assert clean.isfinite().all()
    for where, number in [("key", math.nan), ("key", -math.inf), ("query", math.nan)]:
        output, counters = decode(batch_with(device, where, number, **shape), device, rule)
        assert output[others].equal(clean[others]), (where, number)
        if where == "query":
            assert not output[BAD, 1].isfinite().all()
        kept, total, _, drawn, left, most, tokens = counters.unbind(1)
        assert ((0 < kept) & (kept <= total)).all() and (drawn <= kept).all()
        assert ((left >= 0) & (left <= tokens * SHARE_UNITS)).all(), (where, number, left)
        assert ((most >= 0) & (most <= SHARE_UNITS)).all()
