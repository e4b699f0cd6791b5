"""What benchmarks keep: a JSON file for each benchmark, GPU, stack of versions and subject."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_ffa_fp8fp8.environment import release

BENCHMARK, ENVIRONMENT, FIGURES = "benchmark", "environment", "figures"
"""Entries of every file."""


def file_name(kind: str, environment: dict[str, str], *settings: object) -> str:
    """`KIND-GPU-vllm-X.Y.Z-triton-X.Y.Z-SETTINGS.json`."""
    stack = [f"{name}-{dotted(environment[name])}" for name in ("vllm", "triton")]
    return "-".join((kind, slug(environment["gpu"]), *stack, *map(str, settings))) + ".json"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def dotted(version: str) -> str:
    """A version's numbers without its build."""
    return ".".join(map(str, release(version))) or version


def make_folder(path: Path) -> None:
    """Makes the folder where there is none. Raises ValueError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be a folder for figures: {error.strerror}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is there at the end takes the place of `path`, which
    is never half-written. Raises ValueError where that cannot be."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


class Records:
    """The figures of one benchmark, which later runs of the same code reuse. A file of another
    environment or subject is replaced.

    Args:
        benchmark: its name, such as serving.
        environment: names and versions that figures depend on, `gpu` among them.
        subject: what else all of them are of, such as {"model": ..., "data": ...}.
        fresh: take nothing from earlier runs.
        commit: of the code that is measured, as figures name it.

    Raises ValueError for a file that holds something else.
    """

    def __init__(
        self,
        path: Path,
        benchmark: str,
        environment: dict[str, str],
        subject: dict[str, Any] | None = None,
        *,
        fresh: bool = False,
        commit: str = "",
    ):
        self.path, self.environment, self.fresh, self.commit = path, environment, fresh, commit
        self.head = {BENCHMARK: benchmark, ENVIRONMENT: environment, **(subject or {})}
        self.all: list[dict[str, Any]] = []
        self._new: list[dict[str, Any]] = []
        if path.is_file():
            content = read_content(path, benchmark)
            records = content.pop(FIGURES)
            self.all = records if content == json.loads(json.dumps(self.head)) else []

    def find(self, key: dict[str, Any], code: str) -> dict[str, Any] | None:
        """The record of a key that was measured by such code."""
        wanted = key | {"code": code}
        records = self._new if self.fresh else self.all
        return next((r for r in records if wanted.items() <= r.items()), None)

    def is_cached(self, record: dict[str, Any]) -> bool:
        """Whether it comes from an earlier run."""
        return not any(record is new for new in self._new)

    def put(self, key: dict[str, Any], figures: dict[str, Any], code: str = "") -> dict[str, Any]:
        """Adds a record, which replaces the one of the same key, and returns it."""
        record = key | figures | {"code": code, "commit": self.commit}
        self.all = [old for old in self.all if not key.items() <= old.items()] + [record]
        self._new.append(record)
        return record

    def save(self) -> None:
        """Raises ValueError where the file cannot be written."""
        make_folder(self.path.parent)
        head = "".join(f'"{name}": {json.dumps(value)},\n' for name, value in self.head.items())
        lines = ",\n".join(map(json.dumps, self.all))
        with replacing(self.path) as part:
            part.write_text(f'{{{head}"{FIGURES}": [\n{lines}\n]}}\n')


def read_records(path: Path, benchmark: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Environment and figures of a file. Raises ValueError."""
    content = read_content(path, benchmark)
    return content[ENVIRONMENT], content[FIGURES]


def read_content(path: Path, benchmark: str) -> dict[str, Any]:
    """A file of a benchmark. Raises ValueError with its name and what is wrong with it."""
    try:
        content = read_object(path)
        if (found := entry(content, BENCHMARK, str)) != benchmark:
            raise ValueError(f"it is of {found}")
        environment = entry(content, ENVIRONMENT, dict)
        for name in ("gpu", "torch", "triton", "vllm"):
            entry(environment, name, str)
        entry(content, FIGURES, list)
    except ValueError as error:
        raise ValueError(f"{path} holds no figures of {benchmark}: {error}") from error
    return content


def read_object(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file holds no JSON object."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise ValueError("it is not text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON, see line {error.lineno}") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def entry(record: dict, name: str, kind: type | tuple[type, ...]) -> Any:
    """A value of a file. Raises ValueError where it is missing or of another kind."""
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"an entry {name!r} is missing")
    if not isinstance(record[name], kind):
        raise ValueError(f"the entry {name!r} cannot be {record[name]!r}")
    return record[name]
