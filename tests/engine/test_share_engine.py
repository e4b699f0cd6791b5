"""Reading blocks by their share through CPU engines, and the value that `calibrate` finds."""

import json

import pytest
from agreement import check_codes, check_same_answer
from jobs import ANSWER, ASKED, CONTINUE, CPU, FINE_LOGITS, RECALL_LENGTHS, recall_batches
from processes import MODEL, run_engine, run_ours
from prompts import questions, source_prompt, source_tokens, tokenizer
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.commands import cli
from vllm_ffa_fp8fp8.config import FFAConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build"),
]

LAYERS = 4
TAU = 0.02


@pytest.fixture(scope="module")
def share_run():
    batches = recall_batches(RECALL_LENGTHS, ASKED)
    return run_ours(batches, ANSWER, {"tau": TAU}, **CPU, **FINE_LOGITS)


def test_tokens_are_the_default_backends(share_run):
    batches = recall_batches(RECALL_LENGTHS, ASKED)
    default = run_engine(batches, ANSWER, **CPU, **FINE_LOGITS)
    assert default.facts["backends"] == ["CPU_ATTN"]
    assert share_run.facts["backends"] == ["FFA_FP8FP8"]
    for length, ours, theirs in zip(
        RECALL_LENGTHS, share_run.batches, default.batches, strict=True
    ):
        check_codes(ours, questions(length, ASKED))
        for answer, reference in zip(ours, theirs, strict=True):
            check_same_answer(answer, reference)


def test_blocks_are_drawn_and_the_longer_context_reads_less(share_run):
    short, long = share_run.skips
    for counts in (short, long):
        assert 0 < counts["drawn_blocks"] < counts["kept_blocks"] < 0.3 * counts["total_blocks"]
        assert 0 < counts["left_mass"] / counts["tokens"] < counts["most_left_mass"] <= 1
        per_layer = {layer["tokens"] for layer in counts["layers"]}
        assert per_layer == {counts["tokens"] / LAYERS}
    assert long["kept_blocks"] / long["tokens"] < 1.5 * short["kept_blocks"] / short["tokens"]
    kept = [counts["kept_blocks"] / counts["total_blocks"] for counts in (short, long)]
    assert kept[1] < 0.8 * kept[0]


def test_another_process_draws_the_same(share_run):
    batches = recall_batches(RECALL_LENGTHS[:1], ASKED)
    again = run_ours(batches, ANSWER, {"tau": TAU}, **CPU, **FINE_LOGITS)
    assert again.batches[0] == share_run.batches[0]  # logprobs too
    assert again.skips[0] == share_run.skips[0]


def test_a_scan_of_codes_reads_as_much_and_answers_alike(share_run):
    """With prompts cut into steps and one that the prefix cache has, and across pages that decode
    completes; in pages of 128 tokens."""
    batches = recall_batches(RECALL_LENGTHS, ASKED)
    steps = {"max_num_batched_tokens": 512, "max_num_seqs": 6, "block_size": 128}
    options = {"tau": TAU, "scan": "int4"}
    run = run_ours([*batches, batches[1]], ANSWER, options, **CPU, **FINE_LOGITS, **steps)
    references = [*share_run.batches, share_run.batches[1]]
    for length, ours, theirs in zip(
        (*RECALL_LENGTHS, RECALL_LENGTHS[1]), run.batches, references, strict=True
    ):
        check_codes(ours, questions(length, ASKED))
        for answer, reference in zip(ours, theirs, strict=True):
            check_same_answer(answer, reference)
    for counts, of_base in zip(run.skips, share_run.skips, strict=False):
        assert 0 < counts["drawn_blocks"]
        kept = counts["kept_blocks"] / counts["total_blocks"]
        assert kept == pytest.approx(of_base["kept_blocks"] / of_base["total_blocks"], rel=0.1)
    assert "FFA_FP8FP8 scans keys of 4 bits, which take 72 of 585 bytes" in run.log


def test_the_log_names_rule_and_value(share_run):
    assert f"FFA_FP8FP8 options: rule=share, tau={TAU}, " in share_run.log
    assert ", delta=" not in share_run.log


def test_dense_layers_and_short_requests_draw_nothing():
    options = {"tau": 0.2, "dense_layers": [0, -1], "block_size": 32, "min_context": 1500}
    batches = [[source_prompt(1400)], [source_prompt(1600, start=20_000)]]
    run = run_ours(batches, CONTINUE, options, **CPU)
    short, long = run.skips
    assert short["short_blocks"] > 0 == short["total_blocks"] == short["drawn_blocks"]
    assert short["tokens"] == 0 == short["left_mass"]
    for layer in long["layers"]:
        is_dense = layer["layer"] in (0, LAYERS - 1)
        assert (layer["kept_blocks"] == layer["total_blocks"]) == is_dense
        assert (layer["drawn_blocks"] == 0) == (layer["left_mass"] == 0) == is_dense


TOKENS, LAST, WINDOWS = 1200, 4, 2


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    text = folder / "source.py"
    text.write_text(tokenizer().decode(source_tokens()[: WINDOWS * TOKENS + 200]))
    files = [folder / "my.yaml", folder / "my.json"]
    arguments = ["--text", text, "--tokens", TOKENS, "--windows", WINDOWS, "--last", LAST]
    arguments += ["--kept", 0.2, "--out", files[0], "--json", files[1]]
    assert cli.main(["calibrate", "--model", str(MODEL), *map(str, arguments)]) == 0
    return files


def test_calibrate_finds_what_keeps_as_much(calibrated):
    file, figures = calibrated
    config = FFAConfig.load(str(file))
    default, *values = json.loads(figures.read_text())["settings"]
    assert default["backend"] == "CPU_ATTN" and default["kl_max"] == 0.0
    assert {found["backend"] for found in values} == {"FFA_FP8FP8"}
    (best,) = (found for found in values if found["options"]["tau"] == config.tau)
    assert best["kept"] == pytest.approx(0.2, rel=0.1)
    for name, rises in (("kept", True), ("left", False), ("kl_mean", False)):
        ends = [values[place][name] for place in (0, -1)]
        assert (ends[0] < ends[1]) == rises, name


def test_calibrate_measures_what_skipping_changes(calibrated):
    _, *values = json.loads(calibrated[1].read_text())["settings"]
    for careless, careful in zip(values, values[1:], strict=False):
        errors = [found["error_by_layer"] for found in (careless, careful)]
        assert len(errors[0]) == len(errors[1]) == LAYERS
        assert all(0 < less < more < 1 for more, less in zip(*errors, strict=True))
