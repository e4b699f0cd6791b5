"""Figures on disk: a JSON file for each GPU and geometry under `plot/`, reused by later runs."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from importlib import resources
from pathlib import Path

from vllm_ffa_fp8fp8.bench.cells import PEERS, Cell, Figure, Figures, Geometry, Shape

OUR_FILES = ("inputs.py", "timing.py", "decoder.py")
PEER_FILES = ("inputs.py", "timing.py", "peers.py")


def fingerprint(*packages: str, only: tuple[str, ...] = ()) -> str:
    """Names the source of packages, or of `only` some files of theirs."""
    digest = hashlib.sha256()
    for package in packages:
        files = (file for file in resources.files(package).iterdir() if file.name.endswith(".py"))
        for file in sorted(files, key=lambda file: file.name):
            if not only or file.name in only:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def code_fingerprint(series: str) -> str:
    """Names the code that a figure depends on: for ours the kernels too. The peers' own versions
    are part of the environment."""
    if series in PEERS:
        return fingerprint("vllm_ffa_fp8fp8.bench", only=PEER_FILES)
    kernels = fingerprint("vllm_ffa_fp8fp8.kernels")
    return f"{kernels}-{fingerprint('vllm_ffa_fp8fp8.bench', only=OUR_FILES)[:4]}"


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
        self.folder.mkdir(parents=True, exist_ok=True)
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


def read_figures(paths: Iterable[Path]) -> tuple[dict[str, str], Figures]:
    """Environment (of the last file) and figures of result files. Raises ValueError with the
    file's name where one is not of this kind."""
    environment, figures = {}, {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
            environment, geometry = content["environment"], Geometry(**content["geometry"])
            for record in content["figures"]:
                cell = Cell(
                    Shape(geometry, record["batch"], record["seq_len"]), record["series"],
                    record["value_dtype"], record["kept"], record["tuning"],
                )  # fmt: skip
                figures[cell] = Figure(
                    record["us"], record["floor_us"], record["measured_kept"], record["error"],
                    record["code"], cached=True,
                )  # fmt: skip
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no figures of bench-decode: {error!r}") from error
    return environment, figures
