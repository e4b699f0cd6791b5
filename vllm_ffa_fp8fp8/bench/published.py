"""What is kept under a folder, by stack, so that a table can show the newest that has its rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_ffa_fp8fp8.bench.cells import Figures
from vllm_ffa_fp8fp8.bench.files import read_records
from vllm_ffa_fp8fp8.bench.pictures.sources import QUALITY, model_name, read_quality
from vllm_ffa_fp8fp8.bench.store import benchmark_of, read_decode
from vllm_ffa_fp8fp8.environment import release

KPROJ, SERVING = "kproj", "serving"
RETRIEVAL = "retrieval"
"""Answers of a real model: no command makes them, see the records."""
DRAWN = ("layers",)
"""What `plot` draws, and no table shows."""


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
    names = ("gpu", "torch", "triton", "vllm")
    records = [
        subject | {"name": found.name, "kept": found.kept, "kl_mean": found.kl_mean}
        for found in file.settings
    ]
    return {name: file.environment[name] for name in names}, records


class Published:
    """The sources of each benchmark, newest first. Raises ValueError for a file of another kind."""

    def __init__(self, folder: Path):
        found: dict[tuple, Source] = {}
        for path in sorted(folder.glob("*.json")):
            benchmark = benchmark_of(path)
            if benchmark in DRAWN:
                continue
            figures, records = {}, []
            if benchmark in (KPROJ, SERVING, RETRIEVAL):
                environment, records = read_records(path, benchmark)
            elif benchmark == QUALITY:
                environment, records = read_judged(path)
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
