"""Figures of FFA_FP8FP8 where vLLM shows its own: `/metrics`, `LLM.get_metrics`, and its log."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_ffa_fp8fp8 import envs
from vllm_ffa_fp8fp8.integration import metric_files

if TYPE_CHECKING:  # every vLLM process of this environment loads this module
    from vllm_ffa_fp8fp8.config import FFAConfig


def report_metrics(is_chosen: Callable[[Any], bool]) -> None:
    """Wraps StatLoggerManager.__init__: an engine that has our backend, with the option `metrics`,
    gets a logger beside vLLM's own.

    Symptom without it: no `vllm:ffa_` series. vLLM's entry point for stat loggers would have every
    engine of this environment keep statistics, with --disable-log-stats, too. Can go when it can
    leave engines alone.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    from vllm_ffa_fp8fp8.config import FFAConfig

    original = StatLoggerManager.__init__
    if getattr(original, "by_ffa_fp8fp8", False):
        return

    @functools.wraps(original)
    def init(self, vllm_config, *args, **kwargs):
        original(self, vllm_config, *args, **kwargs)
        if is_chosen(vllm_config):
            config = FFAConfig.from_vllm_config(vllm_config)
            if config.metrics:
                self.stat_loggers.append(make_logger(vllm_config, config, self.engine_indexes))

    init.by_ffa_fp8fp8 = True
    StatLoggerManager.__init__ = init


def make_logger(vllm_config: Any, config: "FFAConfig", engines: list[int]) -> Any:
    """The logger of `report_metrics`; a class of vLLM's that only engines load."""
    from prometheus_client import REGISTRY, Counter
    from prometheus_client.multiprocess import MultiProcessCollector
    from vllm.logger import init_logger
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase

    logger = init_logger(f"vllm.{__name__}")
    directory = metric_files.directory()

    class Collector(MultiProcessCollector):
        _name = "vllm:ffa"  # by which vLLM removes what another engine left

    class FFAStatLogger(AggregateStatLoggerBase):
        def __init__(self, vllm_config: Any, engine_indexes: list[int]):
            counter = Counter(
                metric_files.SHORT_REQUESTS,
                "Finished requests that stayed below min_context and so ran without pruning.",
                labelnames=metric_files.LABELS,
            )
            self.short_requests = {
                engine: counter.labels(*metric_files.labels_of(vllm_config, engine))
                for engine in engine_indexes
            }
            self.seen = dict.fromkeys(engine_indexes, {})
            if directory is not None and envs.prometheus_directory() is None:
                REGISTRY.register(Collector(None, directory))

        def record(
            self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0
        ):
            for request in iteration_stats.finished_requests if iteration_stats else ():
                # the last token is never an input
                length = request.num_prompt_tokens + request.num_generation_tokens - 1
                if length < config.min_context:
                    self.short_requests[engine_idx].inc()

        def log_engine_initialized(self):
            pass

        def log(self):
            """A line for each engine that decoded since the last one."""
            if directory is None or envs.prometheus_directory() is not None:
                return  # as vLLM, which does not log where there are several API servers
            for engine, seen in self.seen.items():
                now = self.seen[engine] = metric_files.totals(directory, engine)
                if text := summary({name: now[name] - seen.get(name, 0) for name in now}):
                    logger.info("Engine %03d: FFA_FP8FP8 %s", engine, text)

    return FFAStatLogger(vllm_config, engines)


def summary(counts: dict[str, float]) -> str:
    """What an interval's counts of `metric_files.COUNTERS` say, empty where nothing was decoded."""
    kept, total, read, dense, mass, queries = (
        counts.get(f"vllm:ffa_{name}", 0)
        for name in (
            "kept_blocks", "total_blocks", "read_bytes", "dense_bytes", "skipped_mass",
            "pruned_queries",
        )
    )  # fmt: skip
    if not dense:
        return ""
    parts = [f"read: {read / 1e9:.2f} GB of the cache, {read / dense:.1%} of 16-bit dense"]
    if total:
        parts.insert(0, f"kept: {kept / total:.1%}")
    if mass and queries:
        parts.append(f"skipped mass: {mass / queries:.2%}")
    return ", ".join(parts)
