"""One engine for each way of running it, started when a test first asks for it."""

import pytest
from jobs import ANSWER, CONTINUE, CPU, RECALL_LENGTHS, SMALL_STEPS, mixed_batches, recall_batches
from processes import Run, run_engine, run_ours


@pytest.fixture(scope="session")
def default_run() -> Run:
    return run_engine(mixed_batches(), CONTINUE, **SMALL_STEPS)


@pytest.fixture(scope="session")
def run_without_plugin() -> Run:
    return run_engine(mixed_batches(), CONTINUE, {"VLLM_PLUGINS": ""}, **SMALL_STEPS)


@pytest.fixture(scope="session")
def exact_run() -> Run:
    """By the default backend's rotation, whose roundings are not the fused kernel's."""
    options = {"preset": "exact", "fused_kproj": "off"}
    return run_ours(mixed_batches(), CONTINUE, options, **SMALL_STEPS)


@pytest.fixture(scope="session", params=["balanced", "fast"])
def recall_run(request) -> Run:
    return run_ours(recall_batches(RECALL_LENGTHS, 3), ANSWER, {"preset": request.param}, **CPU)
