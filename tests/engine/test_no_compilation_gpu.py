"""Under vLLM's JIT monitor in strict mode, which ends an engine that compiles while it serves."""

import pytest
from jobs import CONTINUE, DRAFTS, GPU, mixed_batches_gpu
from processes import Run, run_ours
from prompts import recall_prompts, source_prompt

pytestmark = pytest.mark.gpu

BATCH_SIZES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32)


def all_traffic() -> list[list[list[int]]]:
    """Batches of every size, in which prompts of one token to several steps meet, and prompts that
    the cache holds in whole or in part."""
    sizes = [
        [source_prompt(40 + 37 * place, start=100 * size + place) for place in range(size)]
        for size in BATCH_SIZES
    ]
    return [*sizes, *mixed_batches_gpu(), recall_prompts(5000, 3)]


def serve_all(options: dict, **llm) -> Run:
    batches = all_traffic()
    run = run_ours(batches, CONTINUE, options, jit_monitor_mode="error", **GPU | llm)
    assert "will use mode=error" in run.log
    assert list(map(len, run.batches)) == list(map(len, batches))
    for answers in run.batches:
        assert all(len(answer["tokens"]) == CONTINUE["max_tokens"] for answer in answers)
    return run


def test_one_token_a_step():
    """One layer of them unpruned."""
    run = serve_all({"delta": 10.0, "dense_layers": [0]})
    assert any(answer["num_cached_tokens"] for answer in run.batches[-2])


def test_drafts():
    run = serve_all({"preset": "balanced"}, **DRAFTS)
    assert 5 in run.decode_query_lens and run.facts["accepted_tokens"] > 0
    assert "FULL" in run.facts["captured_modes"]


def test_thresholds_of_their_own_kernel_and_a_separate_cache_write():
    serve_all({"delta": 10.0, "precomputed_threshold": True, "fused_kproj": "off"})


def test_without_graphs():
    """Whose capture is a warm-up, too."""
    serve_all({"preset": "balanced"}, compilation_config={"cudagraph_mode": "NONE"})
