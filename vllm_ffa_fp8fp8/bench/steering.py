"""Finds the delta at which a wanted fraction of the blocks is skipped.

Dummy weights give scores of any size, all alike, so that a usual delta skips nothing: the search
knows no scale, and delta may come out negative.
"""

import math
from collections.abc import Callable

SMALLEST, LARGEST = -100.0, 12.0
"""Exponents between which the magnitude of delta is searched, base 2."""


def steer(
    measure: Callable[[float], float],
    target: float,
    tolerance: float = 0.01,
    most_probes: int = 16,
) -> tuple[float, float]:
    """Bisects the magnitude of delta; `measure` gives the skip ratio at a delta, and falls with it.

    Returns the delta that came closest and its skip ratio.
    """
    best = (0.0, measure(0.0))
    sign = 1.0 if best[1] > target else -1.0
    low, high = SMALLEST, LARGEST
    for _ in range(most_probes):
        if abs(best[1] - target) <= tolerance:
            break
        middle = (low + high) / 2
        delta = math.copysign(2.0**middle, sign)
        skipped = measure(delta)
        best = min(best, (delta, skipped), key=lambda probe: abs(probe[1] - target))
        # away from zero, a positive delta skips less and a negative one more
        if (skipped > target) == (sign > 0):
            low = middle
        else:
            high = middle
    return best
