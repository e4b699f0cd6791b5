"""The CUDA engine as users run it: torch.compile, CUDA graphs, Model Runner V2."""

import itertools

import pytest
from agreement import check_codes, check_same_tokens
from jobs import (
    ANSWER,
    CONTINUE,
    DRAFTS,
    GPU,
    NUM_DRAFTS,
    RECALL_LENGTHS_GPU,
    mixed_batches_gpu,
    recall_batches,
)
from processes import Run, run_engine, run_ours, serve
from prompts import questions, recall_prompts

pytestmark = pytest.mark.gpu

ASKED = 8
HEAD_SIZE = 128
NAMES_THE_BACKEND = "Using AttentionBackendEnum.FFA_FP8FP8 backend."


@pytest.fixture(scope="module")
def exact_run() -> Run:
    return run_ours(mixed_batches_gpu(), CONTINUE, {"preset": "exact"}, **GPU)


@pytest.fixture(scope="module")
def balanced_run() -> Run:
    batches = recall_batches(RECALL_LENGTHS_GPU, ASKED)
    return run_ours(batches, ANSWER, {"preset": "balanced"}, **GPU)


def check_graphs(run: Run) -> None:
    assert run.facts["backends"] == ["FFA_FP8FP8"]
    assert NAMES_THE_BACKEND in run.log
    assert not run.facts["enforce_eager"]
    assert run.facts["compilation_mode"] == "VLLM_COMPILE"
    assert run.facts["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert "FULL" in run.facts["captured_modes"]
    assert run.facts["model_runner"] == "vllm.v1.worker.gpu.model_runner"


@pytest.mark.xdist_group("exact")
def test_exact_gives_flash_attentions_tokens(exact_run):
    batches = mixed_batches_gpu()
    flash_attention = run_engine(batches, CONTINUE, attention_backend="FLASH_ATTN", **GPU)
    assert flash_attention.facts["backends"] == ["FLASH_ATTN"]
    assert sum(map(len, batches)) == 32
    check_same_tokens(exact_run, flash_attention)


@pytest.mark.xdist_group("exact")
def test_exact_runs_compiled_in_graphs(exact_run):
    check_graphs(exact_run)


@pytest.mark.xdist_group("exact")
def test_exact_finds_prefixes_and_skips_nothing(exact_run):
    shared = (16_000, 16_000, 16_000, 8192, 3000, 4097)
    for answer, length in zip(exact_run.batches[1], shared, strict=True):
        assert 0.9 * length < answer["num_cached_tokens"] <= length
    for counts in exact_run.skips:
        assert counts["kept_blocks"] == counts["total_blocks"] > 0


@pytest.mark.xdist_group("balanced")
def test_balanced_recalls_every_code(balanced_run):
    check_graphs(balanced_run)
    for batch, length in enumerate(RECALL_LENGTHS_GPU):
        check_codes(balanced_run.batches[batch], questions(length, ASKED))
        print(f"{length} tokens: {balanced_run.skip_ratio(batch):.1%} of the blocks skipped")
        assert balanced_run.skip_ratio(batch) > 0.05


def test_small_prefills_run_in_piecewise_graphs():
    """One question after the other: all but its end is in the cache, and few tokens are left,
    which run in a graph that is cut at attention."""
    asked = questions(2048, 4)
    batches = [[question.prompt] for question in asked]
    run = run_ours(batches, ANSWER, {"preset": "balanced"}, **GPU)
    check_graphs(run)
    assert "Capturing CUDA graphs (PIECEWISE)" in run.log
    check_codes([answer for (answer,) in run.batches], asked)
    for (answer,) in run.batches[1:]:
        assert 0 < answer["num_prompt_tokens"] - answer["num_cached_tokens"] < 256


def test_fp8_values_recall_every_code():
    batches = recall_batches(RECALL_LENGTHS_GPU, ASKED)
    run = run_ours(batches, ANSWER, {"preset": "balanced", "v_cache_dtype": "fp8"}, **GPU)
    check_graphs(run)
    assert run.facts["page_shape"][-1] == 3 * HEAD_SIZE + 2
    for batch, length in enumerate(RECALL_LENGTHS_GPU):
        check_codes(run.batches[batch], questions(length, ASKED))
        assert run.skip_ratio(batch) > 0.05


@pytest.mark.xdist_group("balanced")
def test_other_ways_to_find_the_threshold_and_not_counting_change_no_token(balanced_run):
    options = {"preset": "balanced", "precomputed_threshold": True, "record_skip_ratio": False}
    batches = recall_batches(RECALL_LENGTHS_GPU, ASKED)
    run = run_ours(batches, ANSWER, options, **GPU)
    assert all(counts["total_blocks"] == 0 for counts in run.skips)
    check_same_tokens(run, balanced_run)


@pytest.mark.xdist_group("exact")
def test_drafts_change_no_token(exact_run):
    """Verified by decode, several query tokens a request, beside requests without drafts."""
    run = run_ours(mixed_batches_gpu(), CONTINUE, {"preset": "exact"}, **GPU, **DRAFTS)
    check_graphs(run)
    assert run.facts["accepted_tokens"] > 0
    assert run.decode_query_lens.count(1 + NUM_DRAFTS) > 5
    check_same_tokens(run, exact_run)


def test_batch_invariant_answers_are_bit_equal(monkeypatch):
    """Alone, and among others that share its steps and cut its prompt elsewhere."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    asked = questions(5000, 3)
    first, *others = recall_prompts(5000, 3)
    batches = [[first], [others[0], first, others[1], others[0][:700]]]
    alone, among_others = run_ours(
        batches, CONTINUE, {"preset": "balanced"}, enable_prefix_caching=False, **GPU
    ).batches
    assert alone[0]["tokens"] == among_others[1]["tokens"]
    assert alone[0]["best"] == among_others[1]["best"]
    check_codes([{"text": alone[0]["text"].split("\n")[0]}], asked[:1])


def test_serve_answers():
    limits = ("--max-model-len", "20000", "--max-num-seqs", "32")
    limits += ("--gpu-memory-utilization", "0.15", "--kv-cache-memory-bytes", str(6 << 30))
    asked = list(itertools.chain(questions(2048, 2), questions(8192, 1)))
    with serve(*limits, VLLM_ATTENTION_BACKEND="FFA_FP8FP8") as server:
        answers = [server.complete(question.prompt, max_tokens=8) for question in asked]
        log = server.log
        exit_code = server.stop()
        assert not server.has_processes()
    check_codes([{"text": answer.split("\n")[0]} for answer in answers], asked)
    assert NAMES_THE_BACKEND in log
    assert exit_code == 0
