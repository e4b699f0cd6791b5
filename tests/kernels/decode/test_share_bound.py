"""The draw of rule "share", over all offsets that a hash can give: without bias, and how far off.

A chunk's blocks lie one after another on a line, each as long as its probability, and every point
`offset + k` of it reads the block that it hits. With `x_b = I_b / p_b`, the sum of x_b w_b d_b
that stands for the sum of w_b d_b, |d_b| <= D, is a sum of N = floor(m) or ceil(m) terms of at
most tau D each, m = sum p_b <= M / tau (up to rounding up). So its variance is at most
tau^2 D^2 E[N^2] <= tau^2 D^2 m ceil(m): `ceil(m)` times `tau M D^2`, what a draw a block has.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ffa_fp8fp8.kernels.share_reference import (
    CHANCES,
    draw_offset_reference,
    draw_reference,
)

shares_below = st.one_of(  # of tau
    st.floats(0.0, 0.999, allow_subnormal=False), st.integers(0, 29).map(lambda n: 2.0 ** -(n + 1))
)
signs = st.floats(-1.0, 1.0)


def all_draws(shares: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What each block counts, `[draws, num_blocks]`, and how likely each of these draws is: blocks
    enter and leave the draw at as many offsets as there are ends of blocks."""
    chances = (shares.double() / tau * CHANCES).ceil().clamp(min=1).long()
    chances = torch.where(shares < tau, chances, 0)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), chances.cumsum(0)])
    changes = torch.cat([-ends % CHANCES, torch.tensor([0, CHANCES])]).unique()
    lengths = changes.diff()
    counts = [draw_reference(shares, tau, int(begin)).exp2() for begin in changes[:-1]]
    return torch.stack(counts), lengths.double() / CHANCES


def mean_and_variance(sums: torch.Tensor, likely: torch.Tensor) -> tuple[float, float]:
    mean = likely @ sums
    return float(mean), float(likely @ (sums - mean) ** 2)


def num_draws(shares: torch.Tensor, tau: float) -> float:
    """The sum of the probabilities of blocks that are drawn."""
    small = shares[shares < tau]
    return float((small / tau * CHANCES).ceil().clamp(min=1).sum() / CHANCES)


@settings(max_examples=60, deadline=None)
@given(st.lists(shares_below, min_size=1, max_size=24), st.sampled_from([1.0, 0.03, 2.0**-8]))
def test_every_block_counts_once_on_average(parts, tau):
    shares = torch.tensor(parts, dtype=torch.float64) * tau
    counts, likely = all_draws(shares, tau)
    assert torch.allclose(likely @ counts, torch.ones(len(parts), dtype=torch.float64), rtol=1e-12)
    read = counts[counts > 0]
    assert read.min() >= 1 and read.max() <= CHANCES
    assert (counts * shares).max() <= tau * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 24), st.sampled_from([1.0, 0.03]))
def test_the_variance_is_below_the_bound(data, num_blocks, tau):
    """Whatever shares, order, and values, whose D is 1."""
    parts = data.draw(st.lists(shares_below, min_size=num_blocks, max_size=num_blocks))
    values = data.draw(st.lists(signs, min_size=num_blocks, max_size=num_blocks))
    shares = torch.tensor(parts, dtype=torch.float64) * tau
    parts_of_sum = shares * torch.tensor(values, dtype=torch.float64)
    counts, likely = all_draws(shares, tau)
    mean, variance = mean_and_variance(counts @ parts_of_sum, likely)
    assert math.isclose(mean, float(parts_of_sum.sum()), rel_tol=1e-9, abs_tol=1e-12)
    m = num_draws(shares, tau)
    assert variance <= tau**2 * m * math.ceil(m) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, CHANCES - 1), min_size=1, max_size=24))
