"""The serving benchmark through a real engine, on the CPU and at a tiny shape."""

import pytest
from vllm.platforms import current_platform

from vllm_ffa_fp8fp8.bench.model_shapes import write_model
from vllm_ffa_fp8fp8.bench.serving import Settings, engine_job, parse_variant
from vllm_ffa_fp8fp8.bench.serving_engine import time_rows
from vllm_ffa_fp8fp8.commands.engine_process import run_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build"),
]


def test_a_row_is_timed_at_the_wanted_kept_fraction(tmp_path):
    settings = Settings("tiny", ((1, 1500),), 0.2, (2, 4), 1, 0.9, on_gpu=False)
    vocab_size = write_model("tiny", tmp_path)["vocab_size"]
    variant = parse_variant('FFA_FP8FP8={"rule": "threshold", "block_size": 16}')
    job = engine_job(variant, list(settings.rows), settings, str(tmp_path), vocab_size)
    *_, (kind, result) = run_engine(job, str(tmp_path / "log"), time_rows)
    assert kind == "result" and result["backend"] == "FFA_FP8FP8"
    (row,) = result["rows"]
    assert (row["batch"], row["tokens"]) == (1, 1500)
    assert row["kept"] == pytest.approx(0.2, abs=0.03)
    assert row["threshold_over_anchors"] > 0  # no delta of the option prunes dummy weights
