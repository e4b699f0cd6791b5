"""The plan covers every block once and cuts a batch into items of about one size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ffa_fp8fp8.kernels import DecodeLimits, DecodePlan, DecodeScratch

LIMITS = [
    DecodeLimits(40, 200_000, 32, 8, 128, 16, num_processors=132),
    DecodeLimits(40, 200_000, 4, 2, 64, 128, num_processors=2),
]
lengths = st.lists(
    st.one_of(st.just(0), st.integers(1, 300), st.integers(1, 200_000)), min_size=1, max_size=40
)


def items_of(plan: DecodePlan) -> list[list[tuple[int, ...]]]:
    """By request: index, number of items, number of blocks, blocks before, length."""
    num_reqs = len(plan.item_offsets) - 1
    items = [[] for _ in range(num_reqs)]
    for request, *rest in plan.work[:, :6].tolist():
        if request >= 0:
            items[request].append(tuple(rest))
    return items


@pytest.mark.parametrize("limits", LIMITS, ids=["gpu-like", "small"])
@settings(max_examples=40, deadline=None)
@given(lengths=lengths)
def test_every_block_is_covered_once(device, limits, lengths):
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    plan = DecodePlan.allocate(limits, torch.device(device)).update(seq_lens)
    assert plan.num_items == len(plan.work) == limits.num_items(len(lengths))
    items = items_of(plan)
    blocks = [-(-length // limits.block_size) for length in lengths]
    offset, sizes = 0, []
    for request, (own, count) in enumerate(zip(items, blocks, strict=True)):
        assert plan.item_offsets[request] == offset
        assert len(own) <= limits.max_request_items
        offset += len(own)
        covered = []
        for place, (index, num_items, num_blocks, before, length) in enumerate(own):
            assert (index, num_items, num_blocks) == (place, len(own), count)
            assert (before, length) == (sum(blocks[:request]), lengths[request])
            covered.append(range(index * count // num_items, (index + 1) * count // num_items))
        assert [block for run in covered for block in run] == list(range(count))
        sizes += [(len(run), len(own)) for run in covered]
    assert plan.item_offsets[-1] == offset <= plan.num_items
    assert_balanced(limits, sizes, sum(blocks))


def assert_balanced(limits: DecodeLimits, sizes: list[tuple[int, int]], total: int) -> None:
    """No item is empty, too large for one wave, or less than half the largest if cut."""
    largest = max((size for size, _ in sizes), default=0)
    assert largest <= max(limits.tuning.min_blocks, -(-total // limits.slots))
    for size, num_items in sizes:
        assert size > 0
        assert num_items == 1 or size >= largest // 2


def test_padded_rows_get_no_work(device):
    seq_lens = torch.tensor([0, 500, 0, 0], dtype=torch.int32, device=device)
    plan = DecodePlan.allocate(LIMITS[1], torch.device(device)).update(seq_lens)
    assert [len(items) > 0 for items in items_of(plan)] == [False, True, False, False]
    assert (plan.update(torch.zeros_like(seq_lens)).work[:, 0] == -1).all()


def test_a_smaller_batch_leaves_nothing_of_the_last(device):
    whole = DecodePlan.allocate(LIMITS[1], torch.device(device))
    whole.update(torch.full((40,), 200_000, dtype=torch.int32, device=device))
    plan = whole.update(torch.tensor([1, 1], dtype=torch.int32, device=device))
    assert [len(items) for items in items_of(plan)] == [1, 1]


def test_a_batch_beyond_the_limits(device):
    plan = DecodePlan.allocate(LIMITS[1], torch.device(device))
    with pytest.raises(AssertionError):
        plan.update(torch.ones(41, dtype=torch.int32, device=device))


def test_scratch_follows_its_shapes():
    scratch = DecodeScratch.allocate(LIMITS[1], torch.device("cpu"))
    found = [(tuple(tensor.shape), tensor.dtype) for tensor in vars(scratch).values()]
    assert found == list(LIMITS[1].scratch_shapes)
