"""A request's tokens are the same alone, beside a prefill, and beside drafts of others."""

import pytest
from agreement import check_same_answer
from jobs import CONTINUE, DRAFTS, GPU, NUM_DRAFTS, SMALL_STEPS
from processes import Run, run_ours
from prompts import source_prompt
from vllm.platforms import current_platform

ASKED = source_prompt(300)
LONG = source_prompt(1500, start=20_000)  # several steps' prefill
REPEATED = source_prompt(5, start=70) * 40  # whose drafts are right more often than not
BATCHES = [[ASKED], [ASKED, LONG], [ASKED, REPEATED, REPEATED[1:]]]


def check_beside_others(run: Run) -> None:
    assert run.facts["backends"] == ["FFA_FP8FP8"]
    assert any(decodes and prefills for decodes, prefills in run.decode_steps)
    assert any(max(decodes) == 1 + NUM_DRAFTS for decodes, _ in run.decode_steps)
    assert run.facts["accepted_tokens"] > 0
    (alone,), *together = run.batches
    for answer, *_ in together:
        check_same_answer(answer, alone)


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_on_cpu():
    options = {"preset": "exact"}
    run = run_ours(BATCHES, CONTINUE, options, enable_prefix_caching=False, **SMALL_STEPS, **DRAFTS)
    check_beside_others(run)
    assert any({1, 1 + NUM_DRAFTS} <= {*decodes} for decodes, _ in run.decode_steps)


@pytest.mark.gpu
def test_on_gpu():
    limits = GPU | {"max_num_batched_tokens": 512}
    run = run_ours(
        BATCHES, CONTINUE, {"preset": "exact"}, enable_prefix_caching=False, **limits, **DRAFTS
    )
    check_beside_others(run)
