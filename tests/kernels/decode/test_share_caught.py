"""What could go wrong with a draw by share does not pass for what the kernel does."""

import pytest
import torch
from cases import Case, make_batch
from share_cases import (
    TOLERANCE,
    choice_of,
    error_of,
    expected_of,
    run_share,
    share_limits,
    sums_of_programs,
)

from vllm_ffa_fp8fp8.kernels import share_reference

TAU, LAYER = 0.05, 3
CASE = Case((1030,), group=3, num_kv_heads=2, block_size=16, dtype=torch.float16)


@pytest.fixture(scope="module")
def ran(device):
    batch = make_batch(CASE)
    run = run_share(batch, device, share_limits(CASE), TAU, layer=LAYER)
    assert run.dealt[0]["num_items"] > 1 and (run.counters[:, 3] > 4).all()
    expected, _ = expected_of(batch, TAU, run.dealt, layer=LAYER)
    assert error_of(run.output, expected) < TOLERANCE[CASE.dtype]
    return batch, run


offset_of, draw = share_reference.draw_offset_reference, share_reference.draw_reference
WRONG_OFFSETS = {
    "layer": lambda layer, head, position, span: offset_of(layer + 1, head, position, span),
    "KV head": lambda layer, head, position, span: offset_of(layer, 1 - head, position, span),
    "position": lambda layer, head, position, span: offset_of(layer, head, position + 1, span),
    "program": lambda layer, head, position, span: offset_of(layer, head, position, span + 1),
    "nothing": lambda layer, head, position, span: 0,
}
WRONG_DRAWS = {
    "weights left out": lambda *arguments: draw(*arguments).clamp(max=0),
    "weights upside down": lambda *arguments: draw(*arguments).where(
        draw(*arguments) <= 0, -draw(*arguments)
    ),
    "the block beside": lambda *arguments: draw(*arguments).roll(1, -1),
    "no block that is drawn": lambda *arguments: draw(*arguments).where(
        draw(*arguments) <= 0, -torch.inf
    ),
}


def is_caught(ran, **options) -> bool:
    batch, run = ran
    wrong, _ = expected_of(batch, TAU, **{"run_dealt": run.dealt, "layer": LAYER} | options)
    return error_of(run.output, wrong) > 2 * TOLERANCE[CASE.dtype]


@pytest.mark.parametrize("name", WRONG_OFFSETS)
def test_a_draw_by_something_else(ran, monkeypatch, name):
    monkeypatch.setattr(share_reference, "draw_offset_reference", WRONG_OFFSETS[name])
    assert is_caught(ran)


@pytest.mark.parametrize("name", WRONG_DRAWS)
def test_a_wrong_block_or_weight(ran, monkeypatch, name):
    monkeypatch.setattr(share_reference, "draw_reference", WRONG_DRAWS[name])
    assert is_caught(ran)


def test_another_partition(ran):
    dealt = ran[1].dealt[0]
    assert is_caught(ran, run_dealt=[dealt | {"num_items": 1}])
    assert is_caught(ran, run_dealt=[dealt | {"chunk_spans": 1}])
    assert is_caught(ran, run_dealt=[dealt | {"span": 16}])


def test_a_merge_that_forgets_weights(ran):
    """Each program is right by itself, and counts for as much as what it read."""
    batch, run = ran
    num_items = run.dealt[0]["num_items"]
    choice = choice_of(batch, TAU, run.dealt, layer=LAYER)
    numerators, denominators = sums_of_programs(batch, choice, num_items)
    merged = numerators.sum(0) / denominators.sum(0)[..., None]
    unweighted = choice._replace(weights=choice.weights.clamp(max=0))
    _, masses = sums_of_programs(batch, unweighted, num_items)
    partial = numerators / denominators[..., None]
    wrong = (partial * masses[..., None]).sum(0) / masses.sum(0)[..., None]
    output = run.output.view(merged.shape)
    assert error_of(output, merged) < TOLERANCE[CASE.dtype]
    assert error_of(output, wrong) > 2 * TOLERANCE[CASE.dtype]
