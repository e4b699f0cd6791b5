"""The CUDA engine as users run it: torch.compile, CUDA graphs, Model Runner V2."""

import itertools

import pytest
from agreement import check_codes, check_drafts_are_decoded, check_same_tokens
from jobs import (
    ANSWER,
    ASKED_GPU,
    CONTINUE,
    DRAFTS,
    GPU,
    RECALL_LENGTHS_GPU,
    mixed_batches_gpu,
    recall_batches,
)
from processes import Run, run_engine, run_ours, serve
from prompts import questions, recall_prompts

pytestmark = pytest.mark.gpu

ONE_BY_ONE = 4
HEAD_SIZE = 128
NAMES_THE_BACKEND = "Using AttentionBackendEnum.FFA_FP8FP8 backend."


def recall_batches_gpu() -> list[list[str]]:
    """Questions of one length together; then those of the first, one after the other."""
    together = recall_batches(RECALL_LENGTHS_GPU, ASKED_GPU)
    return [*together, *([question] for question in together[0][:ONE_BY_ONE])]


@pytest.fixture(scope="module")
def balanced_run() -> Run:
    return run_ours(recall_batches_gpu(), ANSWER, {"preset": "balanced"}, **GPU)


def check_graphs(run: Run) -> None:
    assert run.facts["backends"] == ["FFA_FP8FP8"]
    assert NAMES_THE_BACKEND in run.log
    assert not run.facts["enforce_eager"]
    assert run.facts["compilation_mode"] == "VLLM_COMPILE"
    assert run.facts["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert "FULL" in run.facts["captured_modes"]
    assert run.facts["model_runner"] == "vllm.v1.worker.gpu.model_runner"


@pytest.mark.xdist_group("exact")
def test_exact_gives_flash_attentions_tokens(exact_gpu_run):
    batches = mixed_batches_gpu()
    flash_attention = run_engine(batches, CONTINUE, attention_backend="FLASH_ATTN", **GPU)
    assert flash_attention.facts["backends"] == ["FLASH_ATTN"]
    assert sum(map(len, batches)) == 32
    check_same_tokens(exact_gpu_run, flash_attention)


@pytest.mark.xdist_group("exact")
def test_exact_runs_compiled_in_graphs(exact_gpu_run):
    check_graphs(exact_gpu_run)


@pytest.mark.xdist_group("exact")
def test_exact_finds_prefixes_and_skips_nothing(exact_gpu_run):
    shared = (16_000, 16_000, 16_000, 8192, 3000, 4097)
    for answer, length in zip(exact_gpu_run.batches[1], shared, strict=True):
        assert 0.9 * length < answer["num_cached_tokens"] <= length
    for counts in exact_gpu_run.skips:
        assert counts["kept_blocks"] == counts["total_blocks"] > 0


@pytest.mark.xdist_group("balanced")
def test_balanced_recalls_every_code(balanced_run):
    check_graphs(balanced_run)
    for batch, length in enumerate(RECALL_LENGTHS_GPU):
        check_codes(balanced_run.batches[batch], questions(length, ASKED_GPU))
        print(f"{length} tokens: {balanced_run.skip_ratio(batch):.1%} of the blocks skipped")
        assert balanced_run.skip_ratio(batch) > 0.05


@pytest.mark.xdist_group("balanced")
def test_small_prefills_run_in_piecewise_graphs(balanced_run):
    """Questions one after the other: all but their ends are in the cache, and few tokens are left,
    which run in a graph that is cut at attention."""
    assert "Capturing CUDA graphs (PIECEWISE)" in balanced_run.log
    answers = [answer for (answer,) in balanced_run.batches[-ONE_BY_ONE:]]
    check_codes(answers, questions(RECALL_LENGTHS_GPU[0], ASKED_GPU)[:ONE_BY_ONE])
    for answer in answers:
        assert 0 < answer["num_prompt_tokens"] - answer["num_cached_tokens"] < 256


def test_fp8_values_recall_every_code():
    batches = recall_batches(RECALL_LENGTHS_GPU, ASKED_GPU)
    run = run_ours(batches, ANSWER, {"preset": "balanced", "v_cache_dtype": "fp8"}, **GPU)
    check_graphs(run)
    assert run.facts["page_shape"][-1] == 3 * HEAD_SIZE + 2
    for batch, length in enumerate(RECALL_LENGTHS_GPU):
        check_codes(run.batches[batch], questions(length, ASKED_GPU))
        assert run.skip_ratio(batch) > 0.05


@pytest.mark.parametrize(
    "options", [{}, {"block_size": 64, "v_cache_dtype": "fp8"}, {"scan": "int4"}], ids=str
)
def test_reading_by_share_recalls_every_code(options):
    batches = recall_batches(RECALL_LENGTHS_GPU, ASKED_GPU)
    run = run_ours(batches, ANSWER, {"tau": 0.03} | options, **GPU)
    check_graphs(run)
    for batch, length in enumerate(RECALL_LENGTHS_GPU):
        check_codes(run.batches[batch], questions(length, ASKED_GPU))
        print(f"{length} tokens: {run.skip_ratio(batch):.1%} of the blocks skipped")
        assert run.skip_ratio(batch) > 0.5
        assert 0 < run.skips[batch]["drawn_blocks"] < run.skips[batch]["kept_blocks"]


def test_other_ways_to_find_the_threshold_and_not_counting_change_no_token():
    options = {"rule": "threshold", "delta": 10.0}
    plain = run_ours(recall_batches_gpu(), ANSWER, options, **GPU)
    assert plain.skip_ratio(0) > 0.05
    options |= {"precomputed_threshold": True, "record_skip_ratio": False}
    run = run_ours(recall_batches_gpu(), ANSWER, options, **GPU)
    assert not run.skips
    check_same_tokens(run, plain)


@pytest.mark.xdist_group("exact")
def test_drafts_change_no_token(exact_gpu_run):
    """Verified by decode, several query tokens a request, fewer for some: as vLLM's V1 model
    runner drafts, where V2 drafts as many as it may for all."""
    run = run_ours(
        mixed_batches_gpu(), CONTINUE, {"preset": "exact"}, **GPU, **DRAFTS,
        variables={"VLLM_USE_V2_MODEL_RUNNER": "0"},
    )  # fmt: skip
    assert run.facts["backends"] == ["FFA_FP8FP8"] and NAMES_THE_BACKEND in run.log
    assert run.facts["model_runner"] == "vllm.v1.worker.gpu_model_runner"
    check_drafts_are_decoded(run)
    check_same_tokens(run, exact_gpu_run)


@pytest.mark.parametrize(
    "options", [{"preset": "balanced"}, {"delta": 10.0}, {"tau": 0.03, "scan": "int4"}], ids=str
)
def test_batch_invariant_answers_are_bit_equal(monkeypatch, options):
    """Alone, and among others that share its steps and cut its prompt elsewhere."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    asked = questions(5000, 3)
    first, *others = recall_prompts(5000, 3)
    batches = [[first], [others[0], first, others[1], others[0][:700]]]
    alone, among_others = run_ours(
        batches, CONTINUE, options, enable_prefix_caching=False, **GPU
    ).batches
    assert alone[0]["tokens"] == among_others[1]["tokens"]
    assert alone[0]["best"] == among_others[1]["best"]
    check_codes([{"text": alone[0]["text"].split("\n")[0]}], asked[:1])


def test_serve_answers():
    limits = ("--max-model-len", "20000", "--max-num-seqs", "32")
    limits += ("--gpu-memory-utilization", "0.15", "--kv-cache-memory-bytes", str(2 << 30))
    asked = list(itertools.chain(questions(2048, 2), questions(8192, 1)))
    with serve(*limits, VLLM_ATTENTION_BACKEND="FFA_FP8FP8") as server:
        answers = [server.complete(question.prompt, max_tokens=8) for question in asked]
        log = server.log
        exit_code = server.stop()
        assert not server.has_processes()
    check_codes([{"text": answer.split("\n")[0]} for answer in answers], asked)
    assert NAMES_THE_BACKEND in log
    assert exit_code == 0
