"""The names of commands and what they say of themselves."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.commands import cli
from vllm_ffa_fp8fp8.commands.engine_options import run_with_engines
from vllm_ffa_fp8fp8.config import FFAConfig


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--help"], "an attention backend for vLLM"),
        (["--version"], f"vllm-ffa-fp8fp8 {environment.version_of('vllm-ffa-fp8fp8')}"),
        (["bench", "--help"], "a whole model's output tokens"),
        (["bench", "decode", "--help"], "merge_rows"),
        (["bench", "kproj", "--help"], "finish_rows"),
    ],
)
def test_help_and_version(capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", cli.BENCHMARKS)
def test_benchmarks_have_the_same_options_for_what_they_keep(capsys, name):
    with pytest.raises(SystemExit):
        cli.main(["bench", name, "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--folder", "--fresh", "--commit"))


@pytest.mark.parametrize("name", ("decode", "serving", "kproj"))
def test_old_spellings_say_the_new_one(capsys, name):
    with pytest.raises(SystemExit) as ended:
        cli.main([f"bench-{name}", "--fresh"])
    assert ended.value.code == 2
    assert f"bench-{name} is now: ffa-fp8fp8 bench {name}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["bench"], ["bench", "speed"], ["benchmark"]])
def test_unknown_commands_are_told(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["quality", "--help"], ["bench", "--help"]])
def test_help_needs_neither_torch_nor_vllm(arguments):
    code = (
        "import sys\nfrom vllm_ffa_fp8fp8.commands import cli\n"
        f"try: cli.main({arguments})\n"
        "except SystemExit: print({'torch', 'vllm', 'triton'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.splitlines()[-1:] == ["set()"], answer.stderr


def stop() -> int:
    raise KeyboardInterrupt


def refuse() -> int:
    raise ValueError("that cannot be")


@pytest.mark.parametrize(
    "work, code, says",
    [(lambda: 0, 0, ""), (refuse, 2, "that cannot be\n"), (stop, 130, "Stopped. All is lost.\n")],
)
def test_how_commands_with_engines_end(capsys, work, code, says):
    assert run_with_engines(work, lambda: "All is lost.") == code
    assert capsys.readouterr().out == says


def test_config_tells_every_option(capsys):
    assert cli.main(["config", "--doc", "--json"]) == 0
    described = {option["name"]: option for option in json.loads(capsys.readouterr().out)}
    assert list(described) == [field.name for field in fields(FFAConfig)]
    assert described["min_context"] == {
        "name": "min_context",
        "takes": "an integer >= 0 and < 2**31 (tokens)",
        "default": "1024",
        "unit": "tokens",
        "meaning": "requests with fewer tokens are not pruned",
    }
    assert cli.main(["config", "--doc"]) == 0
    assert "requests with" in capsys.readouterr().out


def test_config_checks_a_setting(capsys, monkeypatch):
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", "fast")
    assert cli.main(["config"]) == 0 and "tau: 0.05" in capsys.readouterr().out
    assert cli.main(["config", "exact", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["delta"] is None
    assert cli.main(["config", "fast,min_contxt=3"]) == 2
    assert "did you mean 'min_context'?" in capsys.readouterr().out
