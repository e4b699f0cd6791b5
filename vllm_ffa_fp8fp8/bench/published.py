"""What is kept under a folder, by stack, so that a table can show the newest that has its rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_ffa_fp8fp8.bench.cells import Figures
from vllm_ffa_fp8fp8.bench.files import read_records
from vllm_ffa_fp8fp8.bench.pictures.sources import (
    LAYERS,
    QUALITY,
    LayerFigure,
    model_name,
    read_layers,
    read_quality,
)
from vllm_ffa_fp8fp8.bench.store import benchmark_of, read_decode
from vllm_ffa_fp8fp8.environment import release

STACK = ("gpu", "torch", "triton", "vllm")
KPROJ, SERVING = "kproj", "serving"
RETRIEVAL = "retrieval"
"""Answers of a real model: no command makes them, see the records."""


@dataclass
class Source:
    """All that one benchmark measured on one GPU with one stack."""

    environment: dict[str, str]
    figures: Figures = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stack(self) -> str:
        return f"vLLM {self.environment['vllm']}, Triton {self.environment['triton']}"

    def order(self) -> tuple:
        """Newer stacks after older ones; of two GPUs the one with more figures last."""
        versions = (release(self.environment[name]) for name in ("vllm", "triton", "torch"))
        count = len(self.figures) + len(self.records)
        return *versions, count, self.environment["gpu"]


def read_judged(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Environment and settings of a file of `quality`; models and texts without their folders.
    Raises ValueError."""
    file = read_quality(path)
    texts = dict.fromkeys(Path(name).name for name in file.text.split(", "))
    subject = {
        "model": model_name(file.model),
        "text": ", ".join(texts),
        "tokens": file.tokens,
        "last": file.last,
        "commit": file.environment.get("commit", ""),
    }
    records = [
        subject
        | {"name": found.name, "kept": found.kept, "kl_mean": found.kl_mean}
        | {"options": found.setting.options if found.setting else {}}
        for found in file.settings
    ]
    return {name: file.environment[name] for name in STACK}, records


def read_timed(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Environment and means over layers of a file of `bench layers`, where all were timed. Raises
    ValueError."""
    file = read_layers(path)
    groups: dict[tuple, list[LayerFigure]] = {}
    for f in file.figures:
        groups.setdefault((f.length, f.batch, f.series, f.setting), []).append(f)
    records = [
        {
            "model": model_name(file.model),
            **dict(zip(("length", "batch", "series", "setting"), key, strict=True)),
            "us": fmean(figure.us for figure in figures),
            "kept": fmean(figure.kept for figure in figures),
            "commit": figures[0].commit,
        }
        for key, figures in groups.items()
        if all(figure.us is not None for figure in figures)
    ]
    return {name: file.environment[name] for name in STACK}, records


class Published:
    """The sources of each benchmark, newest first. Raises ValueError for a file of another kind."""

    def __init__(self, folder: Path):
        found: dict[tuple, Source] = {}
        for path in sorted(folder.glob("*.json")):
            benchmark = benchmark_of(path)
            figures, records = {}, []
            if benchmark in (KPROJ, SERVING, RETRIEVAL):
                environment, records = read_records(path, benchmark)
            elif benchmark == QUALITY:
                environment, records = read_judged(path)
            elif benchmark == LAYERS:
                environment, records = read_timed(path)
            else:
                environment, figures = read_decode(path)
            key = (benchmark, *sorted(environment.items()))
            source = found.setdefault(key, Source(environment))
            source.figures |= figures
            source.records += records
        self._sources: dict[str, list[Source]] = {}
        for key, source in found.items():
            self._sources.setdefault(key[0], []).append(source)
        for sources in self._sources.values():
            sources.sort(key=Source.order, reverse=True)

    def of(self, benchmark: str) -> list[Source]:
        return self._sources.get(benchmark, [])

    def newest(self, benchmark: str, has: Callable[[Source], bool] = bool) -> Source:
        """The newest source that has what a table shows. Raises ValueError where none does."""
        for source in self.of(benchmark):
            if has(source):
                return source
        raise ValueError(f"no figures of {benchmark} for this table")
