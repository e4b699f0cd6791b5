"""JSON files of figures: a file for each benchmark, GPU, stack of versions and model."""

import json
import re
from pathlib import Path
from typing import Any

from vllm_ffa_fp8fp8.environment import release

BENCHMARK = "benchmark"
"""Where a file of records names the benchmark that it is of; bench-decode's hold figures."""


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


class Records:
    """The records of one benchmark in one environment. A file of another environment is replaced.

    Args:
        benchmark: its name, such as bench-serving.
        environment: names and versions that figures depend on, `gpu` among them.

    Raises ValueError for a file that holds something else.
    """

    def __init__(self, path: Path, benchmark: str, environment: dict[str, str]):
        self.path, self.benchmark, self.environment = path, benchmark, environment
        self.all: list[dict[str, Any]] = []
        if path.is_file():
            known, records = read_records(path, benchmark)
            self.all = records if known == environment else []

    def put(self, key: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
        """Adds a record, which replaces the one of the same key, and returns it."""
        record = key | figures
        self.all = [old for old in self.all if not key.items() <= old.items()] + [record]
        return record

    def save(self) -> None:
        make_folder(self.path.parent)
        environment, lines = json.dumps(self.environment), ",\n".join(map(json.dumps, self.all))
        self.path.write_text(
            f'{{"{BENCHMARK}": "{self.benchmark}",\n"environment": {environment},\n'
            f'"records": [\n{lines}\n]}}\n'
        )


def read_records(path: Path, benchmark: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Environment and records of a file. Raises ValueError."""
    try:
        content = read_object(path)
        if (found := entry(content, BENCHMARK, str)) != benchmark:
            raise ValueError(f"it is of {found}")
        return entry(content, "environment", dict), entry(content, "records", list)
    except ValueError as error:
        raise ValueError(f"{path} holds no figures of {benchmark}: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
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
