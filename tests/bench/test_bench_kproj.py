"""The projection's benchmark without a GPU: what it reuses, its table and refusals."""

import pytest

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench import projection, sweep, timing
from vllm_ffa_fp8fp8.bench.files import read_records
from vllm_ffa_fp8fp8.commands import bench_kproj, cli
from vllm_ffa_fp8fp8.environment import GPU

VERSIONS = {"gpu": "NVIDIA H100", "torch": "2.14.0", "triton": "3.8.0", "vllm": "0.33.0"}


def bench(*arguments) -> int:
    return cli.main(["bench", "kproj", *map(str, arguments)])


@pytest.mark.parametrize(
    "gpu, words",
    [(None, "this machine has none"), (GPU("NVIDIA A100", (8, 0)), "NVIDIA A100 has no FP8")],
)
def test_it_needs_a_gpu_with_fp8(monkeypatch, capsys, gpu, words):
    monkeypatch.setattr(environment, "find_gpu", lambda: gpu)
    assert bench("--batches", "1") == 1
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--vary", "splits=4,depth=2"], "no launch parameter 'depth' in 'depth=2': splits"),
        (["--vary-prefill", "tokens=many"], "'tokens=many' is not name=value with a whole number"),
        (["--batches", "1", "129"], "--batches are 1 to 128 tokens, not 129"),
        (["--prefill", "0"], "--prefill is 1 token or more, not 0"),
        (["--folder", "/dev/null"], "cannot be a folder for figures"),
    ],
)
def test_it_names_what_it_cannot_measure(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(bench_kproj, "missing_gpu", lambda: None)
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().out


@pytest.fixture
def measured(monkeypatch):
    """Steps without a GPU; what is measured is listed."""
    monkeypatch.setattr(bench_kproj, "missing_gpu", lambda: None)
    monkeypatch.setattr(sweep, "environment", lambda: VERSIONS)
    monkeypatch.setattr(timing, "read_bandwidth", lambda: 3e6)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 2e6)
    monkeypatch.setattr(projection, "make_weights", lambda model: None)
    steps = []

    def row(model, tokens, weights, bandwidth, vary):
        steps.append((model, tokens))
        us = {"unfused": 20.0, "linear + kernel": 18.0, "one kernel, default": 16.0}
        us |= {f"one kernel, {text}": 10.0 for text in vary}
        return {"model": model, "tokens": tokens, "floor_us": 5.0, "us": us}

    monkeypatch.setattr(projection, "bench_decode_step", row)
    monkeypatch.setattr(projection, "bench_prefill", row)
    return steps


def test_it_measures_what_no_earlier_run_did(measured, tmp_path, capsys):
    arguments = ["--folder", tmp_path, "--models", "8b", "--prefill"]
    assert bench(*arguments, "--commit", "abc1234", "--batches", "1", "2") == 0
    shown = capsys.readouterr().out
    assert "NVIDIA H100; torch 2.14.0, Triton 3.8.0, vLLM 0.33.0; commit abc1234." in shown
    assert bench(*arguments, "--commit", "def5678", "--batches", "2", "4") == 0
    assert measured == [("8b", 1), ("8b", 2), ("8b", 4)]
    (file,) = tmp_path.iterdir()
    assert file.name == "kproj-nvidia-h100-vllm-0.33.0-triton-3.8.0.json"
    _, records = read_records(file, "kproj")
    commits = {record["tokens"]: record["commit"] for record in records}
    assert commits == {1: "abc1234", 2: "abc1234", 4: "def5678"}
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert (
        "| 8b | decode | 2 | 5.0 | 20.0* | 18.0* | 1.11 | 16.0* | 1.25 | 0.31 | default |" in rows
    )
    assert "| 8b | decode | 4 | 5.0 | 20.0 | 18.0 | 1.11 | 16.0 | 1.25 | 0.31 | default |" in rows
    assert bench(*arguments, "--batches", "2", "--fresh") == 0
    assert measured[3:] == [("8b", 2)]
    assert {r["tokens"] for r in read_records(file, "kproj")[1]} == {1, 2, 4}


def test_launch_parameters_that_were_not_timed_are(measured, tmp_path, capsys):
    arguments = ["--folder", tmp_path, "--models", "8b", "--prefill", "--batches", "1"]
    bench(*arguments)
    bench(*arguments, "--vary", "splits=4")
    bench(*arguments)
    assert len(measured) == 2
    assert "splits=4" in capsys.readouterr().out.splitlines()[-4]
