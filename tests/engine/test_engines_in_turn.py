"""Engines one after another in one process, beside vLLM's default backend: with a rotary table that
ends too soon, with weights that are replaced after loading, and behind a cached prefix."""

import math

import pytest
from jobs import CPU, FINE_LOGITS, GPU
from processes import HERE, MODEL, run_script
from prompts import source_prompt
from random_models import make_model
from vllm.platforms import current_platform

OURS = {
    "attention_backend": "FFA_FP8FP8",
    "additional_config": {"ffa_fp8fp8": {"preset": "exact"}},
}
ROWS = 1024
SHORT_TABLE = {
    "max_position_embeddings": ROWS,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "dynamic", "factor": 2.0},
}
SCRIPT = HERE / "engines_in_turn.py"
ONE_MORE_THAN_PAGES = 257
NOISE = 0.3
"""Log probabilities of models with random weights may differ by this; by norms, by 2 and more."""


def job(llm: dict, lengths: tuple[int, ...], again: str | None = None) -> dict:
    prompts = [source_prompt(length, start=2 * length) for length in lengths]
    return {"llm": llm, "prompts": prompts, "max_tokens": 8, "again": again}


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_on_cpu(tmp_path):
    overrides = FINE_LOGITS["hf_overrides"] | SHORT_TABLE
    short = {"model": str(MODEL), "enforce_eager": True, "hf_overrides": overrides}
    qwen3 = CPU | FINE_LOGITS | make_model("Qwen3", tmp_path / "qwen3")
    crossing = (ONE_MORE_THAN_PAGES, ROWS - 5, ROWS + 6)
    jobs = [job(short, crossing), job(short | OURS, crossing, again="cached")]
    jobs += [job(qwen3 | backend, (63, 200), again="replaced") for backend in ({}, OURS)]
    (short_default, short_ours, default, ours), log = run_script(SCRIPT, jobs)
    for answer, expected in zip(short_ours[0], short_default[0], strict=True):
        assert answer["tokens"] == expected["tokens"]
    check_cached(short_ours)
    assert f"its rotary table has {ROWS} positions and max_model_len is {2 * ROWS}" in log
    check_replaced(ours, default)
    assert "Qwen3Attention runs its linear layer, then one kernel to the cache" in log


def check_cached(asked: list) -> None:
    """A prompt's last token alone, behind a cached prefix, which decode takes and not prefill."""
    cold, cached = (answers[0] for answers in asked)
    assert (cold["cached"], cached["cached"]) == (0, ONE_MORE_THAN_PAGES - 1)
    assert cached["tokens"] == cold["tokens"]


def check_replaced(ours: list, default: list) -> None:
    for before, after, *expected in zip(*ours, *default, strict=True):
        print(before["first"], after["first"], *(answer["first"] for answer in expected))
        assert difference(before, expected[0]) < NOISE > difference(after, expected[1])
        assert difference(before, after) > 2 * NOISE


def difference(answer: dict, expected: dict) -> float:
    """Of the log probability of the first token that is expected; infinite where it is not among
    the best."""
    token, logprob = max(expected["first"].items(), key=lambda entry: entry[1])
    return abs(answer["first"].get(token, -math.inf) - logprob)


@pytest.mark.gpu
def test_on_gpu(tmp_path):
    """Ours with CUDA graphs, which vLLM's default follows only without."""
    qwen3 = GPU | make_model("Qwen3", tmp_path / "qwen3")
    lengths = (63, 700, 3000)
    jobs = [job(qwen3 | {"enforce_eager": True}, lengths, again="replaced")]
    jobs += [
        job(qwen3 | OURS | more, lengths, again="replaced")
        for more in ({}, {"enforce_eager": True})
    ]
    (default, graphs, eager), log = run_script(SCRIPT, jobs)
    check_replaced(graphs, default)
    check_replaced(eager, default)
    assert "Weights were replaced after loading, and CUDA graphs read" in log


@pytest.mark.gpu
def test_cached_prefixes_on_gpu():
    """With `exact` and batch invariance."""
    llm = GPU | OURS | {"model": str(MODEL)}
    batch_invariant = {"VLLM_BATCH_INVARIANT": "1"}
    jobs = [job(llm, (ONE_MORE_THAN_PAGES, 1300), again="cached")]
    ((asked,), _) = run_script(SCRIPT, jobs, batch_invariant)
    check_cached(asked)
