"""Compiles the kernels with every Triton that a supported vLLM brings, for GPUs that need not be
there, and prints what came out of the versions side by side: `python scripts/check_compiled.py`.

Tritons that the environment lacks come into folders of their own under .triton/, which also keeps
what was compiled. Exits with 1 where a kernel does not compile or is not what its speed rests on
(tests/kernels/compiled/expectations.py).
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

VERSIONS = ("3.7.1", "3.8.0", "3.9.0")
"""Of vLLM 0.32, of 0.33, and of its CPU build, in ascending order."""
MEASURED = 90
"""The compute capability that the expectations are of; the newest Triton compiles for others."""
OTHERS = (80, 89, 100, 120)

ROOT = Path(__file__).resolve().parents[1]
COMPILE = ROOT / "tests" / "kernels" / "compile_kernels.py"
FOLDER = ROOT / ".triton"
console = Console(highlight=False)
console.width = max(console.width, 220)  # columns of the table


@dataclass
class Run:
    """What compiled with one Triton for one compute capability, as compile_kernels.py writes it."""

    version: str
    capability: int
    kernels: list[dict]
    failures: list[str]

    def __str__(self) -> str:
        return f"Triton {self.version}, compute capability {self.capability / 10}"


def fetch(version: str) -> Path | None:
    """The folder of that Triton; None where it is the environment's own."""
    if importlib.metadata.version("triton") == version:
        return None
    folder = FOLDER / version
    if not folder.exists():
        FOLDER.mkdir(exist_ok=True)
        console.print(f"fetching Triton {version} ...")
        with TemporaryDirectory(dir=FOLDER) as target:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            done = subprocess.run([*pip, "--target", target, f"triton=={version}"])
            if done.returncode:
                raise SystemExit(f"pip could not fetch Triton {version} for this Python")
            shutil.move(target, folder)
            Path(target).mkdir()  # for its own removal
    return folder


def compile_kernels(version: str, capability: int) -> Run:
    """In a process of its own: one has one Triton."""
    path = [str(fetched)] if (fetched := fetch(version)) else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
        "TRITON_CACHE_DIR": str(FOLDER / "cache" / version),
        "TRITON_DEFAULT_FP_FUSION": "1",  # as before 3.9
        "TRITON_INTERPRET": "0",
    }
    with TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, COMPILE, str(capability), "--json", record]
        if capability != MEASURED:
            command += ["--extent", "shapes"]
        begin = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - begin
        if record.exists():
            run = Run(version, capability, **json.loads(record.read_text()))
        else:
            run = Run(version, capability, [], [f"did not finish:\n{done.stderr[-3000:]}"])
    said = f"{len(run.failures)} failures" if run.failures else "as expected"
    console.print(f"{run}: {len(run.kernels)} kernels in {seconds:.0f} s, {said}")
    return run


def side_by_side(runs: list[Run]) -> Table:
    """A row a kernel and variant; where versions differ, a number of each."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for run in runs:
        for kernel in run.kernels:
            row = found.setdefault((kernel["kernel"], kernel["variant"]), {})
            row[run.version] = kernel["numbers"]
    versions = "/".join(run.version for run in runs)
    table = Table(
        title=f"Triton {versions} for compute capability {MEASURED / 10}", box=None, title_style=""
    )
    names = next(iter(next(iter(found.values())).values()))
    table.add_column("kernel", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for (kernel, variant), row in found.items():
        cells = []
        for name in names:
            numbers = [str(row.get(run.version, {}).get(name, "-")) for run in runs]
            cells.append(numbers[0] if len(set(numbers)) == 1 else "/".join(numbers))
        table.add_row(kernel.strip("_").removesuffix("_kernel"), variant, *cells)
    return table


def main() -> int:
    begin = time.monotonic()
    for version in VERSIONS:
        fetch(version)
    wanted = [(version, MEASURED) for version in VERSIONS]
    wanted += [(VERSIONS[-1], capability) for capability in OTHERS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(lambda job: compile_kernels(*job), wanted))
    if measured := [run for run in runs if run.capability == MEASURED and run.kernels]:
        console.print(side_by_side(measured))
    for run in runs:
        for failure in run.failures:
            console.print(f"FAILED: {run}: {failure}", markup=False)
    console.print(f"{time.monotonic() - begin:.0f} s")
    return int(any(run.failures for run in runs))


if __name__ == "__main__":
    sys.exit(main())
