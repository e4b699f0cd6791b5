"""Projection, norm, rotation and cache write in one kernel, against float64 and byte for byte."""

from dataclasses import replace

import pytest
import torch
from cases import POISON, empty_cache, own_layer
from qkv_cases import NUM_PAGES, SHAPES, QKVCase, check_cache, check_rotation

from vllm_ffa_fp8fp8.kernels.projection.project_write import (
    ProjectionScratch,
    project_rope_and_write,
)
from vllm_ffa_fp8fp8.kernels.projection.reference import (
    project_rope_and_write_reference,
    rope_and_write_reference,
)
from vllm_ffa_fp8fp8.kernels.projection.tuning import ProjectionTuning, projection_tuning

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TUNING = ProjectionTuning(splits=2, hidden_block=64, finish_rows=16)


def inputs(case: QKVCase, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Hidden states (every other row of a wider tensor), weight and bias."""
    hidden = case.normal(2 * case.num_tokens, case.hidden_size).to(device, case.dtype)[::2]
    weight = case.normal(case.width, case.hidden_size, seed=3) * case.hidden_size**-0.5
    bias = case.normal(case.width, seed=4).to(device, case.dtype) if case.bias else None
    return hidden, weight.to(device, case.dtype), bias


def exact(case: QKVCase, device: str) -> torch.Tensor:
    hidden, weight, bias = (x if x is None else x.cpu().double() for x in inputs(case, device))
    return torch.nn.functional.linear(hidden, weight, bias)


def poisoned_scratch(case: QKVCase, device: str, tuning) -> ProjectionScratch:
    scratch = ProjectionScratch.allocate(case.num_tokens, case.heads(device), tuning)
    scratch.sums.fill_(torch.nan)
    return scratch


def run(case: QKVCase, device: str, tuning=TUNING, scratch=None) -> tuple[torch.Tensor, ...]:
    """Output and cache. Without a scratch, one of NaN is used; its counters end at zero."""
    scratch = scratch or poisoned_scratch(case, device, tuning)
    output = torch.full((case.num_tokens, case.width), torch.nan, dtype=case.dtype, device=device)
    storage = empty_cache(case, NUM_PAGES).to(device)
    planes = case.layout.split(own_layer(storage, case.interleaved))
    slots, positions = case.slots().to(device), case.positions().to(device)
    project_rope_and_write(
        *inputs(case, device), positions, case.heads(device), planes, slots, output, scratch, tuning
    )
    assert not scratch.arrived.any()
    return output.cpu(), storage.cpu()


def check(case: QKVCase, device: str, output: torch.Tensor, storage: torch.Tensor) -> None:
    """Within the rounding of the projection, and nearly everywhere the very numbers that come of
    the exact projection rounded: sums in float32 can end on the other side of a tie."""
    projected, rounding = exact(case, device), ROUNDING[case.dtype]
    check_rotation(case, projected, output, 1.5 * rounding)
    value = output[:, -case.num_kv_heads * case.head_size :]
    expected = projected[:, -value.shape[1] :]
    assert ((value - expected).abs() <= 1.01 * rounding * expected.abs() + 1e-5).all()
    check_cache(case, storage, output, value)
    rounded = projected.to(case.dtype)
    rope_and_write_reference(rounded, case.positions(), case.heads("cpu"), None, None, rounded)
    assert (rounded == output).double().mean() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(device, shape):
    check(SHAPES[shape], device, *run(SHAPES[shape], device))


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 11, 16])
def test_groups(device, group):
    case = QKVCase(group=group, num_kv_heads=1, num_tokens=2, hidden_size=128, page_size=16)
    check(case, device, *run(case, device))


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 33, 64, 127])
def test_batches(device, num_tokens):
    case = QKVCase(num_tokens=num_tokens, group=2, num_kv_heads=1, hidden_size=128)
    tuning = projection_tuning(4, case.hidden_size, num_processors=3)
    assert tuning.splits == 2
    check(case, device, *run(case, device, tuning))


@pytest.mark.slow
@pytest.mark.parametrize("hidden_size", [64, 80, 200, 320])
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_splits_of_any_hidden_size(device, hidden_size, splits):
    """Also more splits than blocks, and a block that is cut off."""
    case = QKVCase(hidden_size=hidden_size, group=1, num_kv_heads=1, num_tokens=3, norm=True)
    tuning = ProjectionTuning(splits, hidden_block=32, stages=2, finish_rows=2)
    check(case, device, *run(case, device, tuning))


@pytest.mark.slow
def test_again_gives_the_same_bits(device):
    """With the scratch of the launch before, and of a larger batch."""
    case = QKVCase(num_tokens=5, norm=True, bias=True)
    scratch = poisoned_scratch(replace(case, num_tokens=9), device, TUNING)
    expected, storage = run(case, device)
    for _ in range(3 if device == "cpu" else 50):
        output, storage_again = run(case, device, scratch=scratch)
        assert torch.equal(output, expected) and torch.equal(storage, storage_again)


def test_without_a_cache(device):
    case = SHAPES["qwen3"]
    storage = empty_cache(case, NUM_PAGES).to(device)
    planes = case.layout.split(own_layer(storage, case.interleaved))
    padding = torch.full((case.num_tokens,), -1, device=device)
    for slots in (None, padding):
        output = torch.full((case.num_tokens, case.width), torch.nan, dtype=case.dtype)
        output = output.to(device)
        project_rope_and_write(
            *inputs(case, device), case.positions().to(device), case.heads(device),
            planes if slots is not None else None, slots, output,
            poisoned_scratch(case, device, TUNING), TUNING,
        )  # fmt: skip
        check_rotation(case, exact(case, device), output.cpu(), 1.5 * ROUNDING[case.dtype])
    assert (storage == POISON).all()


def test_reference_rounds_the_projection_first(device):
    """The CPU path: what a linear layer and the rotation give."""
    case = SHAPES["qwen2"]
    output = torch.empty(case.num_tokens, case.width, dtype=case.dtype)
    storage = empty_cache(case, NUM_PAGES)
    planes = case.layout.split(own_layer(storage, case.interleaved))
    project_rope_and_write_reference(
        *inputs(case, "cpu"), case.positions(), case.heads("cpu"), planes, case.slots(), output
    )
    linear = torch.nn.functional.linear(*inputs(case, "cpu"))
    check_rotation(case, linear, output, 2e-6)
    value = linear[:, -case.num_kv_heads * case.head_size :]
    check_cache(case, storage, output, value)


def test_the_check_rejects_wrong_projections(device):
    """No bias, a part of the hidden size left out, a stale sum."""
    case = SHAPES["qwen2"]
    output, storage = run(case, device)
    no_bias, _ = run(replace(case, bias=False), device)
    for wrong in (no_bias, output.roll(1, 0), output.roll(1, 1)):
        with pytest.raises(AssertionError):
            check(case, device, wrong, storage)
