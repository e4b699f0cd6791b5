"""Requests for which fewer tokens were drafted than for others of their step decode with them."""

from pathlib import Path

import processes
import pytest
from agreement import check_same_tokens
from float32 import check_as_exact
from jobs import CONTINUE, DRAFTS, GPU, NUM_DRAFTS, SMALL_STEPS, mixed_batches, mixed_batches_gpu
from processes import Run, run_ours
from vllm.platforms import current_platform


def run_recorded(monkeypatch, batches, **llm) -> Run:
    runner = Path(__file__).with_name("recording_runner.py")
    monkeypatch.setattr(processes, "RUNNER", runner)
    return run_ours(batches, CONTINUE, {"preset": "exact"}, **llm, **DRAFTS)


def check_steps(run: Run) -> None:
    """No request is too short for decode and yet a prefill, once it is past its prompt."""
    most = 1 + NUM_DRAFTS
    steps = run.facts["steps"]
    assert max(max(decodes) for decodes, _ in steps) == most
    assert all(query_len > most for _, prefills in steps for query_len in prefills)
    uneven = [decodes for decodes, _ in steps if len({*decodes} - {0}) > 1]
    assert len(uneven) > 5, steps


@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_uneven_drafts_are_decoded(monkeypatch, exact_run):
    run = run_recorded(monkeypatch, mixed_batches(), **SMALL_STEPS)
    assert run.facts["accepted_tokens"] > 0
    check_steps(run)
    check_as_exact(run, exact_run, mixed_batches())


@pytest.mark.gpu
def test_uneven_drafts_are_decoded_on_a_gpu(monkeypatch):
    batches = mixed_batches_gpu()
    run = run_recorded(monkeypatch, batches, **GPU)
    assert run.facts["accepted_tokens"] > 0
    check_steps(run)
    check_same_tokens(run, run_ours(batches, CONTINUE, {"preset": "exact"}, **GPU))
