"""How workers' figures reach `/metrics`: each worker writes a file of prometheus_client's for
several processes, and the process that serves `/metrics` adds them up when it is asked."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vllm_ffa_fp8fp8 import envs

COUNTERS = {
    "vllm:ffa_kept_blocks": "Blocks of the KV cache that decode read in full, once a layer and KV "
    "head, of requests that may be pruned.",
    "vllm:ffa_total_blocks": "All blocks of these requests.",
    "vllm:ffa_short_blocks": "Blocks of requests below min_context, which are all read.",
    "vllm:ffa_read_bytes": "Bytes of the KV cache that decode read.",
    "vllm:ffa_dense_bytes": "Bytes that the same steps read of a 16-bit cache without pruning.",
    "vllm:ffa_skipped_mass": "By share: the part of the softmax that was left to the draw, summed "
    "up over vllm:ffa_pruned_queries.",
    "vllm:ffa_pruned_queries": "Query tokens, once a layer and KV head, of requests that may be "
    "pruned.",
}
"""Counters of workers. The page of them is docs/metrics.md."""

SHORT_REQUESTS = "vllm:ffa_short_requests"
LABELS = ("model_name", "engine")


def labels_of(vllm_config, engine: int) -> tuple[str, str]:
    """Values of LABELS, as vLLM's own series have them."""
    return vllm_config.model_config.served_model_name, str(engine)


def share_directory() -> None:
    """Makes the directory of an engine's files, which processes that are started from here on
    inherit; several API servers have one already."""
    if envs.prometheus_directory() is not None:
        return
    directory = tempfile.mkdtemp(prefix=f"ffa_fp8fp8_metrics_{os.getpid()}_")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ[envs.METRICS_VARIABLE] = directory


def directory() -> str | None:
    """Where this process's files are, None where no process of this host reads them."""
    found = envs.prometheus_directory() or envs.metrics_directory()
    return found if found and os.path.isdir(found) else None


class MetricFile:
    """What this process counts, each counter by its name in COUNTERS."""

    def __init__(self, directory: str, labels: tuple[str, str]):
        from prometheus_client.mmap_dict import MmapedDict

        # a file of its own: prometheus_client may write counter_PID.db
        self.file = MmapedDict(str(Path(directory, f"counter_ffa-{os.getpid()}.db")))
        self.labels = labels

    def add(self, counts: Mapping[str, float]) -> None:
        from prometheus_client.mmap_dict import mmap_key

        for name, count in counts.items():
            key = mmap_key(name, f"{name}_total", LABELS, self.labels, COUNTERS[name])
            value, _ = self.file.read_value(key)
            self.file.write_value(key, value + count, 0.0)


def totals(directory: str, engine: int) -> dict[str, float]:
    """All workers' counters of an engine, by name."""
    from prometheus_client.multiprocess import MultiProcessCollector

    return {
        metric.name: sample.value
        for metric in MultiProcessCollector(None, directory).collect()
        for sample in metric.samples
        if metric.name in COUNTERS and sample.labels["engine"] == str(engine)
    }
