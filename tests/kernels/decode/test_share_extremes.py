"""Rule "share" where exponentials overflow, vanish, or are no numbers."""

import math

import pytest
import torch
from cases import Case, make_batch
from share_cases import TOLERANCE, error_of, expected_of, planted, run_share, share_limits

from vllm_ffa_fp8fp8.kernels.share_reference import CHANCES, draw_offset_reference

HALF, BFLOAT = torch.float16, torch.bfloat16
LENGTH = 600
WIDE = {"fp8_key": False, "residual": False}


def of(dtype, **shape) -> Case:
    return Case((LENGTH,), **{"group": 2, "num_kv_heads": 1, "dtype": dtype} | shape)


def check(batch, device: str, tau: float, chunk_blocks=None, **options):
    """The run, whose output, and counts of blocks read and drawn, are the oracle's."""
    limits = share_limits(batch.case, chunk_blocks)
    run = run_share(batch, device, limits, tau, **options)
    counters = torch.zeros_like(run.counters)
    expected, _ = expected_of(batch, tau, run.dealt, counters=counters, **options)
    assert run.counters[:, :4].equal(counters[:, :4])
    assert error_of(run.output, expected) < TOLERANCE[batch.case.dtype]
    return run


@pytest.mark.parametrize(
    "dtype, hot, chunk_blocks",
    [
        (BFLOAT, {300: 90.0}, None),
        (BFLOAT, {300: 140.0}, None),
        (HALF, {300: 500.0}, None),
        (BFLOAT, {100: 110.0, 300: 300.0, 325: 302.0, 590: 7.0}, 1),
        (BFLOAT, {5: 400.0, 63: 900.0, 320: 890.0}, 2),  # of the first block, and no anchor
    ],
)
def test_scores_far_above_the_anchors(device, dtype, hot, chunk_blocks):
    """Where they stand is read for sure, and is all that the output is."""
    batch = planted(of(dtype, block_size=16 if chunk_blocks else 64), hot)
    run = check(batch, device, 0.2, chunk_blocks)
    best = max(hot, key=hot.get)
    near = [p for p in hot if hot[p] > hot[best] - 20]
    lightest = batch.value[near].double().amin(0) - 0.02
    heaviest = batch.value[near].double().amax(0) + 0.02
    assert ((run.output >= lightest) & (run.output <= heaviest)).all()
    assert (run.counters[:, 0] < run.counters[:, 1]).all()


@pytest.mark.parametrize("key", [math.nan, math.inf])
def test_what_is_no_number_is_read(device, key):
    """As attention to everything does, and other KV heads do not mind."""
    batch = make_batch(of(BFLOAT, num_kv_heads=2, **WIDE))
    batch.qkv.abs_()
    batch.key[300, 1] = key
    batch.write()
    run = run_share(batch, device, share_limits(batch.case), 0.2)
    expected, kept = expected_of(batch, 0.2, run.dealt)
    assert kept[0][1, 300 // 64] and run.output[:, 2:].isnan().all()
    assert error_of(run.output[:, :2], expected[:, :2]) < TOLERANCE[BFLOAT]


def test_blocks_that_weigh_nothing(device):
    """Sums that vanish beside a sink, and keys of -inf: read once in 2^20 draws."""
    batch = planted(of(BFLOAT, **WIDE), {0: 300.0})
    batch.key[200:400] = -math.inf
    batch.write()
    run = check(batch, device, 0.2)
    assert run.counters[0, :2].tolist() == [2, -(-LENGTH // 64)]
    assert (run.output - batch.value[0]).abs().max() < 0.02


def layer_that_draws(dealt: dict[str, int], position: int, num_drawn: int) -> int:
    """A layer whose hash takes one of the last `num_drawn` chances of a program's draw."""
    for layer in range(1 << 20):
        for item in range(dealt["num_items"]):
            if draw_offset_reference(layer, 0, position, item) >= CHANCES - num_drawn:
                return layer
    raise AssertionError("no hash is that large")


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_the_largest_weight(device, dtype):
    """A block that is read once in 2^20 draws, when it is."""
    batch = planted(of(dtype, block_size=16), {0: 27.0})
    limits = share_limits(batch.case)
    dealt = run_share(batch, device, limits, 0.2).dealt[0]
    layer = layer_that_draws(dealt, LENGTH - 1, num_drawn=4)
    run = check(batch, device, 0.2, layer=layer)
    assert run.counters[0, 3] == 1
    of_sink = run.output.double() - batch.value[0].double()
    assert of_sink.norm() > 0.05 * batch.value[0].double().norm()
