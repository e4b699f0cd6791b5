"""Builder, cache and kernels in random steps, by share."""

import pytest
from hypothesis import strategies as st
from traces import CASES, fuzz

TAUS = st.floats(0.0078125, 0.5, width=32)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_request_of_every_step_is_right():
    fuzz(st.builds(lambda tau: {"rule": "share", "tau": tau}, TAUS), CASES // 2)
