"""`ffa-fp8fp8 doctor`: what is there, which path would run, what is missing and what to do."""

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_ffa_fp8fp8 import environment, envs
from vllm_ffa_fp8fp8.commands.doctor_model import examine_model
from vllm_ffa_fp8fp8.commands.findings import COLORS, MISSING, OK, WARNING, Finding
from vllm_ffa_fp8fp8.commands.repair import repair
from vllm_ffa_fp8fp8.environment import GPU, MEASURED_STACKS, install_command
from vllm_ffa_fp8fp8.integration.compat import SUPPORTED_VLLM, unsupported_vllm
from vllm_ffa_fp8fp8.integration.refusals import MIN_COMPUTE_CAPABILITY

ENTRY_POINTS = {
    "vllm.general_plugins": "vllm_ffa_fp8fp8.plugin:register",
    "vllm.platform_plugins": "vllm_ffa_fp8fp8.plugin:register_early",
}
OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)
OTHER_TRITONS = {
    "3.6": "older figures say that decode is as fast as with the measured ones",
    "3.9": "the kernels compile to loads as wide as with the measured ones, but were not timed",
}
"""What is known of a Triton that no measured stack has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="also say what would run each kind of this model's layers, what is refused and why, "
        "and what its cache takes: the folder of a config.json, or the name of a model that was "
        "downloaded",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    parser.add_argument(
        "--repair", action="store_true",
        help="first repair what vLLM's CPU build leaves wrong: uninstall a torchvision, torchaudio "
        "or torchcodec that does not import, and say which version `vllm` has",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the table says what matters
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.repair:
        try:
            repair()
        except importlib.metadata.PackageNotFoundError:
            print("Nothing to repair: vLLM's CPU build is not installed here.")
            return 1
    findings = list(examine(options.model))
    missing = [finding.subject for finding in findings if finding.status == MISSING]
    if options.json:
        print(json.dumps({"ready": not missing, "findings": list(map(asdict, findings))}, indent=1))
        return 1 if missing else 0
    Console().print(as_table(findings))
    print(f"Not ready: {', '.join(missing)}." if missing else "Ready.")
    return 1 if missing else 0


def examine(model: str | None = None) -> Iterator[Finding]:
    gpu = environment.find_gpu()
    parts = [*check_gpu(gpu), check_torch(gpu), check_triton(gpu), *check_vllm(gpu)]
    missing = [part for part in parts if part.status == MISSING]
    yield check_python()
    yield from parts
    if not missing:
        yield check_stack(gpu)
    yield blocked("prefill", missing) if missing else check_flash_attention(gpu)
    yield blocked("decode", missing) if missing else Finding("decode", OK, decode_path(gpu))
    yield check_entry_points()
    yield check_options(gpu)
    if model is not None and environment.vllm_version() is not None:
        yield from examine_model(model, gpu.capability if uses_cuda(gpu) else None)


def blocked(subject: str, missing: list[Finding]) -> Finding:
    """A path that cannot run. vLLM, the last of the parts, brings those before it."""
    names = ", ".join(dict.fromkeys(part.subject for part in missing))
    return Finding(subject, MISSING, f"cannot run: see {names}", missing[-1].advice)


def check_python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("Python", OK, found)  # pip installs nothing of this on a Python before 3.11


def check_gpu(gpu: GPU | None) -> Iterator[Finding]:
    if gpu is None:
        advice = "fine for trying it out: the torch path runs on the CPU"
        yield Finding("GPU", WARNING, "no NVIDIA GPU", advice)
        return
    found = f"{gpu.name}, compute capability {dotted(gpu.capability)}"
    if not is_usable(gpu):
        needed = f"needs {dotted(MIN_COMPUTE_CAPABILITY)} or newer"
        if environment.is_cpu_build():
            yield Finding("GPU", WARNING, found, f"{needed}; the CPU is used instead")
        else:
            yield Finding("GPU", MISSING, found, f"{needed}; {instead_of_cuda_build()}")
        return
    yield Finding("GPU", OK, found)
    if gpu.has_fp8:
        yield Finding("FP8", OK, "E4M3 in hardware")
    else:
        yield Finding("FP8", WARNING, "none before compute capability 8.9", "keys stay 16-bit")


def check_torch(gpu: GPU | None) -> Finding:
    torch, problem = environment.import_module("torch")
    if torch is None:
        return Finding("torch", MISSING, problem, f"it comes with vLLM: {install_vllm(gpu)}")
    if gpu is None and torch.version.cuda:
        found = f"{torch.__version__}, CUDA build, without a GPU"
        return Finding("torch", MISSING, found, instead_of_cuda_build())
    if uses_cuda(gpu) and not torch.cuda.is_available():
        advice = "install a CUDA build of torch that fits the driver"
        return Finding("torch", MISSING, f"{torch.__version__} does not see the GPU", advice)
    return Finding("torch", OK, torch.__version__)


def check_triton(gpu: GPU | None) -> Finding:
    version = environment.version_of("triton")
    if not uses_cuda(gpu):
        return Finding("triton", OK, f"{version or 'not installed'}, not used on the CPU")
    if version is None:
        return Finding("triton", MISSING, "not installed", "it comes with torch's CUDA build")
    made_for = f"made for Triton {dotted(OLDEST_TRITON)} to {dotted(NEWEST_TRITON)}"
    release = environment.release(version)[:2]
    if release < OLDEST_TRITON:
        return Finding("triton", WARNING, version, f"the kernels are {made_for}")
    if release > NEWEST_TRITON:
        return Finding("triton", WARNING, version, f"untested: the kernels are {made_for}")
    if problem := environment.why_unwritable(folder := environment.triton_cache()):
        advice = "set TRITON_CACHE_DIR to a folder that can be written"
        return Finding("triton", MISSING, f"{version}; its cache {folder}: {problem}", advice)
    return Finding("triton", OK, version)


def check_stack(gpu: GPU | None) -> Finding:
    """Whether the figures of README and docs are of what is installed."""
    subject, found = "stack", environment.stack_of(environment.stack())
    if not uses_cuda(gpu):
        return Finding(subject, OK, f"{found}: not measured on the CPU")
    if found in MEASURED_STACKS:
        return Finding(subject, OK, f"{found}: measured")
    measured = {stack.triton for stack in MEASURED_STACKS}
    if found.triton in measured:
        expected = "the kernels were measured with this Triton, but beside another vLLM or torch"
    else:
        expected = OTHER_TRITONS.get(found.triton, f"speed unknown: {check_speed()}")
    stacks = "; ".join(map(str, MEASURED_STACKS))
    return Finding(subject, WARNING, f"{found}: not measured", f"{expected}. Measured: {stacks}")


def check_speed() -> str:
    """What shows how fast the kernels are with an unknown compiler."""
    if environment.find_clone():
        return "`make check-compiled` shows what a Triton makes of the kernels"
    return "`ffa-fp8fp8 bench decode --shapes 8x32768` times it here"


def check_vllm(gpu: GPU | None) -> Iterator[Finding]:
    version = environment.vllm_version()
    install = install_vllm(gpu)
    if version is None:
        yield Finding("vLLM", MISSING, "not installed", install)
        return
    build = "CPU build" if environment.is_cpu_build() else "CUDA build"
    vllm, problem = environment.import_module("vllm.platforms")
    if vllm is None:
        yield Finding("vLLM", MISSING, f"{version} does not import: {problem}", install)
    elif unsupported_vllm():
        advice = f"supported: {SUPPORTED_VLLM}; {install}"
        yield Finding("vLLM", MISSING, f"{version}, {build}", advice)
    elif gpu is None and not environment.is_cpu_build():
        found = f"{version}, {build}, without a GPU"
        yield Finding("vLLM", MISSING, found, instead_of_cuda_build())
    elif is_usable(gpu) and environment.is_cpu_build():
        yield Finding("vLLM", WARNING, f"{version}, {build}", f"the GPU stays unused: {install}")
    else:
        yield Finding("vLLM", OK, f"{version}, {build}")
    if not environment.is_cpu_build():
        return
    advice = "ffa-fp8fp8 doctor --repair"
    if environment.version_of("vllm") is None:
        found = "will not start: no distribution is named vllm"
        yield Finding("vllm serve", WARNING, found, advice)
    _, problem = environment.import_module("transformers.modeling_utils")
    if problem:
        advice = f"often a CUDA build of torchvision beside torch's CPU build; {advice}"
        yield Finding("transformers", MISSING, f"does not import: {problem}", advice)


def check_flash_attention(gpu: GPU | None) -> Finding:
    subject = "prefill"
    if not uses_cuda(gpu):
        return Finding(subject, OK, "torch, on the CPU")
    utils, problem = environment.import_module("vllm.v1.attention.backends.fa_utils")
    version = utils and utils.get_flash_attn_version(head_size=128)
    if version:
        return Finding(subject, OK, f"FlashAttention {version} of vLLM")
    if extra := environment.version_of("flash-attn"):
        return Finding(subject, OK, f"flash-attn {extra}")
    found = problem or "vLLM has no FlashAttention here"
    return Finding(subject, MISSING, found, install_command("flash-attn"))


def check_entry_points() -> Finding:
    subject = "plugin"
    for group, value in ENTRY_POINTS.items():
        if value not in {point.value for point in importlib.metadata.entry_points(group=group)}:
            found = f"vLLM sees no entry point in {group}"
            return Finding(subject, MISSING, found, install_again())
    allowed, variable = envs.plugins(), envs.PLUGINS_VARIABLE
    if allowed is not None and "ffa_fp8fp8" not in allowed:
        found = f"{variable}={','.join(allowed)}: vLLM loads no other plugin"
        advice = (
            f"add ffa_fp8fp8 to {variable}, or unset it; until then vLLM says `Unknown attention "
            "backend` of FFA_FP8FP8"
        )
        return Finding(subject, MISSING, found, advice)
    if len(copies := environment.copies()) > 1:
        found = f"installed more than once: {', '.join(map(str, copies))}; the first is used"
        advice = f"pip uninstall {environment.PROJECT} until none is left, then install it once"
        return Finding(subject, WARNING, found, advice)
    return Finding(subject, OK, f"vllm-ffa-fp8fp8 {environment.version_of(environment.PROJECT)}")


def check_options(gpu: GPU | None) -> Finding:
    from vllm_ffa_fp8fp8.config import DEFAULT_PRESET, FFAConfig
    from vllm_ffa_fp8fp8.integration import refusals

    chosen = envs.config()
    source = f"{envs.CONFIG_VARIABLE}={chosen}" if chosen else f"preset {DEFAULT_PRESET}"
    try:
        options = FFAConfig.load()
        refusals.check_options(options, has_fp8=not uses_cuda(gpu) or gpu.has_fp8)
    except (ValueError, ImportError) as error:
        return Finding("options", MISSING, str(error), f"correct {source}")
    return Finding("options", OK, f"{source}\n{yaml.safe_dump(options.to_dict(), sort_keys=False)}")


def decode_path(gpu: GPU | None) -> str:
    if not uses_cuda(gpu):
        return "torch on the CPU: FP8 base + residual, in software"
    if gpu.has_fp8:
        return "Triton kernels, FP8 base + residual"
    return "Triton kernels, 16-bit K without residual"


def uses_cuda(gpu: GPU | None) -> bool:
    return is_usable(gpu) and not environment.is_cpu_build()


def is_usable(gpu: GPU | None) -> bool:
    return gpu is not None and gpu.capability >= MIN_COMPUTE_CAPABILITY


def dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def install_again() -> str:
    if clone := environment.find_clone():
        return f"pip install --no-deps -e {clone}"
    return "install the wheel with pip: entry points are part of its metadata"


def install_vllm(gpu: GPU | None) -> str:
    return install_command("cuda" if is_usable(gpu) else "cpu")


def instead_of_cuda_build() -> str:
    """What to do where the CUDA build of vLLM, if it is there, cannot run."""
    remove = "pip uninstall vllm, then " if environment.version_of("vllm") else ""
    return f"install the CPU build: {remove}{install_command('cpu')}"


def as_table(findings: list[Finding]) -> Table:
    table = Table(title="ffa-fp8fp8 doctor", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for finding in findings:
        color = COLORS[finding.status]
        state = f"[{color}]{finding.status}[/]"
        table.add_row(finding.subject, state, escape(finding.found.strip()), escape(finding.advice))
    return table
