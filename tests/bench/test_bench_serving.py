"""The serving benchmark without an engine: steering, jobs, kept figures, table and refusals."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench import serving
from vllm_ffa_fp8fp8.bench.model_shapes import MODELS, write_model
from vllm_ffa_fp8fp8.bench.serving import (
    BF16,
    FP8,
    PEERS,
    Results,
    Settings,
    as_table,
    engine_job,
    notes,
    parse_variant,
)
from vllm_ffa_fp8fp8.bench.steering import steer
from vllm_ffa_fp8fp8.commands import bench_serving, cli, engine_process
from vllm_ffa_fp8fp8.environment import GPU

OURS = parse_variant("FFA_FP8FP8={}")
ENVIRONMENT = {"gpu": "NVIDIA H100", "torch": "2.11", "triton": "3.6", "vllm": "0.32.0"}
SETTINGS = Settings("llama-3.1-8b", ((1, 32_000), (8, 32_000)), 0.1, (8, 72), 3, 0.9, on_gpu=True)


def kept_fraction(scale: float, shift: float):
    """A kept fraction that falls with the threshold; 0.5 at `shift`."""
    return lambda threshold: 1 / (1 + math.exp(min(700, (threshold - shift) / scale)))


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0])
@pytest.mark.parametrize("shift", [-30.0, -1.0, 0.0, 2.0, 30.0])
def test_steering_knows_no_scale(scale, shift):
    probes = []

    def measure(threshold):
        probes.append(threshold)
        return kept_fraction(scale, shift * scale)(threshold)

    threshold, kept = steer(measure, 0.1)
    assert kept == pytest.approx(0.1, abs=0.01)
    assert threshold in probes and len(probes) <= 17


def test_steering_returns_the_closest_where_steps_are_coarse():
    threshold, kept = steer(lambda threshold: 0.15 if threshold > 1e-9 else 0.8, 0.1)
    assert kept == 0.15 and threshold > 1e-9
    assert steer(lambda threshold: 1.0, 0.1)[1] == 1.0


def test_variants_are_checked_options():
    variant = parse_variant('plain={"use_fp8_residual": false}')
    assert variant.name == "plain" and variant.counts
    assert variant.options == {"record_skip_ratio": True, "use_fp8_residual": False}
    assert not variant.uncounted().counts
    with pytest.raises(ValueError, match="NAME=JSON"):
        parse_variant("plain")
    with pytest.raises(ValueError, match="use_fp8_residue"):
        parse_variant('plain={"use_fp8_residue": false}')
    with pytest.raises(ValueError, match="must be a mapping"):
        parse_variant("plain=[1]")


def test_engine_job():
    job = engine_job(OURS, [(1, 32_000)], SETTINGS, "/model", 128_256)
    assert job["llm"]["additional_config"] == {"ffa_fp8fp8": {"record_skip_ratio": True}}
    assert job["llm"]["compilation_config"] == {"cudagraph_capture_sizes": [1, 8]}
    assert job["llm"]["max_num_seqs"] == 8 and job["llm"]["load_format"] == "dummy"
    assert job["counts"] and job["kept"] == 0.1
    assert json.loads(json.dumps(job))["rows"] == [[1, 32_000]]
    fp8 = engine_job(FP8, [(1, 32_000)], SETTINGS, "/model", 128_256)
    assert fp8["llm"]["attention_backend"] == "FLASH_ATTN"
    assert fp8["llm"]["kv_cache_dtype"] == "fp8" and "additional_config" not in fp8["llm"]
    assert not fp8["counts"] and fp8["kept"] is None
    two = engine_job(OURS, [(1, 32_000)], replace(SETTINGS, tensor_parallel_size=2), "/model", 9)
    assert (job["llm"]["tensor_parallel_size"], two["llm"]["tensor_parallel_size"]) == (1, 2)
    uncounted = engine_job(OURS.uncounted(), [(1, 32_000)], SETTINGS, "/model", 128_256)
    assert not uncounted["counts"] and uncounted["kept"] is None


def answer(ms: float, kept=None, threshold=None, rows=SETTINGS.rows):
    figures = {"ms": ms, "all_ms": [ms] * 3, "kept": kept, "threshold_over_anchors": threshold}
    rows = [figures | {"batch": batch, "tokens": tokens} for batch, tokens in rows]
    return {"rows": rows, "backend": "A_BACKEND"}


@pytest.fixture
def results(tmp_path):
    results = Results(tmp_path / "plot" / "serving.json", ENVIRONMENT)
    results.put(OURS, SETTINGS, answer(5.0, 0.097, 1e-12))
    results.put(BF16, SETTINGS, answer(10.0))
    results.put(FP8, SETTINGS, answer(7.5))
    return results


def test_results_are_reused_for_the_same_settings(results):
    again = Results(results.path, ENVIRONMENT)
    assert not again.missing(OURS, SETTINGS) and not again.missing(BF16, SETTINGS)
    steered_elsewhere = Settings(**(vars(SETTINGS) | {"kept": 0.5}))
    assert again.missing(OURS, steered_elsewhere) == list(SETTINGS.rows)
    assert not again.missing(BF16, steered_elsewhere)  # it keeps everything anyhow
    longer = Settings(**(vars(SETTINGS) | {"rows": (*SETTINGS.rows, (1, 120_000))}))
    assert again.missing(OURS, longer) == [(1, 120_000)]
    assert again.missing(parse_variant('FFA_FP8FP8={"min_context": 9}'), SETTINGS)
    assert Results(results.path, ENVIRONMENT, fresh=True).missing(OURS, SETTINGS)
    assert Results(results.path, ENVIRONMENT | {"torch": "2.12"}).missing(OURS, SETTINGS)


def test_results_of_other_timing_code_are_not_reused(results, monkeypatch):
    monkeypatch.setattr(serving, "TIMING_FILES", ("steering.py",))
    again = Results(results.path, ENVIRONMENT)
    assert again.missing(OURS, SETTINGS) and again.missing(BF16, SETTINGS)
    again.put(OURS, SETTINGS, answer(4.0, 0.1, 1e-12))
    records = json.loads(results.path.read_text())["figures"]
    assert {r["ms"] for r in records if r["variant"] == OURS.name} == {4.0}


@pytest.mark.parametrize("content", ["[1]", '{"environment": {}}', '{"records":'])
def test_damaged_results_are_told(tmp_path, content):
    path = tmp_path / "serving.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="serving.json holds no figures of serving"):
        Results(path, ENVIRONMENT)


def test_results_replace_rows_timed_again(results):
    again = Results(results.path, ENVIRONMENT, fresh=True)
    again.put(BF16, SETTINGS, answer(11.0))
    records = json.loads(results.path.read_text())["figures"]
    assert len(records) == 6
    assert {r["ms"] for r in records if r["variant"] == BF16.name} == {11.0}


def test_engines_that_do_not_count_run_at_the_threshold_of_their_twin(results):
    rows = list(SETTINGS.rows)
    assert results.thresholds(OURS.uncounted(), rows, SETTINGS) == [1e-12] * 2
    assert results.thresholds(OURS, rows, SETTINGS) is None
    assert results.thresholds(BF16, rows, SETTINGS) is None
    other = parse_variant("other={}").uncounted()
    with pytest.raises(ValueError, match="twin was not timed"):
        results.thresholds(other, rows, SETTINGS)


def test_table_and_notes(results):
    variants = [OURS, *PEERS]
    records = results.of(variants, SETTINGS)
    console = Console(record=True, width=120)
    console.print(as_table(records))
    shown = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "| 8 x 32,000 | FFA_FP8FP8 | 5.00 | 0.10 | 2.00 | 1.50 |" in shown
    assert "| 1 x 32,000 | FLASH_ATTN fp8 | 7.50 | - | 1.33 | 1.00 |" in shown
    assert "earlier runs" not in " ".join(notes(ENVIRONMENT, records, SETTINGS))
    cached = Results(results.path, ENVIRONMENT).of(variants, SETTINGS)
    assert "6 of 6 figures come from earlier runs" in " ".join(notes(ENVIRONMENT, cached, SETTINGS))


@pytest.mark.parametrize("kept, told", [(None, True), (1.0, True), (0.1, False)])
def test_a_run_that_skipped_nothing_says_so(tmp_path, kept, told):
    results = Results(tmp_path / "serving.json", ENVIRONMENT)
    results.put(OURS, SETTINGS, answer(5.0, kept, rows=[(1, 32_000)]))
    shown = " ".join(notes(ENVIRONMENT, results.of([OURS], SETTINGS), SETTINGS))
    assert ("Nothing was skipped by FFA_FP8FP8 at 1 x 32,000" in shown) == told


def test_what_is_suggested_for_a_cpu_can_skip(monkeypatch, capsys):
    monkeypatch.setattr(environment, "find_gpu", lambda: None)
    bench()
    suggested = capsys.readouterr().out.split("--model tiny")[1].split(" tries")[0]
    parser = bench_serving.argparse.ArgumentParser()
    bench_serving.add_arguments(parser)
    options = parser.parse_args(["--model", "tiny", *suggested.split()])
    settings, variants = bench_serving.read_options(options, on_gpu=False)
    assert settings.kept == 0.1 and len(variants) == 1


def test_models_are_whole(tmp_path):
    for name in MODELS:
        config = write_model(name, tmp_path, num_hidden_layers=1)
        assert json.loads((tmp_path / "config.json").read_text()) == config
        assert config["num_hidden_layers"] == 1


def bench(*arguments) -> int:
    return cli.main(["bench", "serving", *map(str, arguments)])


def test_a_large_model_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(environment, "find_gpu", lambda: None)
    assert bench() == 1
    shown = capsys.readouterr().out
    assert "NVIDIA GPU" in shown and "--model tiny" in shown


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--rows", "8"], "BATCHxTOKENS"),
        (["--rows", "1x9000"], "room for 8,120"),
        (["--rows", "1x500", "--steps", "8", "8"], "a small and a larger number"),
        (["--rows", "1x500", "--kept", "0"], "above 0 and up to 1, not 0.0"),
        (["--rows", "1x500", "--repeats", "0"], "--repeats is 1 or more, not 0"),
        (["--rows", "1x500", "-tp", "0"], "--tensor-parallel-size is 1 or more, not 0"),
        (["--rows", "1x500", "--layers", "0"], "--layers is 1 or more, not 0"),
        (["--rows", "1x500", "--memory", "3"], "--memory is a part above 0 and up to 1, not 3.0"),
        (["--rows", "1x500", "--ffa", "x=1"], "must be a mapping"),
        (["--rows", "1x500", "--ffa", "x=null"], "must be a mapping"),
        (["--rows", "1x500", "--ffa", "={}"], "it has no name"),
        (["--rows", "1x500"], "too short for FFA_FP8FP8 to skip anything: min_context is 1,024"),
        (["--rows", "1x1500", "--ffa", 'x={"min_context": 2000}'], "min_context is 2,000"),
        (["--rows", "1x1500", "--folder", "/dev/null"], "cannot be a folder for figures"),
    ],
)
def test_wrong_arguments_are_told(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(engine_process, "watch", None)  # no engine starts
    assert bench("--model", "tiny", *arguments) == 2
    assert words in capsys.readouterr().out


def test_a_failed_engine_leaves_the_figures_of_the_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment, "find_gpu", lambda: GPU("NVIDIA H100", (9, 0)))
    monkeypatch.setattr(environment, "is_cpu_build", lambda: False)
    jobs = []

    def watch(console, name, job, work):
        jobs.append(job)
        return answer(5.0, 0.1, 1.0, job["rows"]) if name == "FFA_FP8FP8" else None

    monkeypatch.setattr(engine_process, "watch", watch)
    arguments = [
        "--rows",
        "1x2048",
        "8x2048",
        "--uncounted",
        "--commit",
        "abc1234",
        "--folder",
        tmp_path,
    ]
    assert bench(*arguments) == 1
    shown = capsys.readouterr().out
    assert "8 x 2,048" in shown and "5.00" in shown
    assert len(jobs) == 4 and jobs[1]["thresholds"] == [1.0, 1.0]
    (file,) = tmp_path.iterdir()
    assert re.fullmatch(r"serving-nvidia-h100-vllm-[\d.]+-triton-.+-llama-3.1-8b.json", file.name)
    assert {r["commit"] for r in json.loads(file.read_text())["figures"]} == {"abc1234"}
    bench(*arguments)
    assert len(jobs) == 7 and "timed by an earlier run" in capsys.readouterr().out


def test_names_and_errors_are_shown_as_they_stand(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment, "find_gpu", lambda: GPU("NVIDIA H100", (9, 0)))
    monkeypatch.setattr(environment, "is_cpu_build", lambda: False)

    def run_engine(job, log, work):
        if not job["counts"]:
            Path(log).write_text("[/a log]")
            raise RuntimeError("a [/wrong] shape")
        yield "phase", "timing [red]"
        yield "result", answer(5.0, 0.1, 1.0, job["rows"])

    monkeypatch.setattr(engine_process, "run_engine", run_engine)
    arguments = ["--rows", "1x2048", "--ffa", "a[bold]={}", "--uncounted", "--no-peers"]
    assert bench(*arguments, "--folder", tmp_path) == 1
    shown = capsys.readouterr().out
    assert "a[bold]: timing [red]" in shown and "[/a log]" in shown
    assert "a[bold], not counting failed: a [/wrong] shape" in shown
    assert "| a[bold] |" in " ".join(shown.split())
    bench(*arguments, "--folder", tmp_path)
    assert "a[bold]: timed by an earlier run" in capsys.readouterr().out
