"""One model over two workers: KV heads are divided, or replicated where there is one, and the
projection stays a linear layer."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from agreement import NEAR_TIE, check_codes, check_same_tokens
from jobs import ANSWER, CONTINUE, CPU, GPU, recall_batches, source_batch
from processes import Run, run_ours
from prompts import questions
from random_models import make_model
from vllm.platforms import current_platform

WORKERS = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # for functions that workers are to run
ON_GPUS = WORKERS | {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # as in production
    # NVLink multicast is the host's, and virtual machines on it may not have it.
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
QUESTION_LENGTHS, ASKED = (1500,), 2
QUESTION_LENGTHS_GPU, ASKED_GPU = (2048, 8192), 4
SOURCE_LENGTHS_GPU = (1, 63, 129, 500, 1024, 2049, 5000)


def check_projected_by_workers(run: Run) -> None:
    """A worker's layers start behind vLLM's linear layer, of which it has a part."""
    assert "since it is tensor-parallel, then one kernel to the cache" in run.log
    calls = run.facts["projections"]
    assert calls["rope_and_write"] > 0 == calls["project_rope_and_write"]


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_two_workers_on_the_cpu():
    batches = recall_batches(QUESTION_LENGTHS, ASKED)
    variables = WORKERS | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    options = {"preset": "balanced", "metrics": True}
    llm = CPU | {"tensor_parallel_size": 2, "disable_log_stats": False}
    run = run_ours(batches, ANSWER, options, variables=variables, **llm)
    check_codes(run.batches[0], questions(QUESTION_LENGTHS[0], ASKED))
    assert run.facts["backends"] == ["FFA_FP8FP8"]
    assert run.facts["page_shape"][1] == 1  # KV heads of a worker
    assert run.skip_ratio(0) > 0.05
    check_projected_by_workers(run)
    (one_worker,) = run.skips
    kept, total = (run.facts["metrics"][f"vllm:ffa_{name}_blocks"] for name in ("kept", "total"))
    assert total == 2 * one_worker["total_blocks"] > 0
    assert 0 < kept - one_worker["kept_blocks"] < one_worker["total_blocks"]


def run_on_one_and_two(batches, sampling, preset: str, **llm) -> tuple[Run, Run]:
    """Two engines at a time, with CUDA graphs."""

    def run_on(num_gpus: int) -> Run:
        return run_ours(
            batches,
            sampling,
            {"preset": preset},
            variables=ON_GPUS,
            tensor_parallel_size=num_gpus,
            **GPU | llm,
        )

    with ThreadPoolExecutor() as pool:
        one, two = pool.map(run_on, (1, 2))
    for run in (one, two):
        assert run.facts["backends"] == ["FFA_FP8FP8"]
        assert run.facts["cudagraph_mode"] == "FULL_AND_PIECEWISE"
        assert "FULL" in run.facts["captured_modes"]
    assert "one kernel from projection to cache up to" in one.log
    check_projected_by_workers(two)
    return one, two


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_two_gpus_answer_as_one(preset):
    batches = recall_batches(QUESTION_LENGTHS_GPU, ASKED_GPU)
    one, two = run_on_one_and_two(batches, ANSWER, preset)
    assert [run.facts["page_shape"][1] for run in (one, two)] == [2, 1]
    check_same_tokens(two, one)
    for batch, length in enumerate(QUESTION_LENGTHS_GPU):
        check_codes(two.batches[batch], questions(length, ASKED_GPU))
        assert (two.skip_ratio(batch) > 0.05) == (preset == "balanced")


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("architecture, kv_heads, kv_heads_of_a_worker", [
    ("Qwen2", 4, 2),  # with biases
    ("Qwen3", 1, 1),  # with norms; both workers have the KV head, each half of its query heads
])  # fmt: skip
def test_two_gpus_give_the_tokens_of_one(tmp_path, architecture, kv_heads, kv_heads_of_a_worker):
    model = make_model(architecture, tmp_path, num_key_value_heads=kv_heads)
    batches = [source_batch(SOURCE_LENGTHS_GPU)]
    one, two = run_on_one_and_two(batches, CONTINUE, "exact", **model)
    assert [run.facts["page_shape"][1] for run in (one, two)] == [kv_heads, kv_heads_of_a_worker]
    # what is summed over the workers is rounded before
    check_same_tokens(two, one, near_tie=2 * NEAR_TIE)
