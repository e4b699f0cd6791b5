"""Finds the delta or tau that reaches a wished KL divergence, or a wished fraction kept."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from vllm_ffa_fp8fp8.option_values import RULES

NEAR = 0.1
"""How far from the wish, relatively, is near enough."""
MOST_PROBES = 5
"""Between values that lie on both sides of the wish."""


@dataclass(frozen=True)
class Scale:
    """Where delta or tau is looked for, as the care that it takes: log2(1 / tau), or delta, which
    are both in log2 units. With care KL falls and kept rises, by about a factor a unit.

    Args:
        first: what is measured first.
        ends: the least care and the most, at which nearly everything is read.
        stride: outwards from `first`; it doubles.
    """

    rule: str
    first: tuple[float, ...]
    ends: tuple[float, float]
    stride: float

    @property
    def option(self) -> str:
        return RULES[self.rule]

    def limit(self, care: float) -> float:
        """The option's value, in as many digits as users write."""
        return float(f"{2.0**-care:.3g}") if self.rule == "share" else round(care, 2)

    def name(self, limit: float) -> str:
        return f"{self.option}={limit:g}"


SCALES = {
    "share": Scale("share", (3.0, 5.0, 7.0), (0.1, 16.0), 3.0),
    "threshold": Scale("threshold", (3.0, 6.0, 9.0), (0.0, 30.0), 6.0),
}


@dataclass(frozen=True)
class Wish:
    """`figure`: kl_mean, nats, or kept, a fraction."""

    figure: str
    value: float

    @property
    def name(self) -> str:
        return f"{'KL' if self.figure == 'kl_mean' else 'kept'} {self.value:g}"

    def is_reached(self, found: float) -> bool:
        return found <= self.value * (1 + NEAR)


def search(measure: Callable[[float], float], wish: Wish, scale: Scale) -> float:
    """The care at which the wished figure is nearest to the wish.

    Args:
        measure: the figure at a care.
    """
    found = {care: measure(care) for care in scale.first}

    def is_above(care: float) -> bool:
        return found[care] > wish.value

    stride = scale.stride
    while len({*map(is_above, found)}) == 1:  # all on one side of the wish
        is_careful = is_above(min(found)) == (wish.figure == "kl_mean")
        last, end = (max(found), scale.ends[1]) if is_careful else (min(found), scale.ends[0])
        if last == end:
            break
        is_far = abs(end - last) > stride
        care = last + math.copysign(stride, end - last) if is_far else end
        found[care], stride = measure(care), 2 * stride
    for _ in range(MOST_PROBES):
        cares = sorted(found)
        pairs = [
            (a, b) for a, b in zip(cares, cares[1:], strict=False) if is_above(a) != is_above(b)
        ]
        nearest = _nearest(found, wish)
        if not pairs or _apart(found[nearest], wish) <= math.log(1 + NEAR):
            break
        care = _between(*min(pairs, key=lambda pair: pair[1] - pair[0]), found, wish)
        if scale.limit(care) in map(scale.limit, found):
            break
        found[care] = measure(care)
    return _nearest(found, wish)


def _nearest(found: dict[float, float], wish: Wish) -> float:
    return min(found, key=lambda care: (_apart(found[care], wish), care))


def _apart(figure: float, wish: Wish) -> float:
    return abs(_log(figure) - math.log(wish.value))


def _log(figure: float) -> float:
    return math.log(max(figure, 1e-12))


def _between(low: float, high: float, found: dict[float, float], wish: Wish) -> float:
    """Where the line through both, figures as logarithms, meets the wish; not so near to one of
    them that the other would stay the bound for long."""
    rise = _log(found[high]) - _log(found[low])
    part = (math.log(wish.value) - _log(found[low])) / rise
    return low + (high - low) * min(max(part, 0.1), 0.9)
