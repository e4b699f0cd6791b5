"""Builder, cache and kernels in random steps, by share with a scan of 4-bit codes: whatever pages
requests share, drafts are refused, and others left behind, what is scanned stands for the keys."""

import pytest
from hypothesis import strategies as st
from test_fuzz_share import TAUS
from traces import CASES, fuzz


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_request_of_every_step_is_right():
    options = st.builds(lambda tau: {"rule": "share", "tau": tau, "scan": "int4"}, TAUS)
    counted = fuzz(options, CASES // 2)
    assert counted["coded"] > 10 * counted["cases"]
