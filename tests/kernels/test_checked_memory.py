"""The check of the kernels' addresses finds what it is for."""

import pytest
import torch
import triton
import triton.language as tl

from vllm_ffa_fp8fp8.kernels.runtime import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter's memory is checked")


@triton.jit
def _copy(target_ptr, source_ptr, counter_ptr, begin, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    places = begin + tl.arange(0, BLOCK)
    inside = (places >= 0) & (places < 8) if MASKED else places > -100
    tl.store(target_ptr + tl.arange(0, BLOCK), tl.load(source_ptr + places, mask=inside, other=0))
    tl.atomic_add(counter_ptr, 1)


def run(source, begin=0, masked=False, target=8, counter=1):
    size = torch.zeros(target, dtype=torch.int32)
    _copy[(1,)](size, source, torch.zeros(counter, dtype=torch.int32)[:1], begin, 8, masked)


@pytest.mark.parametrize("begin", [-1, 1, 1 << 20])
def test_reads_outside_are_found(begin):
    source = torch.ones(8, dtype=torch.int32)
    with pytest.raises(Exception, match="read of . elements outside"):
        run(source, begin)
    run(source, begin, masked=True)


@triton.jit
def _read(target_ptr, source, begin):
    tl.store(target_ptr, tl.load(source[0] + begin))


def test_tensors_in_tuples_are_checked():
    source, target = torch.ones(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _read[(1,)](target, (source, None), 7)
    assert target == 1
    with pytest.raises(Exception, match="read of 1 elements outside"):
        _read[(1,)](target, (source, None), 8)


def test_writes_outside_are_found():
    with pytest.raises(Exception, match="write of 1 elements outside"):
        run(torch.ones(8, dtype=torch.int32), target=7)


def test_views_may_reach_through_their_storage():
    run(torch.ones(16, dtype=torch.int32)[4:12], begin=4)


def test_accesses_are_counted(checked_memory):
    before = checked_memory.checked
    run(torch.ones(8, dtype=torch.int32))
    assert checked_memory.checked == before + 8 + 8 + 1
