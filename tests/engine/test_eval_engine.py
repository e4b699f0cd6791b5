"""`ffa-fp8fp8 eval` in miniature: three engines, the last of which drops what it must not."""

import json

import pytest
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.commands import cli, eval
from vllm_ffa_fp8fp8.commands.eval_engine import evaluate

BROKEN = "delta=0"
OVER_ANCHORS = 40.0
"""Log2 units: no block but the first and newest scores so high."""


def evaluate_or_break(job, tell):
    """`evaluate`, for the setting BROKEN with a threshold that no option can ask for."""
    options = job["llm"].get("additional_config", {}).get("ffa_fp8fp8", {})
    if options.get("delta") == 0:
        from vllm_ffa_fp8fp8.attention.metadata import FFAFP8FP8MetadataBuilder

        build = FFAFP8FP8MetadataBuilder.build

        def build_over_anchors(self, *arguments, **named):
            self.delta.fill_(-OVER_ANCHORS)
            return build(self, *arguments, **named)

        FFAFP8FP8MetadataBuilder.build = build_over_anchors
    return evaluate(job, tell)


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")
def test_tasks_score_settings_and_a_broken_backend_loses(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(eval, "evaluate", evaluate_or_break)
    monkeypatch.delenv("FFA_FP8FP8_CONFIG", raising=False)
    file = tmp_path / "eval.json"
    arguments = ["--tasks", "ffa_retrieval", "ffa_loss_source", "--lengths", "1600", "--limit", "4"]
    settings = ["--setting", "balanced", BROKEN]
    assert cli.main(["eval", *arguments, *settings, "--json", str(file)]) == 0
    default, balanced, broken = json.loads(file.read_text())["settings"]
    assert [entry["backend"] for entry in (default, balanced)] == ["CPU_ATTN", "FFA_FP8FP8"]
    answers, losses = zip(*(entry["results"] for entry in (default, balanced, broken)), strict=True)
    assert answers[0]["documents"] == 4 and answers[0]["score"] >= 3 / 4
    assert answers[1]["score"] == answers[0]["score"]
    assert answers[2]["difference"] <= -0.5
    assert answers[2]["kept"] < answers[1]["kept"] < 1
    assert answers[0]["kept"] is None
    for loss in losses:  # read in prefill
        assert loss["kept"] is None and 1 < loss["score"] < 4
        assert abs(loss["difference"]) < 0.01
    assert "nats a token" in capsys.readouterr().out
