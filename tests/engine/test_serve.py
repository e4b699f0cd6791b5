"""`VLLM_ATTENTION_BACKEND=FFA_FP8FP8 vllm serve`, whose engine and workers are spawned."""

import pytest
from agreement import check_codes
from processes import serve
from prompts import questions
from vllm.platforms import current_platform


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_serve_answers_and_ends():
    (question,) = questions(1500, 1)
    arguments = ("--enforce-eager", "--max-model-len", "4096")
    variables = {"VLLM_ATTENTION_BACKEND": "FFA_FP8FP8", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    with serve(*arguments, **variables) as server:
        answer = server.complete(question.prompt, max_tokens=8)
        log = server.log
        exit_code = server.stop()
        assert not server.has_processes()
    check_codes([{"text": answer.split("\n")[0]}], [question])
    assert "Using AttentionBackendEnum.FFA_FP8FP8 backend." in log
    assert "Unknown vLLM environment variable" not in log
    assert exit_code == 0
