"""The CPU engine through the plugin, from prompts to tokens."""

import pytest
from agreement import check_codes, check_drafts_are_decoded, check_same_answer
from float32 import check_as_exact, errors, rms
from jobs import (
    ASKED,
    CONTINUE,
    CPU,
    DRAFTS,
    FINE_LOGITS,
    RECALL_LENGTHS,
    SMALL_STEPS,
    mixed_batches,
)
from processes import run_ours
from prompts import questions, source_prompt
from vllm.platforms import current_platform

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build"),
]

LAYERS, KV_HEADS, HEAD_SIZE = 4, 2, 128
HARD_BATCHES = [[source_prompt(1400)], [source_prompt(1600, start=20_000)]]


def decoded_blocks(prompt_len: int, max_tokens: int, block_size: int) -> int:
    """Blocks times heads times layers that one request's decode steps look at."""
    seq_lens = range(prompt_len + 1, prompt_len + max_tokens)
    return sum(-(-seq_len // block_size) for seq_len in seq_lens) * KV_HEADS * LAYERS


def test_exact_is_as_exact_as_the_default_backend(exact_run, default_run):
    assert default_run.facts["backends"] == ["CPU_ATTN"]
    assert exact_run.facts["backends"] == ["FFA_FP8FP8"]
    check_as_exact(exact_run, default_run, mixed_batches())


def test_exact_skips_nothing(exact_run):
    for counts in exact_run.skips:
        assert counts["kept_blocks"] == counts["total_blocks"] > 0


def test_cached_prefix_gives_the_same_answer(exact_run):
    short, long = exact_run.batches[0][-2:]
    long_again, short_again, other_question = exact_run.batches[1]
    assert long["num_cached_tokens"] == short["num_cached_tokens"] == 0
    assert min(long_again["num_cached_tokens"], other_question["num_cached_tokens"]) > 1200
    assert short_again["num_cached_tokens"] == 384  # whole pages of 128 tokens
    check_same_answer(long_again, long)
    check_same_answer(short_again, short)


def test_drafts_change_no_answer(exact_run):
    """Verified by decode, several query tokens a request, beside requests without drafts."""
    run = run_ours(mixed_batches(), CONTINUE, {"preset": "exact"}, **SMALL_STEPS, **DRAFTS)
    assert run.facts["backends"] == ["FFA_FP8FP8"]
    assert set(exact_run.decode_query_lens) == {1}
    check_drafts_are_decoded(run)
    check_as_exact(run, exact_run, mixed_batches())


def test_not_chosen_changes_nothing(default_run, run_without_plugin):
    assert default_run.batches == run_without_plugin.batches  # logprobs too
    assert default_run.facts["plugin_is_loaded"]
    assert not run_without_plugin.facts["plugin_is_loaded"]
    warnings = [line for line in default_run.log.splitlines() if "WARNING" in line]
    assert not [line for line in warnings if "ffa" in line.lower()]


@pytest.mark.parametrize("run", ["balanced_run", "threshold_run"])
def test_pruning_recalls_every_code(request, run):
    run = request.getfixturevalue(run)
    for batch, length in enumerate(RECALL_LENGTHS):
        check_codes(run.batches[batch], questions(length, ASKED))
        assert run.skip_ratio(batch) > 0.05


def test_stats_and_log(balanced_run):
    counts = balanced_run.skips[0]
    assert counts["cache_bytes_per_token"] == LAYERS * (4 * HEAD_SIZE + 1) * KV_HEADS == 4104
    assert counts["backend_layers"] == LAYERS and counts["dense_layers"] == 0
    assert balanced_run.facts["page_shape"][-1] == 4 * HEAD_SIZE + 1
    assert "Using AttentionBackendEnum.FFA_FP8FP8 backend." in balanced_run.log


def test_fp8_values_make_the_page_smaller(threshold_run):
    assert threshold_run.facts["page_shape"][-1] == 3 * HEAD_SIZE + 2
    counts = threshold_run.skips[0]
    assert counts["cache_bytes_per_token"] == LAYERS * (3 * HEAD_SIZE + 2) * KV_HEADS == 3088


@pytest.fixture(scope="module")
def pruned_hard():
    """Everything but anchors and best blocks is skipped; two lengths around `min_context`."""
    options = {
        "delta": 0.0,
        "block_size": 32,
        "use_fp8_residual": False,
        "min_context": 1500,
        "dense_layers": [0, -1],
    }
    return run_ours(HARD_BATCHES, CONTINUE, options, **CPU, **FINE_LOGITS)


def test_pruning_hard_is_less_exact(pruned_hard, exact_run):
    """What tells the exact runs from others."""
    wrong, _ = errors(pruned_hard, HARD_BATCHES)
    right, _ = errors(exact_run, mixed_batches())
    assert rms(wrong) > 2 * rms(right)


def test_min_context_leaves_short_requests_unpruned(pruned_hard):
    short, long = pruned_hard.skips
    assert short["kept_blocks"] == short["total_blocks"] == 0 < short["short_blocks"]
    assert long["kept_blocks"] < long["total_blocks"] and long["short_blocks"] == 0


def test_block_size_counts(pruned_hard):
    short, long = pruned_hard.skips
    assert short["short_blocks"] == decoded_blocks(1400, 16, block_size=32)
    assert long["total_blocks"] == decoded_blocks(1600, 16, block_size=32)


def test_dense_layers_keep_every_block(pruned_hard):
    counts = pruned_hard.skips[1]
    assert counts["dense_layers"] == 2
    dense = counts["total_blocks"] / 2
    assert dense < counts["kept_blocks"] < dense * 1.8
    assert [layer["layer"] for layer in counts["layers"]] == list(range(LAYERS))
    for layer in counts["layers"]:
        for head in layer["heads"]:
            assert head["total_blocks"] == dense / (LAYERS / 2) / KV_HEADS
            is_dense = layer["layer"] in (0, LAYERS - 1)
            assert (head["kept_blocks"] == head["total_blocks"]) == is_dense


def test_no_residual_makes_the_page_smaller(pruned_hard):
    assert pruned_hard.facts["page_shape"][-1] == 3 * HEAD_SIZE + 1
    assert pruned_hard.skips[0]["cache_bytes_per_token"] == LAYERS * (3 * HEAD_SIZE + 1) * KV_HEADS
    assert all(len(answer["tokens"]) == 16 for (answer,) in pruned_hard.batches)
