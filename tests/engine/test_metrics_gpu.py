"""Metrics of an engine with CUDA graphs: what the device counted, once each."""

import pytest
from jobs import ANSWER, GPU, recall_batches
from processes import run_ours

LENGTHS, ASKED = (700, 8192), 4


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"delta": 5.0}, {"tau": 0.03}], ids=str)
def test_metrics_are_what_was_counted_in_graphs(options):
    batches = recall_batches(LENGTHS, ASKED)
    run = run_ours(batches, ANSWER, options | {"metrics": True}, **GPU, disable_log_stats=False)
    assert "FULL" in run.facts["captured_modes"]
    found = {name.removeprefix("vllm:ffa_"): v for name, v in run.facts["metrics"].items()}
    for name in ("kept_blocks", "total_blocks", "short_blocks"):
        assert found[name] == sum(counts[name] for counts in run.skips) > 0
    assert found["short_requests"] == ASKED
    assert 0.25 < found["read_bytes"] / found["dense_bytes"] < 1.01
    left = sum(counts["left_mass"] for counts in run.skips)
    assert ("skipped_mass" in found) == ("tau" in options)
    assert found.get("skipped_mass", 0) == pytest.approx(left, abs=1)  # get_metrics has integers