def test_the_denominator_is_off_by_half_a_draw_at_most(chances):
    """Where probabilities are the row's own shares: a chunk draws its mass up to rounding."""
    tau = 2.0**-5
    shares = torch.tensor(chances, dtype=torch.float64) * (tau / CHANCES)
    counts, likely = all_draws(shares, tau)
    _, variance = mean_and_variance(counts @ shares, likely)
    part = sum(chances) / CHANCES % 1
    assert math.isclose(variance, tau**2 * part * (1 - part), rel_tol=1e-6, abs_tol=1e-15)
    assert variance <= min(tau**2 / 4, tau * float(shares.sum()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, CHANCES // 24), min_size=2, max_size=24), st.data())
def test_blocks_that_share_one_draw_exclude_each_other(chances, data):
    """Up to one block a chunk in expectation the bound is that of a draw a block, or less."""
    tau = 0.03
    shares = torch.tensor(chances, dtype=torch.float64) * (tau / CHANCES)
    counts, likely = all_draws(shares, tau)
    assert ((counts > 0).sum(1) <= 1).all()
    values = data.draw(st.lists(signs, min_size=len(chances), max_size=len(chances)))
    parts_of_sum = shares * torch.tensor(values, dtype=torch.float64)
    _, variance = mean_and_variance(counts @ parts_of_sum, likely)
    assert variance <= tau * float(shares.sum()) * (1 + 1e-9)


@pytest.mark.parametrize("m", [1, 4, 16])
def test_an_order_in_step_with_the_draw_reaches_the_bound(m):
    """Two blocks a draw, of opposite values: every draw reads all of one kind. With a draw a block
    the variance is half of `tau M D^2`; so the factor `ceil(m)` cannot go."""
    tau = 2.0**-5
    shares = torch.full((2 * m,), tau / 2, dtype=torch.float64)
    values = torch.tensor([1.0, -1.0] * m, dtype=torch.float64)
    counts, likely = all_draws(shares, tau)
    _, variance = mean_and_variance(counts @ (shares * values), likely)
    mass = float(shares.sum())
    assert math.isclose(variance, m * tau * mass, rel_tol=1e-9)
    in_groups = values.sort().values
    _, variance = mean_and_variance(counts @ (shares * in_groups), likely)
    assert variance <= tau * mass


@settings(max_examples=40, deadline=None)
@given(st.lists(shares_below, min_size=1, max_size=12), st.integers(0, CHANCES - 1), st.data())
def test_what_is_read_for_sure_takes_no_part(parts, offset, data):
    """Shares from tau on and those that are no numbers, wherever they stand among the others."""
    tau = 0.25
    shares = torch.tensor(parts, dtype=torch.float64) * tau
    sure = data.draw(st.lists(st.sampled_from([tau, 1.0, math.inf, math.nan]), min_size=1))
    places = [data.draw(st.integers(0, len(shares))) for _ in sure]
    mixed, expected = shares.tolist(), draw_reference(shares, tau, offset).tolist()
    for place, share in zip(places, sure, strict=True):
        mixed.insert(place, share)
        expected.insert(place, 0.0)
    among_others = torch.tensor(mixed, dtype=torch.float64)
    assert draw_reference(among_others, tau, offset).tolist() == expected
    assert (draw_reference(among_others, 0.0, offset) == 0).all()


NAMES = ("layer", "kv_head", "position", "first_span")


def offsets_of(**ranges: range) -> torch.Tensor:
    first = {name: range(3, 4) for name in NAMES} | ranges
    return torch.tensor(
        [
            draw_offset_reference(*key)
            for key in torch.cartesian_prod(*(torch.tensor(first[n]) for n in NAMES)).tolist()
        ]
    )


@pytest.mark.parametrize("name", NAMES)
def test_offsets_are_even_and_independent(name):
    """Of 4,096 neighbours: chi-squared of 16 x 16 cells of one and the next, within four standard
    deviations."""
    offsets = offsets_of(**{name: range(4096)})
    assert len(offsets.unique()) > 4000
    cells = offsets[:-1] * 16 // CHANCES * 16 + offsets[1:] * 16 // CHANCES
    expected = len(cells) / 256
    spread = ((torch.bincount(cells, minlength=256) - expected) ** 2 / expected).sum()
    assert abs(spread - 255) < 4 * math.sqrt(2 * 255)


def test_no_two_arguments_stand_for_each_other():
    """Layer 1 of KV head 2 is not layer 2 of KV head 1, and so on."""
    offsets = offsets_of(layer=range(6), kv_head=range(6), position=range(6), first_span=range(6))
    assert len(offsets.unique()) >= 6**4 - 5  # of 2^20: about one pair is equal by chance
