"""Greedy tokens with and without `fused_kproj`, from engines of their own."""

import pytest
from agreement import NEAR_TIE, NOISE, check_codes, check_same_tokens
from jobs import (
    ANSWER,
    CONTINUE,
    CPU,
    GPU,
    SMALL_STEPS,
    mixed_batches_gpu,
    recall_batches,
)
from processes import MODEL, Run, run_ours
from prompts import questions, source_prompt
from random_models import make_model
from vllm.platforms import current_platform

RUNS = "fused_kproj: "


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    def model(architecture: str) -> dict[str, str]:
        if architecture == "recall-9m":
            return {"model": str(MODEL)}
        folder = make_model(architecture, tmp_path_factory.mktemp(architecture))
        return {"model": str(folder), "tokenizer": str(MODEL)}

    return model


def fused_lines(run: Run) -> list[str]:
    lines = [line.split(RUNS)[1] for line in run.log.splitlines() if RUNS in line]
    return [line for line in lines if "Attention runs" in line]


def run_both(
    batches, fused_kproj: str, sampling=CONTINUE, near_tie=NEAR_TIE, **llm
) -> tuple[Run, Run]:
    fused, unfused = (
        run_ours(batches, sampling, {"preset": "exact", "fused_kproj": option}, **llm)
        for option in (fused_kproj, "off")
    )
    assert len(fused_lines(fused)) == 1  # once, not once a layer
    assert not fused_lines(unfused)
    check_same_tokens(fused, unfused, near_tie)
    return fused, unfused


@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_qwen3_on_cpu(models):
    batches = [[source_prompt(length, start=length) for length in (1, 63, 129, 300, 700)]]
    fused, _ = run_both(batches, "on", **models("Qwen3"), **SMALL_STEPS)
    assert fused_lines(fused)[0].startswith("Qwen3Attention runs its linear layer, then one")


@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_compiled_recall_on_cpu(models):
    """torch.compile, too, traces through the module's forward to the operator."""
    lengths = (512, 1000)
    options, compiled = {"preset": "exact"}, CPU | {"enforce_eager": False}
    run = run_ours(recall_batches(lengths, 4), ANSWER, options, **models("recall-9m"), **compiled)
    (line,) = fused_lines(run)
    assert line.startswith("LlamaAttention runs its linear layer, then one")
    assert run.facts["compilation_mode"] not in (None, "NONE")
    for answers, length in zip(run.batches, lengths, strict=True):
        check_codes(answers, questions(length, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("fused_kproj", ["auto", "on"])
@pytest.mark.parametrize("architecture", ["recall-9m", "Qwen2", "Qwen3", "Mistral"])
def test_on_gpu(models, architecture, fused_kproj):
    """32 prompts, with torch.compile and CUDA graphs, piecewise and full."""
    fused, _ = run_both(mixed_batches_gpu(), fused_kproj, **models(architecture), **GPU)
    assert fused.facts["compilation_mode"] == "VLLM_COMPILE"
    assert fused.facts["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert "one kernel from projection to cache up to" in fused_lines(fused)[0]


@pytest.mark.gpu
def test_behind_a_quantised_linear_on_gpu(models):
    batches = [[source_prompt(length, start=length) for length in (1, 64, 300)]]
    llm = GPU | {"quantization": "fp8"}
    # activations in E4M3 step by 1/16: a rounding before them may become as much
    fused, _ = run_both(batches, "auto", near_tie=NOISE, **models("Qwen3"), **llm)
    assert "runs its linear layer, since it is quantised" in fused_lines(fused)[0]
