"""The serving benchmark without an engine: steering, jobs, kept figures, table and refusals."""

import json
import math
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
from vllm_ffa_fp8fp8.commands import cli, engine_process
from vllm_ffa_fp8fp8.environment import GPU

OURS = parse_variant("FFA_FP8FP8={}")
ENVIRONMENT = {"gpu": "NVIDIA H100", "torch": "2.11", "triton": "3.6", "vllm": "0.32.0"}
SETTINGS = Settings("llama-3.1-8b", ((1, 32_000), (8, 32_000)), 0.9, (8, 72), 3, 0.9, on_gpu=True)


def skip_ratio(scale: float, shift: float):
    """A skip ratio that falls with delta; 0.5 at `shift`."""
    return lambda delta: 1 / (1 + math.exp(min(700, (delta - shift) / scale)))


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0])
@pytest.mark.parametrize("shift", [-30.0, -1.0, 0.0, 2.0, 30.0])
def test_steering_knows_no_scale(scale, shift):
    probes = []

    def measure(delta):
        probes.append(delta)
        return skip_ratio(scale, shift * scale)(delta)

    delta, skipped = steer(measure, 0.9)
    assert skipped == pytest.approx(0.9, abs=0.01)
    assert delta in probes and len(probes) <= 17


def test_steering_returns_the_closest_where_steps_are_coarse():
    delta, skipped = steer(lambda delta: 0.85 if delta < -1e-9 else 0.2, 0.9)
    assert skipped == 0.85 and delta < -1e-9
    assert steer(lambda delta: 0.0, 0.9)[1] == 0.0


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
    assert job["counts"] and job["skip"] == 0.9
    assert json.loads(json.dumps(job))["rows"] == [[1, 32_000]]
    fp8 = engine_job(FP8, [(1, 32_000)], SETTINGS, "/model", 128_256)
    assert fp8["llm"]["attention_backend"] == "FLASH_ATTN"
    assert fp8["llm"]["kv_cache_dtype"] == "fp8" and "additional_config" not in fp8["llm"]
    assert not fp8["counts"] and fp8["skip"] is None
    uncounted = engine_job(OURS.uncounted(), [(1, 32_000)], SETTINGS, "/model", 128_256)
    assert not uncounted["counts"] and uncounted["skip"] is None


def answer(ms: float, skip: float | None = None, delta: float | None = None, rows=SETTINGS.rows):
    figures = {"ms": ms, "all_ms": [ms] * 3, "skip": skip, "delta": delta}
    rows = [figures | {"batch": batch, "tokens": tokens} for batch, tokens in rows]
    return {"rows": rows, "backend": "A_BACKEND"}


@pytest.fixture
def results(tmp_path):
    results = Results(tmp_path / "plot" / "serving.json", ENVIRONMENT)
    results.put(OURS, SETTINGS, answer(5.0, 0.903, -1e-12))
    results.put(BF16, SETTINGS, answer(10.0))
    results.put(FP8, SETTINGS, answer(7.5))
    return results


def test_results_are_reused_for_the_same_settings(results):
    again = Results(results.path, ENVIRONMENT)
    assert not again.missing(OURS, SETTINGS) and not again.missing(BF16, SETTINGS)
    steered_elsewhere = Settings(**(vars(SETTINGS) | {"skip": 0.5}))
    assert again.missing(OURS, steered_elsewhere) == list(SETTINGS.rows)
    assert not again.missing(BF16, steered_elsewhere)  # it skips nothing anyhow
    longer = Settings(**(vars(SETTINGS) | {"rows": (*SETTINGS.rows, (1, 120_000))}))
    assert again.missing(OURS, longer) == [(1, 120_000)]
    assert again.missing(parse_variant('FFA_FP8FP8={"min_context": 9}'), SETTINGS)
    assert Results(results.path, ENVIRONMENT, fresh=True).missing(OURS, SETTINGS)
    assert Results(results.path, ENVIRONMENT | {"torch": "2.12"}).missing(OURS, SETTINGS)


def test_results_of_other_timing_code_are_not_reused(results, monkeypatch):
    monkeypatch.setattr(serving, "TIMING_FILES", ("steering.py",))
    again = Results(results.path, ENVIRONMENT)
    assert again.missing(OURS, SETTINGS) and again.missing(BF16, SETTINGS)


