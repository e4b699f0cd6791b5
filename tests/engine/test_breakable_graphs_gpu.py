"""Graphs that are cut by functions instead of by torch.compile, which vLLM takes for some models,
and for batch invariance."""

import pytest
from agreement import check_codes
from jobs import ANSWER, GPU
from processes import run_ours
from prompts import questions


@pytest.mark.gpu
def test_small_prefills_run_in_breakable_graphs():
    """One question after the other: all but its end is in the cache, and few tokens are left,
    which run in a graph."""
    asked = questions(2048, 4)
    batches = [[question.prompt] for question in asked]
    variables = {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}
    run = run_ours(batches, ANSWER, {"preset": "balanced"}, variables=variables, **GPU)
    assert run.facts["compilation_mode"] == "NONE"
    assert "PIECEWISE" in run.facts["captured_modes"] or "(PIECEWISE)" in run.log
    check_codes([answer for (answer,) in run.batches], asked)
    for (answer,) in run.batches[1:]:
        assert 0 < answer["num_prompt_tokens"] - answer["num_cached_tokens"] < 256
