"""One model over two workers: KV heads are divided, and the projection stays a linear layer."""

import pytest
import torch
from agreement import check_codes
from jobs import ANSWER, CPU, GPU, recall_batches
from processes import run_ours
from prompts import questions
from vllm.platforms import current_platform

WORKERS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for the function that asks the workers for facts
}
LENGTH, ASKED = 2048, 2


def check_two_workers(variables: dict[str, str], llm: dict) -> None:
    batches = recall_batches((LENGTH,), ASKED)
    run = run_ours(
        batches, ANSWER, {"preset": "balanced"}, variables=variables, tensor_parallel_size=2, **llm
    )
    check_codes(run.batches[0], questions(LENGTH, ASKED))
    assert run.facts["backends"] == ["FFA_FP8FP8"]
    assert run.facts["page_shape"][1] == 1  # KV heads of a worker
    assert run.skip_ratio(0) > 0.05
    assert "since it is tensor-parallel, then one kernel to the cache" in run.log


@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_two_workers_on_the_cpu():
    check_two_workers(WORKERS | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus():
    check_two_workers(WORKERS, GPU)
