"""Builder, cache and kernels in random steps, by threshold."""

import math

import pytest
from hypothesis import strategies as st
from traces import CASES, fuzz

DELTAS = st.one_of(st.just(math.inf), st.floats(0.0625, 6.0, width=32))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_request_of_every_step_is_right():
    fuzz(st.builds(lambda delta: {"delta": delta}, DELTAS), CASES // 2)