@pytest.mark.parametrize("content", ["[1]", '{"environment": {}}', '{"records":'])
def test_damaged_results_are_told(tmp_path, content):
    path = tmp_path / "serving.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="serving.json holds no figures of bench-serving"):
        Results(path, ENVIRONMENT)


def test_results_replace_rows_timed_again(results):
    again = Results(results.path, ENVIRONMENT, fresh=True)
    again.put(BF16, SETTINGS, answer(11.0))
    records = json.loads(results.path.read_text())["records"]
    assert len(records) == 6
    assert {r["ms"] for r in records if r["variant"] == BF16.name} == {11.0}


def test_engines_that_do_not_count_run_at_the_delta_of_their_twin(results):
    rows = list(SETTINGS.rows)
    assert results.deltas(OURS.uncounted(), rows, SETTINGS) == [-1e-12] * 2
    assert results.deltas(OURS, rows, SETTINGS) is None
    assert results.deltas(BF16, rows, SETTINGS) is None
    other = parse_variant("other={}").uncounted()
    with pytest.raises(ValueError, match="twin was not timed"):
        results.deltas(other, rows, SETTINGS)


def test_table_and_notes(results):
    variants = [OURS, *PEERS]
    records = results.of(variants, SETTINGS)
    console = Console(record=True, width=120)
    console.print(as_table(records))
    shown = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "| 8 x 32,000 | FFA_FP8FP8 | 5.00 | 0.903 | 2.00 | 1.50 |" in shown
    assert "| 1 x 32,000 | FLASH_ATTN fp8 | 7.50 | - | 1.33 | 1.00 |" in shown
    assert "earlier runs" not in " ".join(notes(ENVIRONMENT, records, SETTINGS))
    cached = Results(results.path, ENVIRONMENT).of(variants, SETTINGS)
    assert "6 of 6 figures come from earlier runs" in " ".join(notes(ENVIRONMENT, cached, SETTINGS))


def test_models_are_whole(tmp_path):
    for name in MODELS:
        config = write_model(name, tmp_path, num_hidden_layers=1)
        assert json.loads((tmp_path / "config.json").read_text()) == config
        assert config["num_hidden_layers"] == 1


def bench(*arguments) -> int:
    return cli.main(["bench-serving", *map(str, arguments)])


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
        (["--rows", "1x500", "--skip", "1"], "from 0 to below 1"),
        (["--rows", "1x500", "--repeats", "0"], "--repeats is 1 or more, not 0"),
        (["--rows", "1x500", "--layers", "0"], "--layers is 1 or more, not 0"),
        (["--rows", "1x500", "--memory", "3"], "--memory is a part above 0 and up to 1, not 3.0"),
        (["--rows", "1x500", "--ffa", "x=1"], "must be a mapping"),
        (["--rows", "1x500", "--ffa", "x=null"], "must be a mapping"),
        (["--rows", "1x500", "--ffa", "={}"], "it has no name"),
        (["--rows", "1x500", "--folder", "/dev/null"], "cannot be a folder for figures"),
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
        return answer(5.0, 0.9, -1.0, job["rows"]) if name == "FFA_FP8FP8" else None

    monkeypatch.setattr(engine_process, "watch", watch)
    arguments = ["--rows", "1x512", "8x512", "--uncounted", "--folder", tmp_path]
    assert bench(*arguments) == 1
    shown = capsys.readouterr().out
    assert "8 x 512" in shown and "5.00" in shown
    assert len(jobs) == 4 and jobs[1]["deltas"] == [-1.0, -1.0]
    assert (tmp_path / "serving-nvidia-h100-llama-3.1-8b.json").is_file()
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
        yield "result", answer(5.0, 0.9, -1.0, job["rows"])

    monkeypatch.setattr(engine_process, "run_engine", run_engine)
    arguments = ["--rows", "1x512", "--ffa", "a[bold]={}", "--uncounted", "--no-peers"]
    assert bench(*arguments, "--folder", tmp_path) == 1
    shown = capsys.readouterr().out
    assert "a[bold]: timing [red]" in shown and "[/a log]" in shown
    assert "a[bold], not counting failed: a [/wrong] shape" in shown
    assert "| a[bold] |" in " ".join(shown.split())
    bench(*arguments, "--folder", tmp_path)
    assert "a[bold]: timed by an earlier run" in capsys.readouterr().out
