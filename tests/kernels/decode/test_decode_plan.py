"""The plan covers every block once and cuts a batch into items of about one size."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ffa_fp8fp8.kernels import DecodeLimits, DecodePlan, DecodeScratch

LIMITS = [
    DecodeLimits(40, 200_000, 32, 8, 128, 16, num_processors=132),
    DecodeLimits(40, 200_000, 4, 2, 64, 128, num_processors=2, query_len=4),
]
lengths = st.lists(
    st.one_of(st.just(0), st.integers(1, 300), st.integers(1, 200_000)), min_size=1, max_size=40
)


def plan_of(limits: DecodeLimits, lengths: list[int], device: str) -> DecodePlan:
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return DecodePlan.allocate(limits, torch.device(device)).update(seq_lens)


def items_of(plan: DecodePlan, num_reqs: int) -> list[list[tuple[int, ...]]]:
    """By request: index, number of items, length. The items of a request follow one another, and
    those without work come last."""
    rows = plan.work.tolist()
    order = [request if request >= 0 else num_reqs for request, *_ in rows]
    assert order == sorted(order)
    items = [[] for _ in range(num_reqs)]
    for request, *rest in rows:
        if request >= 0:
            items[request].append(tuple(rest))
    return items


def sizes_of(items: list[list[tuple[int, ...]]], block_size: int) -> list[tuple[int, int]]:
    """Of every item: its blocks, and the items of its request. Checks that they cover it."""
    sizes = []
    for own in items:
        length = own[0][2]
        count = -(-length // block_size)
        assert own == [(place, len(own), length) for place in range(len(own))]
        covered = [
            range(index * count // num_items, (index + 1) * count // num_items)
            for index, num_items, _ in own
        ]
        assert [block for run in covered for block in run] == list(range(count))
        sizes += [(len(run), len(own)) for run in covered]
    return sizes


@pytest.mark.parametrize("limits", LIMITS, ids=["gpu-like", "small"])
@settings(max_examples=40, deadline=None)
@given(lengths=lengths)
def test_every_block_is_covered_once(device, limits, lengths):
    plan = plan_of(limits, lengths, device)
    assert plan.num_items == len(plan.work) == limits.num_items(len(lengths))
    items = items_of(plan, len(lengths))
    assert [own[0][2] for own in items] == lengths  # padding rows have an item, too
    assert max(map(len, items)) <= limits.max_request_items
    sizes = sizes_of(items, limits.block_size)
    largest = max(size for size, _ in sizes)
    for size, num_items in sizes:
        assert num_items == 1 or largest // 2 <= size > 0


@pytest.mark.parametrize(
    "num_reqs, length, rule",
    [
        (1, 8192, "threshold"),
        (1, 131_072, "threshold"),
        (8, 32_768, "threshold"),
        (32, 5000, "threshold"),
        (64, 1024, "threshold"),
    ],
)
def test_waves_are_full(device, num_reqs, length, rule):
    """Items are as many as run at a time, or a small multiple of it, less a few."""
    limits = dataclasses.replace(LIMITS[0], num_reqs=64, rule=rule, block_size=64)
    lengths = [length - 7 * request for request in range(num_reqs)]
    sizes = sizes_of(items_of(plan_of(limits, lengths, device), num_reqs), limits.block_size)
    slots = limits.slots(num_reqs)
    waves = -(-len(sizes) // slots)
    assert waves <= limits.tuning_of(num_reqs).waves + 1
    assert len(sizes) >= 0.8 * waves * slots


@pytest.mark.parametrize("rule, length, waves", [
    ("threshold", 32_768, 1), ("threshold", 131_072, 4), ("threshold", 65_536, 2),
    ("none", 8192, 1), ("none", 32_768, 4), ("none", 131_072, 4),
])  # fmt: skip
def test_long_batches_are_cut_for_more_than_one_wave(device, rule, length, waves):
    """Items of 8,192 tokens, without pruning of 2,048, at most four waves of them."""
    limits = dataclasses.replace(LIMITS[0], num_reqs=8, rule=rule, block_size=64)
    items = items_of(plan_of(limits, [length] * 8, device), 8)
    assert 0.8 * waves < 8 * len(items[0]) / limits.slots(8) <= waves


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(lengths=lengths)
def test_batch_invariant_plans(device, lengths):
    """Every request is cut as it is alone, and a batch of the longest requests fits."""
    limits = dataclasses.replace(LIMITS[0], batch_invariant=True)
    items = items_of(plan_of(limits, lengths, device), len(lengths))
    sizes_of(items, limits.block_size)
    for own, length in zip(items, lengths, strict=True):
        assert len(own) == min(max(1, -(-length // (64 * 16))), 32)
    assert limits.num_items(len(lengths)) == 32 * len(lengths)


def test_batch_invariant_limits_of_short_requests(device):
    limits = dataclasses.replace(LIMITS[1], batch_invariant=True, seq_len=20_000)
    assert limits.num_items(7) == 7 * 3
    items = items_of(plan_of(limits, [20_000] * 7, device), 7)
    assert [len(own) for own in items] == [3] * 7


def test_padded_rows_have_one_item_without_blocks(device):
    """Somebody has to clear their output."""
    items = items_of(plan_of(LIMITS[1], [0, 50_000, 0, 0], device), 4)
    assert items[0] == items[2] == items[3] == [(0, 1, 0)]
    assert len(items[1]) > 1
    assert items_of(plan_of(LIMITS[1], [0] * 4, device), 4) == [[(0, 1, 0)]] * 4


def test_a_smaller_batch_leaves_nothing_of_the_last(device):
    whole = DecodePlan.allocate(LIMITS[1], torch.device(device))
    whole.update(torch.full((40,), 200_000, dtype=torch.int32, device=device))
    plan = whole.update(torch.tensor([1, 1], dtype=torch.int32, device=device))
    assert [len(items) for items in items_of(plan, 2)] == [1, 1]
    assert plan.arrivals.shape == (40, 2) and not plan.arrivals.any()


def test_a_batch_beyond_the_limits(device):
    plan = DecodePlan.allocate(LIMITS[1], torch.device(device))
    with pytest.raises(AssertionError):
        plan.update(torch.ones(41, dtype=torch.int32, device=device))


def test_scratch_follows_its_shapes():
    scratch = DecodeScratch.allocate(LIMITS[1], torch.device("cpu"))
    found = [(tuple(tensor.shape), tensor.dtype) for tensor in scratch]
    assert found == list(LIMITS[1].scratch_shapes)
    rows = (LIMITS[1].num_items(40), 4 * 4)
    assert found[:2] == [((*rows, 64), torch.float32), (rows, torch.float32)]
    assert found[3] == ((40 * 4, 4), torch.float32)
