"""The threshold's tokens, on planted keys whose kept blocks are known beforehand."""

import math

import pytest
import torch
from cases import Case, make_batch, probe_kept
from truth import reference

DELTA = 3.0
KEEP, SKIP = 9.0, 5.0  # scores beside an anchor of 10, log2 units


def planted(device: str, length: int, hot: dict[int, float], **shape) -> list[int]:
    """Blocks kept of one request whose token `position` scores `hot[position]`, others 0."""
    shape = {"group": 3, "num_kv_heads": 1, "page_size": 48, "block_size": 16} | shape
    case = Case((length,), **shape)
    batch = make_batch(case)
    batch.qkv[:] = 1.0
    batch.key[:] = 0.0
    for position, score in hot.items():
        batch.key[position] = score / (math.log2(math.e) * case.scale * case.head_size)
    batch.write()
    delta = torch.tensor([DELTA])
    kept = probe_kept(batch, device, delta)[0]
    assert torch.equal(kept, reference(batch, delta)[1][0])
    return kept[0].nonzero().flatten().tolist()


def test_hot_tokens_are_kept_and_the_rest_is_not(device):
    hot = {0: 10.0, 100: KEEP, 150: SKIP, 210: KEEP, 223: KEEP}
    assert planted(device, 300, hot) == [0, 6, 13, 18]


@pytest.mark.slow
@pytest.mark.parametrize("length", [49, 63, 111, 130, 145, 300])
@pytest.mark.parametrize("place", [1, 15, 16])
def test_an_anchor_among_the_last_tokens(device, length, place):
    """The tokens 16 from the end count wherever blocks and pages end."""
    anchor = length - place
    kept = planted(device, length, {anchor: 10.0, 5: SKIP, 20: KEEP})
    assert kept == sorted({1, anchor // 16, (length - 1) // 16})


@pytest.mark.parametrize("length", [49, 63, 111, 145, 300])
def test_older_tokens_are_no_anchors(device, length):
    """A score 17 tokens from the end does not raise the threshold: all scores pass -3."""
    assert planted(device, length, {length - 17: 10.0}) == list(range(-(-length // 16)))


@pytest.mark.parametrize("position, anchors", [(15, True), (16, False)])
def test_the_first_tokens(device, position, anchors):
    kept = planted(device, 200, {position: 10.0, 100: KEEP})
    assert kept == ([0, 6, 12] if anchors else list(range(13)))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 49])
def test_short_requests(device, length):
    """Up to 32 tokens every token is an anchor."""
    kept = planted(device, length, {0: 10.0})
    assert kept == sorted({0, (length - 1) // 16})


@pytest.mark.parametrize("page_size, block_size", [(16, 64), (48, 32), (128, 128)])
def test_large_blocks(device, page_size, block_size):
    hot = {0: 10.0, block_size: SKIP, 3 * block_size - 1: KEEP, 3 * block_size: SKIP}
    shape = {"page_size": page_size, "block_size": block_size}
    assert planted(device, 5 * block_size + 1, hot, **shape) == [0, 2, 5]


def test_one_head_of_the_group_is_enough(device):
    """A block stays when a single head needs it; other groups decide for themselves."""
    case = Case((300,), group=3, num_kv_heads=2, page_size=48, block_size=16)
    batch = make_batch(case)
    query = batch.query()
    query[:] = 0.0
    query[0, :, 0] = 1.0  # column 0: what all heads look for
    query[0, 1, 1] = 1.0  # column 1: what head 1 alone looks for
    unit = 1 / (math.log2(math.e) * case.scale)
    batch.key[:] = 0.0
    batch.key[0, :, 0] = 10 * unit
    batch.key[100, :, 1] = KEEP * unit
    batch.key[200, :, 2] = KEEP * unit
    batch.write()
    kept = probe_kept(batch, device, torch.tensor([DELTA]))[0]
    assert [head.nonzero().flatten().tolist() for head in kept] == [[0, 6, 18], [0, 18]]
