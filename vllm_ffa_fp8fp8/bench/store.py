"""Figures on disk: a JSON file for each GPU and geometry under `plot/`, reused by later runs."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

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

OUR_FILES = ("inputs.py", "timing.py", "decoder.py", "base_read.py")
PEER_FILES = ("inputs.py", "timing.py", "peers.py")
NUMBER = (int, float)
OLDER_RECORD = {"hot": SPREAD, "ahead": NOTHING}
"""What records from before cells had these fields were measured with."""
OTHER_KINDS = {"records": "bench-serving", "prefill": "bench-kproj"}
"""Where other benchmarks keep their figures in a file, by which it is told."""


def fingerprint(*packages: str, only: tuple[str, ...] = ()) -> str:
    """Names the source of packages and of those in them, or of `only` some files of theirs."""
    digest = hashlib.sha256()
    for package in packages:
        for file in _sources(resources.files(package)):
            if not only or file.name in only:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _sources(folder: Traversable) -> Iterator[Traversable]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.endswith(".py"):
            yield entry


def code_fingerprint(series: str) -> str:
    """Names the code that a figure depends on: for ours the kernels too. The peers' own versions
    are part of the environment."""
    if series in PEERS:
        return fingerprint("vllm_ffa_fp8fp8.bench", only=PEER_FILES)
    kernels = fingerprint("vllm_ffa_fp8fp8.kernels")
    return f"{kernels}-{fingerprint('vllm_ffa_fp8fp8.bench', only=OUR_FILES)[:4]}"


def make_folder(path: Path) -> None:
    """Makes the folder where there is none. Raises ValueError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be a folder for figures: {error.strerror}") from error


def file_name(kind: str, gpu: str, settings: object) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"{kind}-{slug}-{settings}.json"


class Store:
    """The figures of one environment (GPU and versions). A file of another one is replaced.

    Args:
        environment: names and versions that a figure depends on, `gpu` among them.
        fresh: take no figure from earlier runs.
    """

    def __init__(self, folder: Path, environment: dict[str, str], fresh: bool = False):
        self.folder, self.environment, self.fresh = folder, environment, fresh
        self._figures: dict[Geometry, Figures] = {}

    def path(self, geometry: Geometry) -> Path:
        return self.folder / file_name("decode", self.environment["gpu"], geometry)

    def get(self, cell: Cell, code: str) -> Figure | None:
        """The figure, if it was measured by the same code in this environment."""
        figure = self._of(cell.shape.geometry).get(cell)
        if figure is None or figure.code != code or (self.fresh and figure.cached):
            return None
        return figure

    def put(self, cell: Cell, figure: Figure) -> None:
        self._of(cell.shape.geometry)[cell] = figure

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
                environment, figures = read_figures([path])
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
    }
    return record


def read_figures(
    paths: Iterable[Path], tell: Callable[[str], None] = print
) -> tuple[dict[str, str], Figures]:
    """Environment and figures of result files of one GPU and versions. Files of other benchmarks
    are told and skipped. Raises ValueError with a file's name and what is wrong with it."""
    environment, figures = {}, {}
    for path in paths:
        try:
            content = read_object(path)
            if kind := next((kind for key, kind in OTHER_KINDS.items() if key in content), None):
                tell(f"{path} is skipped: it holds figures of {kind}.")
                continue
            its_own, found = parse_figures(content)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{path} holds no figures of bench-decode: {reason}") from error
        if environment and its_own != environment:
            raise ValueError(
                f"{path} is of another GPU or of other versions than the files before it, "
                f"{its_own}, not {environment}: report them apart"
            )
        environment = its_own
        figures |= found
    return environment, figures


def read_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except UnicodeDecodeError:
        raise ValueError("it is not text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON, see line {error.lineno}") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def parse_figures(content: dict) -> tuple[dict[str, str], Figures]:
    """Environment and figures of a file. Raises ValueError."""
    environment, sizes = entry(content, "environment", dict), entry(content, "geometry", dict)
    entry(environment, "gpu", str)
    geometry = Geometry(*(entry(sizes, field.name, int) for field in fields(Geometry)))
    records = entry(content, "figures", list)
    return environment, dict(parse_record(record, geometry) for record in records)


def parse_record(record: dict, geometry: Geometry) -> tuple[Cell, Figure]:
    cell = Cell(
        Shape(geometry, entry(record, "batch", int), entry(record, "seq_len", int)),
        entry(record, "series", str),
        entry(record, "value_dtype", str),
        entry(record, "kept", NUMBER),
        entry(record, "tuning", str),
        *(entry(OLDER_RECORD | record, name, str) for name in OLDER_RECORD),
    )
    numbers = (entry(record, name, NUMBER) for name in ("us", "floor_us", "measured_kept", "error"))
    return cell, Figure(*numbers, entry(record, "code", str), cached=True)


def entry(record: dict, name: str, kind: type | tuple[type, ...]) -> Any:
    """A value of a file. Raises ValueError where it is missing or of another kind."""
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"an entry {name!r} is missing")
    if not isinstance(record[name], kind):
        raise ValueError(f"the entry {name!r} cannot be {record[name]!r}")
    return record[name]
