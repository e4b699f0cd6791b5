"""The judge of settings through real engines: its figures are a model's own, and tell settings
apart."""

import json
import subprocess
import sys

import pytest
from float32 import logprobs
from processes import HERE, MODEL, environment
from prompts import source_tokens, tokenizer
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.bench.quality.engine import make_references
from vllm_ffa_fp8fp8.bench.quality.plan import Texts, plan_engines
from vllm_ffa_fp8fp8.commands import cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build"),
]

TOKENS, LAST, VOCAB_SIZE = 1100, 8, 2048


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    text, file = folder / "source.py", folder / "quality.json"
    text.write_text(tokenizer().decode(source_tokens()[: TOKENS + 100]))
    arguments = ["--text", text, "--tokens", TOKENS, "--last", LAST, "--floor", "--json", file]
    arguments += ["--setting", "delta=40", "delta=0", "--engine-args", "max_num_batched_tokens=512"]
    assert cli.main(["quality", "--model", str(MODEL), *map(str, arguments)]) == 0
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def tokens(report):
    """Those that were judged: a text's tokens are not always those that it was made of."""
    with open(report["text"]) as file:
        return tokenizer().encode(file.read()).ids[:TOKENS]


def test_the_reference_is_the_models_own(report, tokens):
    default, floor = report["settings"][:2]
    truth = logprobs(str(MODEL), tokens[:-LAST], tokens[-LAST:])
    loss = -truth.gather(1, truth.new_tensor(tokens[-LAST:]).long()[:, None]).mean()
    assert default["loss"] == pytest.approx(float(loss), abs=0.03)
    assert default["kl_max"] == 0.0 and default["agree"] == 1.0
    assert 0 < floor["kl_mean"] < 2e-3  # another batch rounds otherwise


def test_settings_are_told_apart(report):
    """Both in one engine, where only delta is set anew."""
    default, floor, careful, careless = report["settings"]
    assert [found["backend"] for found in report["settings"]] == ["CPU_ATTN"] * 2 + [
        "FFA_FP8FP8"
    ] * 2
    assert careful["kept"] == 1.0 and careless["kept"] < 0.3
    assert careful["kl_mean"] < 4 * floor["kl_mean"]
    assert careless["kl_mean"] > 10 * careful["kl_mean"]
    assert abs(careful["loss"] - default["loss"]) < abs(careless["loss"] - default["loss"])
    assert len(careless["kept_by_layer"]) == 4 and len(set(careless["kept_by_layer"])) > 1


def test_the_v2_model_runner_finds_the_same(report, tokens, tmp_path):
    """It is what GPUs use."""
    texts = Texts(["source"], [tokens])
    llm = {"model": str(MODEL), "max_num_batched_tokens": 512}
    (engine,) = plan_engines([], llm, floor=[4], fp8_cache=False)
    job = engine.job(texts, LAST, str(tmp_path), [])
    make_references(job, VOCAB_SIZE)
    files = [tmp_path / name for name in ("job.json", "result.json")]
    files[0].write_text(json.dumps(job))
    variables = environment(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    process = subprocess.run(
        [sys.executable, HERE / "v2_on_cpu.py", *files],
        env=variables, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    answer = json.loads(files[1].read_text())
    assert answer["steps_of_v2"] > 2 * LAST
    for (text,), found in zip(answer["runs"], report["settings"], strict=False):
        kl, agrees, loss = (sum(column) / LAST for column in zip(*text["figures"], strict=True))
        assert kl == pytest.approx(found["kl_mean"], rel=1e-3, abs=1e-9)
        assert agrees == found["agree"] and loss == pytest.approx(found["loss"], rel=1e-5)
