"""A soft cap of scores: `cap * tanh(score / cap)`, which keeps their order."""

import triton
import triton.language as tl

from .query import LOG2_E

SLACK: tl.constexpr = tl.constexpr(2e-6)
"""What rounding of `cap_scores` may take from a score, and `uncapped` from a threshold, as a part
of the cap."""


@triton.jit
def cap_scores(scores, soft_cap):
    """`scores`, log2 units, under a soft cap, likewise; as they are where `soft_cap` is None.
    -inf, of a token that a row does not see, stays."""
    if soft_cap is not None:
        # tanh(x) = 1 - 2 / (1 + e^2x), for which no x is too large
        power = tl.exp2(scores * (1.0 / soft_cap) * (2.0 * LOG2_E))
        capped = soft_cap - 2.0 * soft_cap / (1.0 + power)
        scores = tl.where(scores == float("-inf"), scores, capped)
    return scores


@triton.jit
def uncapped(threshold, soft_cap):
    """What scores have to reach so that they reach `threshold` under the cap, no less than that up
    to SLACK: all do where it is the least that the cap leaves, and none where it is the most."""
    if soft_cap is not None:
        part = threshold / soft_cap - SLACK
        odds = tl.maximum(1.0 + part, 0.0) / tl.maximum(1.0 - part, 0.0)
        threshold = tl.log2(odds) * (0.5 / LOG2_E) * soft_cap
    return threshold
