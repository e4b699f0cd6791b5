"""Requests of one batch that choose what is skipped of theirs: with the V2 model runner, and in
CUDA graphs. `test_metrics.py` has those of the V1 model runner."""

import math

import pytest
from agreement import check_same_answer
from jobs import CPU, FINE_LOGITS, GPU
from processes import HERE, MODEL, Run, run_ours, run_script
from prompts import recall_prompts
from vllm.platforms import current_platform

FEW = {"max_tokens": 4, "ignore_eos": True}
ALONE = {"enable_prefix_caching": False}  # what one request cached is not for another


def batches_of(key: str, limits: tuple[float | None, ...], length: int) -> list[list[dict]]:
    """A prompt for each limit: one after the other, then together."""
    prompts = recall_prompts(length, len(limits))
    requests = [
        {"prompt": prompt, "extra_args": None if limit is None else {key: limit}}
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    return [*([request] for request in requests), requests]


def check_each_as_alone(run: Run) -> None:
    """Both kept blocks and tokens."""
    *alone, together = run.batches
    for (answer,), among_others in zip(alone, together, strict=True):
        check_same_answer(among_others, answer)
    *counts, all_counts = run.skips
    for name in ("total_blocks", "kept_blocks"):
        each = sum(count[name] for count in counts)
        assert all_counts[name] == pytest.approx(each, rel=0.02), name


def kept(run: Run) -> list[float]:
    return [1 - run.skip_ratio(batch) for batch in range(len(run.skips))]


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_taus_of_one_batch_with_the_v2_model_runner():
    """It is what GPUs use."""
    options = {"tau": 0.02, "dense_layers": [0], "record_skip_ratio": True}
    llm = {
        "model": str(MODEL),
        "attention_backend": "FFA_FP8FP8",
        "additional_config": {"ffa_fp8fp8": options},
        "worker_extension_cls": "vllm_ffa_fp8fp8.stats.WorkerExtension",
    }
    batches = batches_of("ffa_tau", (0.5, None, 0), 1100)
    job = {"llm": llm | CPU | FINE_LOGITS | ALONE, "batches": batches, "sampling": FEW}
    variables = {"VLLM_USE_V2_MODEL_RUNNER": "1"}  # a new process, in which vLLM is not there yet
    result, log = run_script(HERE / "v2_runner.py", job, variables)
    run = Run(**result, log=log)
    assert run.facts["model_runner"] == "vllm.v1.worker.cpu.model_runner"  # V2's heir
    check_each_as_alone(run)
    careless, default, exact, _ = kept(run)
    assert careless < 0.8 * default < 0.8 and exact == 1.0
    for counts in run.skips:  # the dense layer stays dense
        assert counts["layers"][0]["kept_blocks"] == counts["layers"][0]["total_blocks"]


@pytest.mark.gpu
@pytest.mark.parametrize("key, option", [("ffa_delta", 5.0), ("ffa_tau", 0.02)])
def test_limits_of_one_batch_in_graphs(monkeypatch, key, option):
    """Bit for bit what each gives alone, where vLLM promises that."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    limits = (0, None, math.inf, 8.0) if key == "ffa_delta" else (0.5, None, 0, 0.1)
    options = {key.removeprefix("ffa_"): option}
    run = run_ours(batches_of(key, limits, 5000), FEW, options, **GPU | ALONE)
    assert "FULL" in run.facts["captured_modes"]
    *alone, together = run.batches
    for (answer,), among_others in zip(alone, together, strict=True):
        assert answer["tokens"] == among_others["tokens"]
        assert answer["best"] == among_others["best"]
    *counts, all_counts = run.skips
    for name in ("total_blocks", "kept_blocks"):
        assert all_counts[name] == sum(count[name] for count in counts)
    careless, default, exact, between, _ = kept(run)
    assert careless < between < default < 1 == exact or careless < default < between < 1 == exact
