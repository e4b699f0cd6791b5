"""Graphs of batches that are not full, lengths far below the longest, engines that sleep."""

import pytest
from agreement import check_same_answer, check_same_tokens
from jobs import CONTINUE, GPU, source_batch
from processes import HERE, MODEL, run_engine, run_ours, run_script
from prompts import source_prompt

pytestmark = pytest.mark.gpu

THREE = [source_batch((1, 300, 1100), apart=2)]


def test_three_requests_in_a_graph_of_four():
    """The fourth row is padding, of length 0, as all rows are at capture."""
    graphs = {"compilation_config": {"cudagraph_capture_sizes": [4]}}
    run = run_ours(THREE, CONTINUE, {"preset": "exact"}, **GPU, **graphs)
    assert "FULL" in run.facts["captured_modes"]
    flash_attention = run_engine(THREE, CONTINUE, attention_backend="FLASH_ATTN", **GPU, **graphs)
    check_same_tokens(run, flash_attention)


def test_a_million_tokens_at_most_and_short_requests():
    """Scratch and grids are for the longest request that there could be."""
    limits = GPU | {"max_model_len": 1_000_000, "kv_cache_memory_bytes": 8 << 30}
    limits["hf_overrides"] = GPU["hf_overrides"] | {"max_position_embeddings": 1_000_000}
    run = run_ours(THREE, CONTINUE, {"preset": "exact"}, **limits)
    flash_attention = run_engine(THREE, CONTINUE, attention_backend="FLASH_ATTN", **limits)
    check_same_tokens(run, flash_attention)


def test_sleep_and_wake():
    """At both levels the cache is lost, and what the prefix cache knows of it with it."""
    llm = GPU | {
        "model": str(MODEL),
        "seed": 0,
        "attention_backend": "FFA_FP8FP8",
        "additional_config": {"ffa_fp8fp8": {"preset": "exact", "record_skip_ratio": True}},
        "worker_extension_cls": "vllm_ffa_fp8fp8.stats.WorkerExtension",
    }
    prompts = {"prompt": source_prompt(1500), "other": source_prompt(1500, start=20_000)}
    result, _ = run_script(HERE / "sleeping.py", {"llm": llm} | prompts)
    first, *others = result["answers"]
    for answer in others:
        assert answer["num_cached_tokens"] == 0
        check_same_answer(answer, first)
    for counts in result["skips"]:  # they outlive sleep, and are reset by being read
        assert counts["kept_blocks"] == counts["total_blocks"] > 0
