"""Figures of `bench decode` on disk: a JSON file for each GPU, stack and geometry."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from vllm_ffa_fp8fp8.bench.cells import PEERS, Cell, Figure, Figures, Geometry, Shape
from vllm_ffa_fp8fp8.bench.files import (
    BENCHMARK,
    ENVIRONMENT,
    FIGURES,
    Records,
    entry,
    file_name,
    read_content,
    read_object,
)

DECODE, GEOMETRY = "decode", "geometry"

OUR_FILES = ("inputs.py", "planted.py", "timing.py", "decoder.py", "rounding.py", "base_read.py")
PEER_FILES = ("inputs.py", "planted.py", "timing.py", "peers.py")
NUMBER = (int, float)
PLANTED_FIELDS = ("planted", "setting")
"""Fields that only records of planted scores have."""


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
    """Figures of cells. Arguments as of `Records`."""

    def __init__(
        self, folder: Path, environment: dict[str, str], fresh: bool = False, commit: str = ""
    ):
        self.folder, self.environment, self.fresh = folder, environment, fresh
        self.commit = commit
        self._files: dict[Geometry, Records] = {}
        self._figures: dict[Geometry, Figures] = {}

    def path(self, geometry: Geometry) -> Path:
        return self.folder / file_name(DECODE, self.environment, geometry)

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
        """Raises ValueError where the file cannot be written."""
        figures, file = sorted(self._of(geometry).items()), self._files[geometry]
        file.all = [as_record(cell, figure) for cell, figure in figures]
        file.save()

    def _of(self, geometry: Geometry) -> Figures:
        if geometry not in self._figures:
            path, subject = self.path(geometry), {GEOMETRY: asdict(geometry)}
            file = self._files[geometry] = Records(path, DECODE, self.environment, subject)
            self._figures[geometry] = parse_figures({GEOMETRY: asdict(geometry), FIGURES: file.all})
        return self._figures[geometry]


def as_record(cell: Cell, figure: Figure) -> dict:
    record = {"batch": cell.shape.batch, "seq_len": cell.shape.seq_len}
    chosen = {name: value for name, value in asdict(cell).items() if name != "shape"}
    record |= {name: value for name, value in chosen.items() if value or name not in PLANTED_FIELDS}
    record |= {
        "us": round(figure.us, 2),
        "floor_us": round(figure.floor_us, 2),
        "measured_kept": round(figure.kept, 4),
        "error": float(f"{figure.error:.2g}"),
        "code": figure.code,
        "commit": figure.commit,
    }
    if cell.planted:
        record |= {"exact_error": float(f"{figure.exact_error:.2g}"), "delta": figure.delta}
    return record


def read_figures(
    paths: Iterable[Path], tell: Callable[[str], None] = print
) -> list[tuple[dict[str, str], Figures]]:
    """Environment and figures of result files, those of one GPU and stack together. Files of other
    benchmarks are told and skipped. Raises ValueError with a file's name and what is wrong with
    it."""
    found: dict[tuple, tuple[dict[str, str], Figures]] = {}
    for path in paths:
        if (benchmark := benchmark_of(path)) not in (None, DECODE):
            tell(f"{path} is skipped: it holds figures of {benchmark}.")
            continue
        environment, figures = read_decode(path)
        of_its_stack = found.setdefault(tuple(environment.items()), (environment, {}))
        of_its_stack[1].update(figures)
    return list(found.values())


def benchmark_of(path: Path) -> object:
    """What the file says that it is of; None where it says nothing."""
    try:
        return read_object(path).get(BENCHMARK)
    except ValueError:
        return None


def read_decode(path: Path) -> tuple[dict[str, str], Figures]:
    """Environment and figures of a file. Raises ValueError with its name and what is wrong."""
    content = read_content(path, DECODE)
    try:
        return content[ENVIRONMENT], parse_figures(content)
    except ValueError as error:
        raise ValueError(f"{path} holds no figures of {DECODE}: {error}") from error


def parse_figures(content: dict) -> Figures:
    """Raises ValueError."""
    sizes = entry(content, GEOMETRY, dict)
    geometry = Geometry(*(entry(sizes, field.name, int) for field in fields(Geometry)))
    return dict(parse_record(record, geometry) for record in content[FIGURES])


def parse_record(record: dict, geometry: Geometry) -> tuple[Cell, Figure]:
    cell = Cell(
        Shape(geometry, entry(record, "batch", int), entry(record, "seq_len", int)),
        entry(record, "series", str),
        entry(record, "value_dtype", str),
        entry(record, "kept", NUMBER),
        *(entry(record, name, str) for name in ("tuning", "hot", "ahead")),
        *(entry({name: ""} | record, name, str) for name in PLANTED_FIELDS),
    )
    found = ()
    if cell.planted:
        found = (
            entry(record, "exact_error", NUMBER),
            entry(record, "delta", (*NUMBER, type(None))),
        )
    numbers = (entry(record, name, NUMBER) for name in ("us", "floor_us", "measured_kept", "error"))
    origin = (entry(record, name, str) for name in ("code", "commit"))
    return cell, Figure(*numbers, *origin, True, *found)
