"""`ffa-fp8fp8 calibrate`: what it refuses before an engine starts, and what it keeps."""

import json
from pathlib import Path

import pytest

from vllm_ffa_fp8fp8.attention.stats import SUMS
from vllm_ffa_fp8fp8.bench.quality.calibration import find_limit
from vllm_ffa_fp8fp8.bench.quality.search import SCALES, Wish, search
from vllm_ffa_fp8fp8.commands import calibrate, cli
from vllm_ffa_fp8fp8.config import FFAConfig

MODEL = str(Path(__file__).parents[1] / "assets" / "recall-9m")
COUNTS = dict.fromkeys((*SUMS, "most_left_mass"), 0) | {"layer": 0, "squares": [1.0, 4.0]}


@pytest.fixture(autouse=True)
def without_presets(monkeypatch):
    monkeypatch.delenv("FFA_FP8FP8_CONFIG", raising=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """About 3,000 tokens."""
    file = tmp_path_factory.mktemp("calibrate") / "text.txt"
    file.write_text("".join(f"def name_{n}(value):\n    return value + {n}\n" for n in range(200)))
    return str(file)


def told(capsys, text, *arguments):
    """Exit code and what is said."""
    words = ["--model", MODEL, "--text", text, "--windows", "2", "--tokens", "1400"]
    code = cli.main(["calibrate", *words, *map(str, arguments)])
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--kl", "0"], "--kl is above 0"),
        (["--kl", "nan"], "--kl is above 0"),
        (["--kept", "1"], "--kept is a fraction between 0 and 1"),
        (["--kl", "0.01", "--tokens", "8000"], "is too short:"),
        (["--kl", "0.01", "--tokens", "40000"], "the model has 32,768 positions"),
        (["--kl", "0.01", "--tokens", "60"], "--last 64 of them are judged"),
        (["--kl", "0.01", "--tokens", "1050"], "and min_context is 1,024"),
        (["--kl", "0.01", "--last", "0"], "--last is 1 or more"),
        (["--kl", "0.01", "--windows", "0"], "each text needs one"),
        (["--kl", "0.01", "--out", "my.json"], "files named .yaml"),
        (["--kl", "0.01", "--out", "TEXT/my.yaml"], "cannot be a folder"),
        (["--kl", "0.01", "--setting", "dleta=4"], "did you mean 'delta'"),
        (
            ["--kl", "0.01", "--setting", "delta=4", "--rule", "share"],
            "belongs to rule 'threshold'",
        ),
        (["--kl", "0.01", "--engine-args", "model=x"], "model: calibrate sets that itself"),
        (["--kl", "0.01", "--text", "none.txt"], "none.txt cannot be read"),
        (["--kl", "0.01", "--model", "FOLDER"], "is neither a model's folder nor a model"),
    ],
)
def test_bad_input_is_refused_before_an_engine_starts(
    monkeypatch, capsys, tmp_path, text, arguments, says
):
    monkeypatch.setattr(calibrate, "watch", None)
    words = [a.replace("TEXT", text).replace("FOLDER", str(tmp_path)) for a in arguments]
    code, out = told(capsys, text, *words)
    assert code == 2 and says in out


def test_one_wish_is_needed(capsys, text):
    for wishes in ([], ["--kl", "0.1", "--kept", "0.1"]):
        with pytest.raises(SystemExit):
            told(capsys, text, *wishes)


def kl(care):
    return 4e-4 + 0.1 * 2.0**-care


