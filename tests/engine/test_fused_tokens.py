"""Greedy tokens with `fused_kproj`: those without it, or those of float32."""

import pytest
from agreement import NEAR_TIE, NOISE, check_codes, check_same_tokens
from float32 import errors, rms
from jobs import (
    ANSWER,
    CONTINUE,
    CPU,
    GPU,
    SMALL_STEPS,
    mixed_batches_gpu,
    recall_batches,
    source_batch,
)
from processes import Run, run_ours
from prompts import questions
from random_models import make_model
from vllm.platforms import current_platform

RUNS = "fused_kproj: "


def fused_lines(run: Run) -> list[str]:
    lines = [line.split(RUNS)[1] for line in run.log.splitlines() if RUNS in line]
    return [line for line in lines if "Attention runs" in line]


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_qwen3_on_cpu(tmp_path):
    model, batches = make_model("Qwen3", tmp_path), [source_batch((1, 63, 129, 300, 700))]
    options = {"preset": "exact", "fused_kproj": "on"}
    run = run_ours(batches, CONTINUE, options, **model, **SMALL_STEPS)
    assert fused_lines(run)[0].startswith("Qwen3Attention runs its linear layer, then one")
    assert run.facts["projections"]["rope_and_write"] > 0
    off, regret = errors(run, batches, model["model"])
    print(f"rms error {rms(off):.4f}, regret {float(regret.max()):.4f}")
    assert rms(off) < 0.1 and regret.max() < 0.2  # without norms 0.8 and 2.7


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_compiled_recall_on_cpu():
    """torch.compile, too, traces through the module's forward to the operator."""
    lengths = (512, 1000)
    compiled = CPU | {"enforce_eager": False}
    run = run_ours(recall_batches(lengths, 2), ANSWER, {"preset": "exact"}, **compiled)
    (line,) = fused_lines(run)
    assert line.startswith("LlamaAttention runs its linear layer, then one")
    assert run.facts["compilation_mode"] not in (None, "NONE")
    for answers, length in zip(run.batches, lengths, strict=True):
        check_codes(answers, questions(length, 2))


def run_exact(batches, fused_kproj: str, **llm) -> Run:
    return run_ours(batches, CONTINUE, {"preset": "exact", "fused_kproj": fused_kproj}, **llm)


def check_same(fused: Run, unfused: Run, near_tie: float = NEAR_TIE) -> None:
    assert len(fused_lines(fused)) == 1  # once, not once a layer
    assert not fused_lines(unfused)
    check_same_tokens(fused, unfused, near_tie)


def check_compiled_from_hidden_states(run: Run) -> None:
    assert run.facts["compilation_mode"] == "VLLM_COMPILE"
    assert run.facts["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert "one kernel from projection to cache up to" in fused_lines(run)[0]


@pytest.mark.gpu
@pytest.mark.xdist_group("exact")
def test_recall_on_gpu(exact_gpu_run):
    """32 prompts, with torch.compile and CUDA graphs, piecewise and full."""
    check_same(exact_gpu_run, run_exact(mixed_batches_gpu(), "off", **GPU))
    check_compiled_from_hidden_states(exact_gpu_run)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture, fused_kproj", [("Qwen2", "auto"), ("Qwen3", "on")])
def test_others_on_gpu(tmp_path, architecture, fused_kproj):
    """With biases, and with norms; Mistral's forward is Llama's."""
    llm = GPU | make_model(architecture, tmp_path)
    fused, unfused = (run_exact(mixed_batches_gpu(), way, **llm) for way in (fused_kproj, "off"))
    check_same(fused, unfused)
    check_compiled_from_hidden_states(fused)


@pytest.mark.gpu
def test_behind_a_quantised_linear_on_gpu(tmp_path):
    llm = GPU | {"quantization": "fp8"} | make_model("Qwen3", tmp_path)
    fused, unfused = (
        run_exact([source_batch((1, 64, 300))], way, **llm) for way in ("auto", "off")
    )
    # activations in E4M3 step by 1/16: a rounding before them may become as much
    check_same(fused, unfused, near_tie=NOISE)
    assert "runs its linear layer, since it is quantised" in fused_lines(fused)[0]
