"""One engine for each way of running it, started when a test first asks for it."""

import multiprocessing
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from jobs import (
    ANSWER,
    ASKED,
    CONTINUE,
    CPU,
    GPU,
    RECALL_LENGTHS,
    SMALL_STEPS,
    mixed_batches,
    mixed_batches_gpu,
    recall_batches,
)
from processes import Run, run_engine, run_ours
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.commands import engine_process


@pytest.fixture(scope="session", autouse=current_platform.is_cpu())
def forked_engines() -> Iterator[None]:
    """Engines of commands start where vLLM is imported, as those of `run_script` do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm"])
    with pytest.MonkeyPatch.context() as monkeypatch:
        forking = SimpleNamespace(get_context=lambda method: context)
        monkeypatch.setattr(engine_process, "multiprocessing", forking)
        yield


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


@pytest.fixture(scope="session")
def balanced_run() -> Run:
    batches = recall_batches(RECALL_LENGTHS, ASKED)
    return run_ours(batches, ANSWER, {"preset": "balanced"}, **CPU)


@pytest.fixture(scope="session")
def threshold_run() -> Run:
    """The other rule, and FP8 V."""
    options = {"rule": "threshold", "delta": 5.0, "v_cache_dtype": "fp8"}
    return run_ours(recall_batches(RECALL_LENGTHS, ASKED), ANSWER, options, **CPU)


@pytest.fixture(scope="session")
def exact_gpu_run() -> Run:
    return run_ours(mixed_batches_gpu(), CONTINUE, {"preset": "exact"}, **GPU)


@pytest.fixture(scope="module")
def distributed(tmp_path_factory) -> Iterator[None]:
    """What attention modules need of vLLM in this process."""
    from attention_modules import make_config
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    with set_current_vllm_config(make_config()):
        store = tmp_path_factory.mktemp("store") / "file"
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