def pretend(monkeypatch, problem=None, failing=None):
    """Engines whose KL falls with care, and which keep an eighth."""
    jobs = []

    def watch(screen, name, job, work):
        jobs.append(job)
        if len(jobs) == failing:
            return None
        texts = [{"figures": [[0.0, 1.0, 2.0]] * job["last"], "layers": []} for _ in job["texts"]]
        if work is not find_limit:
            return {"problem": problem} if problem else {"backend": "D", "runs": [texts]}
        scale, found = SCALES[job["options"]["rule"]], {}
        layers = [COUNTS | {"kept_blocks": 1, "total_blocks": 8}]

        def measure(care):
            figures = [[kl(care), 1.0, 2.0]] * job["last"]
            found[scale.limit(care)] = [{"figures": figures, "layers": layers} for _ in texts]
            return kl(care)

        best = scale.limit(search(measure, Wish(*job["wish"]), scale))
        limits, runs = list(found), list(found.values())
        return {"backend": "F", "limits": limits, "runs": runs, "best": best}

    monkeypatch.setattr(calibrate, "watch", watch)
    return jobs


@pytest.mark.parametrize(
    "words, rule, others",
    [
        ([], "share", {}),
        (["--setting", "block_size=64,v_cache_dtype=fp8", "--rule", "share"], "share",
         {"block_size": 64, "v_cache_dtype": "fp8"}),
        (["--setting", "rule=share,min_context=2000", "--tokens", "2200"], "share",
         {"min_context": 2000}),
        (["--setting", "delta=5,dense_layers=[0]"], "threshold", {"dense_layers": [0]}),
        (["--rule", "threshold"], "threshold", {}),
    ],
)  # fmt: skip
def test_what_is_found_is_a_preset(monkeypatch, capsys, tmp_path, text, words, rule, others):
    jobs = pretend(monkeypatch)
    file, figures = tmp_path / "new" / "my.yaml", tmp_path / "my.json"
    code, out = told(capsys, text, "--kl", 0.003, "--out", file, "--json", figures, *words)
    assert code == 0 and f"FFA_FP8FP8_CONFIG={file}" in out
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", str(file))
    config = FFAConfig.load()
    assert config == FFAConfig.load("balanced", {"rule": rule} | others | {
        SCALES[rule].option: config.limit})  # fmt: skip
    assert jobs[0]["check"] == [jobs[1]["options"]] and jobs[1]["options"]["rule"] == rule
    entries = json.loads(figures.read_text())["settings"]
    assert entries[0]["name"] == "default" and len(entries) >= 4
    (best,) = (found for found in entries if found["options"] == config.to_dict())
    assert best["kl_mean"] == pytest.approx(0.003, rel=0.1) and best["error_by_layer"] == [0.5]
    kls = [found["kl_mean"] for found in entries[1:]]
    assert kls == sorted(kls, reverse=True)
    said = file.read_text()
    for line in (MODEL, text, "2 windows of", "Kept: 0.125", f"mean: {best['kl_mean']:.2e}"):
        assert line in said
    assert f"| {best['name']}" in out and "| 0     | 0.500" in out


def test_without_a_file_the_preset_is_shown(monkeypatch, capsys, text):
    pretend(monkeypatch)
    code, out = told(capsys, text, "--kl", 0.003)
    assert code == 0 and "rule: share\n" in out and "\ntau: 0.0" in out


def test_a_wish_out_of_reach_is_told(monkeypatch, capsys, tmp_path, text):
    pretend(monkeypatch)
    code, out = told(capsys, text, "--kl", 1e-5, "--out", tmp_path / "my.yaml")
    assert code == 1 and "KL 1e-05 is out of reach: reading nearly everything" in out
    assert "KL 4.0e-04" in out and not list(tmp_path.iterdir())


def test_a_model_that_cannot_run_and_engines_that_fail(monkeypatch, capsys, tmp_path, text):
    pretend(monkeypatch, problem="FFA_FP8FP8 does not support that")
    assert told(capsys, text, "--kl", 0.1) == (2, "FFA_FP8FP8 does not support that\n")
    for failing in (1, 2):
        pretend(monkeypatch, failing=failing)
        assert told(capsys, text, "--kl", 0.1, "--out", tmp_path / "my.yaml")[0] == 1
    assert not list(tmp_path.iterdir())
