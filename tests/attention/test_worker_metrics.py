"""From a worker's counters to series, those of several workers, and what the log says of them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_ffa_fp8fp8.attention import worker_metrics
from vllm_ffa_fp8fp8.attention.worker_metrics import WorkerMetrics, block_bytes
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.integration import metric_files
from vllm_ffa_fp8fp8.integration.stat_logger import summary
from vllm_ffa_fp8fp8.kernels import PageLayout
from vllm_ffa_fp8fp8.kernels.counters import SHARE_UNITS

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = 16
ROW = (3, 10, 4, 1, SHARE_UNITS // 2, SHARE_UNITS // 8, 2)


def make_metrics(directory, rule="share", engine=0, num_layers=2):
    config = FFAConfig(rule=rule)
    layout = PageLayout(64, torch.bfloat16, fp8_value=True)
    impls = [
        SimpleNamespace(counters=torch.zeros(2, 7, dtype=torch.int64), layout=layout, config=config)
        for _ in range(num_layers)
    ]
    file = metric_files.MetricFile(str(directory), ("model", str(engine)))
    return WorkerMetrics(impls, BLOCK, file), [impl.counters for impl in impls]


def totals(directory, engine=0):
    found = metric_files.totals(str(directory), engine)
    return {name.removeprefix("vllm:ffa_"): value for name, value in found.items()}


def test_series_are_what_was_counted(tmp_path):
    metrics, (first, second) = make_metrics(tmp_path)
    metrics.flush()
    assert totals(tmp_path) == {}
    first[0] = second[1] = torch.tensor(ROW)
    metrics.flush()
    full, base, dense = 64 * 3 + 2, 64 + 1, 64 * 4
    expected = {
        "kept_blocks": 6,
        "total_blocks": 20,
        "short_blocks": 8,
        "read_bytes": 2 * BLOCK * ((3 + 4) * full + 7 * base),
        "dense_bytes": 2 * BLOCK * 14 * dense,
        "skipped_mass": 1.0,
        "pruned_queries": 4,
    }
    assert totals(tmp_path) == expected
    metrics.flush()
    assert totals(tmp_path) == expected  # each count once
    second[1] += 1
    metrics.flush(resets=True)
    for counters in (first, second):
        counters.zero_()  # as ffa_skip_stats does
    first[0] = torch.tensor(ROW) + 5
    metrics.flush()
    assert totals(tmp_path)["total_blocks"] == 21 + 15
    first[0] = -7  # whatever a sleeping engine's memory became
    metrics.flush()
    first[0] += torch.tensor(ROW)
    metrics.flush()
    assert totals(tmp_path)["total_blocks"] == 21 + 15 + 10


def test_by_threshold_no_mass_is_shown(tmp_path):
    metrics, (counters,) = make_metrics(tmp_path, "threshold", num_layers=1)
    counters[0] = torch.tensor(ROW)
    metrics.flush()
    assert "skipped_mass" not in totals(tmp_path)


def test_workers_sum_up_and_engines_do_not(tmp_path, monkeypatch):
    for process, engine in ((7, 0), (8, 0), (9, 1)):
        monkeypatch.setattr(metric_files.os, "getpid", lambda process=process: process)
        metrics, (counters,) = make_metrics(tmp_path, engine=engine, num_layers=1)
        counters[0] = torch.tensor(ROW)
        metrics.flush()
    assert totals(tmp_path)["total_blocks"] == 20
    assert totals(tmp_path, engine=1)["total_blocks"] == 10


def test_counters_are_copied_at_intervals_and_written_later(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(worker_metrics.time, "monotonic", lambda: clock[0])
    metrics, (counters,) = make_metrics(tmp_path, num_layers=1)
    counters[0] = torch.tensor(ROW)
    for seconds, seen in ((1.9, False), (0.1, False), (1.9, False), (0.1, True)):
        clock[0] += seconds
        metrics.tick()
        assert bool(totals(tmp_path)) == seen


def test_bytes_of_a_16_bit_cache_are_all_read():
    impl = SimpleNamespace(layout=PageLayout(128, torch.float16, fp8_key=False, residual=False))
    assert block_bytes(impl) == (512, 256, 512)


def test_a_new_engine_in_the_process_takes_over(tmp_path, monkeypatch):
    monkeypatch.setenv("FFA_FP8FP8_METRICS_DIR", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(worker_metrics, "_metrics", None)
    idle = []
    monkeypatch.setattr(worker_metrics.worker_steps, "when_idle", idle)
    config = SimpleNamespace(
        model_config=SimpleNamespace(served_model_name="model"),
        parallel_config=SimpleNamespace(data_parallel_index=0),
    )
    for engine in range(2):
        metrics, _ = make_metrics(tmp_path / "..", num_layers=1)
        impls = [
            SimpleNamespace(
                counters=metrics.counters[0],
                layout=PageLayout(64, torch.bfloat16),
                config=FFAConfig(),
            )
        ]
        monkeypatch.setattr(worker_metrics, "layer_impls", lambda config, impls=impls: impls)
        for _ in range(2):  # two metadata builders
            worker_metrics.start(config, BLOCK)
        assert len(idle) == 1
        impls[0].counters[0] = torch.tensor(ROW)
        worker_metrics.flush()
        assert totals(tmp_path)["total_blocks"] == 10 * (engine + 1)


@pytest.mark.parametrize("counts, text", [
    ({}, ""),
    (
        {"short_blocks": 5, "read_bytes": 2e9, "dense_bytes": 2e9},
        "read: 2.00 GB of the cache, 100.0% of 16-bit dense",
    ),
    (
        {"kept_blocks": 1, "total_blocks": 8, "read_bytes": 1.5e8, "dense_bytes": 6e8,
         "skipped_mass": 0.5, "pruned_queries": 20},
        "kept: 12.5%, read: 0.15 GB of the cache, 25.0% of 16-bit dense, skipped mass: 2.50%",
    ),
])  # fmt: skip
def test_summary(counts, text):
    assert summary({f"vllm:ffa_{name}": count for name, count in counts.items()}) == text


def test_page_and_dashboard_name_every_series_and_no_other():
    names = {*metric_files.COUNTERS, metric_files.SHORT_REQUESTS}
    page = (DOCS / "metrics.md").read_text()
    assert names == set(re.findall(r"^\| `(vllm:ffa_\w+)` \|", page, re.MULTILINE))
    dashboard = json.loads((DOCS / "grafana-dashboard.json").read_text())
    panels = "\n".join(t["expr"] for panel in dashboard["panels"] for t in panel["targets"])
    variables = [variable.get("definition", "") for variable in dashboard["templating"]["list"]]
    examples = re.findall(r"`(sum by[^`]+)`", page)
    shown = set(re.findall(r"vllm:ffa_\w+", panels))
    assert shown == {f"{name}_total" for name in names - {"vllm:ffa_short_blocks"}}
    named = set(re.findall(r"vllm:ffa_\w+", "\n".join(variables + examples)))
    assert named <= {f"{name}_total" for name in names}
