"""Figures of bench-decode on disk: a JSON file for each GPU, stack and geometry, reused by later
runs."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from vllm_ffa_fp8fp8.bench.cells import (
    NOTHING,
    PEERS,
    SPREAD,
    Cell,
    Figure,
    Figures,
    Geometry,
    Shape,
)
from vllm_ffa_fp8fp8.bench.files import BENCHMARK, entry, file_name, make_folder, read_object

OUR_FILES = ("inputs.py", "timing.py", "decoder.py", "base_read.py")
PEER_FILES = ("inputs.py", "timing.py", "peers.py")
NUMBER = (int, float)
OLDER_RECORD = {"hot": SPREAD, "ahead": NOTHING, "commit": ""}
"""What records from before there were these fields stand for."""


def fingerprint(*packages: str, only: tuple[str, ...] = ()) -> str:
    """Names the source of packages and of those in them, or of `only` some files of theirs."""
    digest = hashlib.sha256()
    for package in packages:
        for file in _sources(resources.files(package)):
            if not only or file.name in only:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _sources(folder: Traversable) -> Iterator[Traversable]:
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            yield from _sources(item)
        elif item.name.endswith(".py"):
            yield item


def code_fingerprint(series: str) -> str:
    """Names the code that a figure depends on: for ours the kernels too. The peers' own versions
    are part of the environment."""
    if series in PEERS:
        return fingerprint("vllm_ffa_fp8fp8.bench", only=PEER_FILES)
    kernels = fingerprint("vllm_ffa_fp8fp8.kernels")
    return f"{kernels}-{fingerprint('vllm_ffa_fp8fp8.bench', only=OUR_FILES)[:4]}"


class Store:
    """The figures of one environment (GPU and versions). A file of another one is replaced.

    Args:
        environment: names and versions that a figure depends on, `gpu` among them.
        fresh: take no figure from earlier runs.
        commit: of the code that is measured, as figures name it.
    """

    def __init__(
        self, folder: Path, environment: dict[str, str], fresh: bool = False, commit: str = ""
    ):
        self.folder, self.environment, self.fresh = folder, environment, fresh
        self.commit = commit
        self._figures: dict[Geometry, Figures] = {}

    def path(self, geometry: Geometry) -> Path:
        return self.folder / file_name("decode", self.environment, geometry)

    def get(self, cell: Cell, code: str) -> Figure | None:
        """The figure, if it was measured by the same code in this environment."""
        figure = self._of(cell.shape.geometry).get(cell)
        if figure is None or figure.code != code or (self.fresh and figure.cached):
            return None
        return figure

    def put(self, cell: Cell, figure: Figure) -> Figure:
        """Keeps the figure, and returns it with the commit that it is of."""
        figure = replace(figure, commit=self.commit)
        self._of(cell.shape.geometry)[cell] = figure
        return figure

    def save(self, geometry: Geometry) -> None:
        make_folder(self.folder)
        figures = sorted(self._of(geometry).items())
        lines = ",\n".join(json.dumps(as_record(cell, figure)) for cell, figure in figures)
        self.path(geometry).write_text(
            f'{{"environment": {json.dumps(self.environment)},\n'
            f'"geometry": {json.dumps(asdict(geometry))},\n'
            f'"figures": [\n{lines}\n]}}\n'
        )

    def _of(self, geometry: Geometry) -> Figures:
        if geometry not in self._figures:
            path, figures = self.path(geometry), {}
            if path.is_file():
                ((environment, figures),) = read_figures([path])
                figures = figures if environment == self.environment else {}
            self._figures[geometry] = figures
        return self._figures[geometry]


def as_record(cell: Cell, figure: Figure) -> dict:
    record = {"batch": cell.shape.batch, "seq_len": cell.shape.seq_len}
    record |= {name: value for name, value in asdict(cell).items() if name != "shape"}
    record |= {
        "us": round(figure.us, 2),
        "floor_us": round(figure.floor_us, 2),
        "measured_kept": round(figure.kept, 4),
        "error": float(f"{figure.error:.2g}"),
        "code": figure.code,
        "commit": figure.commit,
    }
    return record


def read_figures(
    paths: Iterable[Path], tell: Callable[[str], None] = print
) -> list[tuple[dict[str, str], Figures]]:
    """Environment and figures of result files, those of one GPU and stack together. Files of other
    benchmarks are told and skipped. Raises ValueError with a file's name and what is wrong with
    it."""
    found: dict[tuple, tuple[dict[str, str], Figures]] = {}
    for path in paths:
        try:
            content = read_object(path)
            if BENCHMARK in content:
                tell(f"{path} is skipped: it holds figures of {content[BENCHMARK]}.")
                continue
            environment, figures = parse_figures(content)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{path} holds no figures of bench-decode: {reason}") from error
        of_its_stack = found.setdefault(tuple(environment.items()), (environment, {}))
        of_its_stack[1].update(figures)
    return list(found.values())


def parse_figures(content: dict) -> tuple[dict[str, str], Figures]:
    """Environment and figures of a file. Raises ValueError."""
    environment, sizes = entry(content, "environment", dict), entry(content, "geometry", dict)
    for name in ("gpu", "torch", "triton", "vllm"):
        entry(environment, name, str)
    geometry = Geometry(*(entry(sizes, field.name, int) for field in fields(Geometry)))
    records = entry(content, "figures", list)
    return environment, dict(parse_record(record, geometry) for record in records)


def parse_record(record: dict, geometry: Geometry) -> tuple[Cell, Figure]:
    if isinstance(record, dict):
        record = OLDER_RECORD | record
    cell = Cell(
        Shape(geometry, entry(record, "batch", int), entry(record, "seq_len", int)),
        entry(record, "series", str),
        entry(record, "value_dtype", str),
        entry(record, "kept", NUMBER),
        *(entry(record, name, str) for name in ("tuning", "hot", "ahead")),
    )
    numbers = (entry(record, name, NUMBER) for name in ("us", "floor_us", "measured_kept", "error"))
    origin = (entry(record, name, str) for name in ("code", "commit"))
    return cell, Figure(*numbers, *origin, cached=True)
