"""From the counters on a worker's device to its file of metrics, without waiting for the device."""

import time
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_ffa_fp8fp8.attention.geometry import layer_impls
from vllm_ffa_fp8fp8.integration import metric_files, worker_steps
from vllm_ffa_fp8fp8.kernels.cache.page_layout import PageLayout
from vllm_ffa_fp8fp8.kernels.counters import COUNTERS, SHARE_UNITS

logger = init_logger(f"vllm.{__name__}")

INTERVAL = 2.0
"""Seconds between two copies of the counters."""

_metrics: "WorkerMetrics | None" = None


def start(vllm_config: Any, block_size: int) -> None:
    """Begins to write the metrics of this worker's layers, unless that was begun; a warning where
    nobody on this host reads them."""
    global _metrics
    impls = layer_impls(vllm_config)
    if _metrics is not None:
        if _metrics.counts_in(impls):  # another metadata builder of the same engine
            return
        worker_steps.when_idle.remove(_metrics.flush)
        _metrics = None
    directory = metric_files.directory()
    if directory is None:
        logger.warning_once(
            "FFA_FP8FP8 shows no metrics of this worker: the API server is on another host."
        )
        return
    labels = metric_files.labels_of(vllm_config, vllm_config.parallel_config.data_parallel_index)
    _metrics = WorkerMetrics(impls, block_size, metric_files.MetricFile(directory, labels))
    worker_steps.when_idle.append(_metrics.flush)


def tick() -> None:
    """To be called once a step, or more often."""
    if _metrics is not None:
        _metrics.tick()


def flush(resets: bool = False) -> None:
    """Writes everything that was counted up to here; `resets`: before counters are set to 0."""
    if _metrics is not None:
        _metrics.flush(resets)


class WorkerMetrics:
    """Copies counters every INTERVAL seconds, and writes what the copy before brought."""

    def __init__(self, impls: list[Any], block_size: int, file: metric_files.MetricFile):
        self.counters = [impl.counters for impl in impls]  # int64 [num_kv_heads, len(COUNTERS)]
        rows = [impl for impl in impls for _ in impl.counters]
        self.rule = rows[0].config.rule
        sizes = [[block_size * size for size in block_bytes(impl)] for impl in rows]
        self.bytes = torch.tensor(sizes, device="cpu")
        self.file = file
        on_gpu = self.counters[0].is_cuda
        self.known = torch.zeros(len(rows), len(COUNTERS), dtype=torch.int64, device="cpu")
        self.copied = torch.zeros_like(self.known, pin_memory=on_gpu)
        self.event = torch.cuda.Event() if on_gpu else None
        self.is_pending = False
        self.last_copy = time.monotonic()

    def counts_in(self, impls: list[Any]) -> bool:
        """Whether these are the layers whose counters it reads."""
        counters = [impl.counters for impl in impls]
        return list(map(id, counters)) == list(map(id, self.counters))

    def tick(self) -> None:
        now = time.monotonic()
        if now - self.last_copy < INTERVAL:
            return
        self.last_copy = now
        if self.event is not None:
            if torch.cuda.is_current_stream_capturing():
                return
            if self.is_pending and not self.event.query():
                return
        self._write()
        self._copy()

    def flush(self, resets: bool = False) -> None:
        """Brings everything that was counted; waits for the device, which has nothing to do."""
        if self.is_pending and self.event is not None:
            self.event.synchronize()
        self._write()
        self._copy()
        if self.event is not None:
            self.event.synchronize()
        self._write()
        if resets:
            self.known.zero_()

    def _copy(self) -> None:
        self.copied.copy_(torch.cat(self.counters), non_blocking=True)
        if self.event is not None:
            self.event.record()
        self.is_pending = True

    def _write(self) -> None:
        if not self.is_pending:
            return
        self.is_pending = False
        new = self.copied - self.known
        self.known.copy_(self.copied)
        if (new < 0).any():  # an engine that slept gave up their memory
            return
        if new[:, COUNTERS.index("total")].any() or new[:, COUNTERS.index("short")].any():
            self.file.add(series(new, self.bytes, self.rule))


def series(counts: torch.Tensor, row_bytes: torch.Tensor, rule: str) -> dict[str, float]:
    """Counters of `/metrics` from those of the device, int64 `[rows, len(COUNTERS)]`, a row for
    each layer and KV head, and `block_bytes` of a block of each row."""
    kept, total, short, _, left, _, tokens = counts.unbind(1)
    full, scanned, dense = row_bytes.unbind(1)
    read = (kept + short) * full + (total - kept) * scanned
    found = {
        "kept_blocks": kept.sum(),
        "total_blocks": total.sum(),
        "short_blocks": short.sum(),
        "read_bytes": read.sum(),
        "dense_bytes": ((total + short) * dense).sum(),
        "pruned_queries": tokens.sum(),
    }
    if rule == "share":
        found["skipped_mass"] = left.sum() / SHARE_UNITS
    return {f"vllm:ffa_{name}": float(count) for name, count in found.items()}


def block_bytes(impl: Any) -> tuple[int, int, int]:
    """Bytes of a token and KV head: where its block is kept, where it is skipped, and in a 16-bit
    cache."""
    layout: PageLayout = impl.layout
    scanned = sum(
        plane.bytes_per_token for plane in layout.planes if plane.name in ("key", "key_exponent")
    )
    return layout.bytes_per_token, scanned, 4 * layout.head_size
