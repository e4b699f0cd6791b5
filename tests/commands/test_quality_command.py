"""`ffa-fp8fp8 quality`: what it refuses before an engine starts, and what it does if one fails."""

import json
from pathlib import Path

import pytest

from vllm_ffa_fp8fp8.attention.stats import SUMS
from vllm_ffa_fp8fp8.commands import cli, quality
from vllm_ffa_fp8fp8.commands.engine_options import engine_arguments

MODEL = str(Path(__file__).parents[1] / "assets" / "recall-9m")


@pytest.fixture(autouse=True)
def without_presets(monkeypatch):
    monkeypatch.delenv("FFA_FP8FP8_CONFIG", raising=False)


@pytest.fixture
def text(tmp_path):
    """About 1,500 tokens."""
    file = tmp_path / "text.txt"
    file.write_text("".join(f"def name_{n}(value):\n    return value + {n}\n" for n in range(100)))
    return str(file)


def told(capsys, *arguments):
    """Exit code and what is said."""
    code = cli.main(["quality", "--model", MODEL, *arguments])
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "--text FILE or --prompts FILE"),
        (["--text", "none.txt"], "none.txt cannot be read: No such file"),
        (["--text", "TEXT", "--tokens", "100000"], "tokens, and --tokens asks for 100,000"),
        (["--text", "TEXT", "--tokens", "0"], "--tokens is 1 or more, not 0"),
        (["--text", "TEXT", "--last", "0"], "--last is 1 or more, not 0"),
        (["--text", "TEXT", "--tokens", "129"], "129 tokens, of which --last 128 are judged"),
        (["--text", "TEXT", "--tokens", "1100"], "begin after 972, and min_context is 1,024"),
        (["--text", "TEXT", "--tokens", "1100"], "such as --setting balanced,min_context=0"),
        (["--text", "TEXT", "--engine-args", "dtype"], "KEY=VALUE, such as dtype=float16"),
        (["--text", "TEXT", "--engine-args", "model=x"], "model: quality sets that itself"),
        (["--text", "TEXT", "--json", "FOLDER"], "is a folder: --json takes a file"),
        (["--text", "TEXT", "--json", "TEXT/q.json"], "cannot be a folder for figures"),
        (["--text", "TEXT", "--model", "FOLDER"], "is neither a model's folder nor a model"),
    ],
)
def test_bad_input_is_refused_before_an_engine_starts(
    monkeypatch, capsys, tmp_path, text, arguments, says
):
    monkeypatch.setattr(quality, "watch", None)
    words = [a.replace("TEXT", text).replace("FOLDER", str(tmp_path)) for a in arguments]
    code, out = told(capsys, *words)
    assert code == 2 and says in out


def test_a_text_longer_than_the_model_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(quality, "watch", None)
    (tmp_path / "long.txt").write_text("word " * 40_000)
    code, out = told(capsys, "--text", str(tmp_path / "long.txt"))
    assert code == 2 and "the model 32,768 positions: cut it with --tokens 32768 or less" in out


def test_engine_arguments():
    pairs = ["--tensor-parallel-size=2", "dtype=float16", "hf_overrides={head_dtype: float32}"]
    assert engine_arguments(pairs, "quality") == {
        "tensor_parallel_size": 2,
        "dtype": "float16",
        "hf_overrides": {"head_dtype": "float32"},
    }


def answer(job):
    """What an engine finds: a divergence of a tenth of the number of runs before it."""
    plain = dict.fromkeys((*SUMS, "most_left_mass"), 0) | {"squares": None}
    counts = plain | {"layer": 0, "kept_blocks": 1, "total_blocks": 4}
    layers = [counts] if job["options"] else []
    texts = [
        [{"figures": [[n / 10, 1.0, 2.0]] * job["last"], "layers": layers} for _ in job["texts"]]
        for n, _ in enumerate(job["runs"])
    ]
    return {"backend": "SOME", "runs": texts}


def pretend(monkeypatch, failing=(), problem=None):
    """Engines that answer, except those that fail."""

    def watch(screen, name, job, work):
        if problem:
            return {"problem": problem}
        return None if name in failing else answer(job)

    monkeypatch.setattr(quality, "watch", watch)


def test_what_was_judged_is_kept_and_shown(monkeypatch, capsys, tmp_path, text):
    pretend(monkeypatch)
    file = tmp_path / "new" / "q.json"
    arguments = ["--text", text, "--last", "4", "--delta", "5", "2", "--json", str(file), "--floor"]
    code, out = told(capsys, *arguments)
    assert code == 0 and str(file) in out
    content = json.loads(file.read_text())
    names = ["default", "default, batch of 4", "delta=5", "delta=2"]
    assert [found["name"] for found in content["settings"]] == names
    assert [found["kl_mean"] for found in content["settings"]] == pytest.approx([0, 0.1, 0, 0.1])
    assert content["environment"].keys() >= {"gpu", "torch", "triton", "vllm", "python"}
    assert content["benchmark"] == "quality" and content["last"] == 4
    for line in ("| default, batch of 4 | 1.000 | 1.00e-01 |", "| 0     | 0.250   | 0.250   |"):
        assert line in out


def test_a_failed_setting_does_not_lose_the_others(monkeypatch, capsys, tmp_path, text):
    pretend(monkeypatch, failing=("exact",))
    file = tmp_path / "q.json"
    arguments = ["--text", text, "--last", "4", "--preset", "exact", "fast", "--json", str(file)]
    code, out = told(capsys, *arguments)
    assert code == 1 and "| fast" in out
    names = [found["name"] for found in json.loads(file.read_text())["settings"]]
    assert names == ["default", "fast"]


def test_without_a_reference_nothing_is_judged(monkeypatch, capsys, tmp_path, text):
    file = tmp_path / "q.json"
    pretend(monkeypatch, failing=("default",))
    assert told(capsys, "--text", text, "--last", "4", "--json", str(file))[0] == 1
    pretend(monkeypatch, problem="FFA_FP8FP8 does not support that")
    code, out = told(capsys, "--text", text, "--last", "4", "--json", str(file))
    assert code == 2 and out == "FFA_FP8FP8 does not support that\n"
    assert not file.exists()
