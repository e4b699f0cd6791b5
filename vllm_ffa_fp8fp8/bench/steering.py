"""Finds the threshold at which a wanted fraction of the blocks is kept.

Dummy weights give scores of any size, all alike: no `delta` that the option takes, which lie at 0
and above, skips anything. So the threshold is moved in the running engine, above the best score of
the anchors (a request's first and last tokens) where need be, and the search knows no scale.
"""

import math
from collections.abc import Callable

SMALLEST, LARGEST = -100.0, 12.0
"""Exponents between which the distance from the anchors is searched, base 2."""


def steer(
    measure: Callable[[float], float],
    target: float,
    tolerance: float = 0.01,
    most_probes: int = 16,
) -> tuple[float, float]:
    """Bisects the threshold's distance from the anchors' best score.

    Args:
        measure: gives the kept fraction at a threshold, in log2 units over the anchors (below 0:
            under them), and falls with it.

    Returns the threshold that came closest and its kept fraction.
    """
    best = (0.0, measure(0.0))
    sign = 1.0 if best[1] > target else -1.0
    low, high = SMALLEST, LARGEST
    for _ in range(most_probes):
        if abs(best[1] - target) <= tolerance:
            break
        middle = (low + high) / 2
        threshold = math.copysign(2.0**middle, sign)
        kept = measure(threshold)
        best = min(best, (threshold, kept), key=lambda probe: abs(probe[1] - target))
        # away from zero, a threshold over the anchors keeps less and one under them more
        if (kept > target) == (sign > 0):
            low = middle
        else:
            high = middle
    return best
