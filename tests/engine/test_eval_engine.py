"""`ffa-fp8fp8 eval` in miniature: the default backend and a setting that loses answers."""

import json

import pytest
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.commands import cli


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_a_coarse_setting_loses_answers(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("FFA_FP8FP8_CONFIG", raising=False)
    file = tmp_path / "eval.json"
    arguments = ["--tasks", "ffa_majority", "ffa_loss_source", "--lengths", "2000", "--texts", "4"]
    assert cli.main(["eval", *arguments, "--tau", "0.5", "--json", str(file)]) == 0
    default, coarse = json.loads(file.read_text())["settings"]
    assert [entry["backend"] for entry in (default, coarse)] == ["CPU_ATTN", "FFA_FP8FP8"]
    parts = (entry["results"] for entry in (default, coarse))
    answers, losses = zip(*parts, strict=True)
    assert answers[0]["documents"] == 16 and answers[0]["score"] >= 14 / 16
    assert answers[1]["score"] <= answers[0]["score"] - 3 / 16
    assert answers[1]["kept"] < 0.1
    assert answers[0]["kept"] is None
    for loss in losses:  # read in prefill
        assert loss["kept"] is None and 1 < loss["score"] < 4
        assert abs(loss["difference"]) < 0.01
    assert "nats a token" in capsys.readouterr().out
