"""The demo: its prompts, its model, and what it makes of its runs."""

import argparse
from pathlib import Path

import pytest
from rich.console import Console

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.commands import cli, demo, demo_model
from vllm_ffa_fp8fp8.commands.demo_engine import generate
from vllm_ffa_fp8fp8.commands.demo_model import find_model, token_counter
from vllm_ffa_fp8fp8.commands.demo_prompts import Question, make_questions
from vllm_ffa_fp8fp8.commands.demo_report import report
from vllm_ffa_fp8fp8.commands.engine_process import run_engine

ROOT = Path(__file__).parents[2]
QUESTION = Question("", "bada", "12345", 0.5)
RIGHT, WRONG = " 12345.", " 99999."


@pytest.fixture
def no_engine(monkeypatch):
    monkeypatch.setattr(demo, "watch", None)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


def test_questions_have_the_length_and_one_note_each():
    count = token_counter(find_model())
    questions = make_questions(8000, count)
    assert questions == make_questions(8000, count)
    assert len({question.word for question in questions}) == 4
    for question in questions:
        note = f"\n# note: the code of {question.word} is {question.code}.\n"
        assert 7800 <= count(question.prompt) <= 8000
        assert question.prompt.count(note) == 1
        assert question.prompt.count("# note: the code of") == 16
        assert question.prompt.endswith(f"\n# recall: the code of {question.word} is")
    files = {question.prompt.rpartition("\n# recall")[0] for question in questions}
    assert len(files) == 1  # a shared prefix


def test_lookalikes_differ_in_a_syllable():
    count = token_counter(find_model())
    (question,) = make_questions(3000, count, asked=1, notes=2, lookalikes=5, first_line=10**6)
    words = [line.split()[5] for line in question.prompt.splitlines() if "# note:" in line]
    assert len(set(words)) == 12 and 2900 <= count(question.prompt) <= 3000

    def changed(word: str) -> int:
        return sum(
            word[place : place + 2] != question.word[place : place + 2] for place in (0, 2, 4)
        )

    assert sum(changed(word) == 1 for word in words) >= 5


def test_questions_that_cannot_be_made():
    with pytest.raises(ValueError, match="asked=17"):
        make_questions(8000, len, asked=17)
    with pytest.raises(ValueError, match="too short"):
        make_questions(10**9, len)


@pytest.mark.parametrize(
    "answer, right",
    [
        (" 12345.", True),
        (" 12345", True),
        ("12345. import os", True),
        (" 12354.", False),
        (" 123456.", False),
        (" 0 12345.", False),
        ("", False),
    ],
)
def test_question_is_answered_by(answer, right):
    assert QUESTION.is_answered_by(answer) == right


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--questions", "17"], "--questions is a number from 1 to 16, not 17"),
        (["--questions", "0"], "not 0"),
        (["--tokens", "99999999"], "the model has 32,768 positions"),
        (["--tokens", "32737"], "give 32736 at most"),
        (["--tokens", "0"], "--tokens 0 is too short: the notes and the question alone take"),
        (["--tokens", "-5"], "--tokens -5 is too short"),
        (["--tokens", "100"], "--tokens 100 is too short"),
        (["--model", "no/such-model"], "no/such-model is neither a model's folder nor the name"),
        (["--model", "no such model"], "is neither a model's folder nor the name"),
    ],
)
def test_demo_tells_wrong_arguments(no_engine, capsys, arguments, words):
    assert cli.main(["demo", *arguments]) == 2
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("asked, length", [([], 3_000), (["--tokens", "32736"], 32_736)])
def test_prompts_fit_the_model(monkeypatch, asked, length):
    monkeypatch.setattr(environment, "is_cpu_build", lambda: True)
    assert demo.prompt_length(options(*asked), find_model()) == length


def test_prompts_are_shorter_for_a_smaller_model(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')
    assert demo.prompt_length(options(), tmp_path) == 2048 - demo.ANSWER_ROOM


def test_the_model_of_the_current_clone_is_found(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo_model, "__file__", str(tmp_path / "site-packages" / "demo_model.py"))
    monkeypatch.chdir(ROOT)
    assert find_model() == str(ROOT / demo_model.MODEL)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 2
    assert "neither what is installed nor the current folder is a clone" in capsys.readouterr().out
    assert cli.main(["demo", "--model", str(tmp_path)]) == 2
    assert "it has no config.json and no tokenizer.json" in capsys.readouterr().out


def test_a_downloaded_model_is_found_by_its_name(monkeypatch, tmp_path):
    """In the hub's cache, as the hub's client lays it out."""
    repository = tmp_path / "models--someone--recall"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    snapshot.mkdir(parents=True)
    for file in demo_model.NEEDED:
        (snapshot / file).write_bytes(Path(find_model(), file).read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert demo_model.model_folder("someone/recall") == str(snapshot)


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer.json", "{"),
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"max_position_embeddings": null}'),
    ],
)
def test_a_broken_file_of_a_model_is_named(no_engine, tmp_path, capsys, name, text):
    for file in demo_model.NEEDED:
        (tmp_path / file).write_bytes(Path(find_model(), file).read_bytes())
    (tmp_path / name).write_text(text)
    assert cli.main(["demo", "--model", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / name} is no ")
    assert line.endswith("restore the file, or name another model with --model FOLDER.")


@pytest.mark.parametrize(
    "arguments, names",
    [
        ([], ["balanced", "tau=0.048", "tau=0.19"]),
        (["--delta", "1", "3"], ["delta=1", "delta=3"]),
        (
            ["--preset", "fast", "--setting", "delta=5,block_size=16"],
            ["fast", "delta=5,block_size=16"],
        ),
    ],
)
def test_settings_are_those_asked_for(monkeypatch, arguments, names):
    monkeypatch.delenv("FFA_FP8FP8_CONFIG", raising=False)
    assert [s.name for s in demo.demo_settings(options(*arguments))] == names


@pytest.mark.parametrize(
    "text, values",
    [
        ("tau: 0.05\nblock_size: 32", ["tau=0.2", "tau=0.8"]),
        ("tau: 0.3", ["tau=0.99"]),
        ("delta: 10", ["delta=5", "delta=2.5"]),
        ("delta: .inf", ["balanced", "fast"]),
    ],
)
def test_the_options_in_force_come_first_and_others_have_their_rule(
    monkeypatch, tmp_path, text, values
):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    monkeypatch.setenv("FFA_FP8FP8_CONFIG", str(file))
    first, *others = demo.demo_settings(options())
    assert [setting.name for setting in (first, *others)] == [str(file), *values]
    assert len({setting.config.block_size for setting in (first, *others)}) == 1


def run_of(*answers: str, **more) -> dict:
    return {
        "answers": list(answers),
        "prompt_tokens": [9876] * len(answers),
        "first_seconds": 1.0,
        "other_seconds": 2.0,
        "cache_bytes_per_token": 4104,
    } | more


@pytest.mark.parametrize(
    "default, first, second, exit_code, told",
    [
        (RIGHT, RIGHT, RIGHT, 0, "balanced has 1 of the default backend's 1 right answer."),
        (RIGHT, RIGHT, WRONG, 0, "balanced has 1 of"),
        (RIGHT, WRONG, RIGHT, 1, "balanced has 0 of the default backend's 1 right answer."),
        (WRONG, RIGHT, RIGHT, 1, "The default backend answers nothing"),
    ],
)
def test_report_fails_where_the_first_setting_loses_an_answer(
    default, first, second, exit_code, told
):
    runs = {
        "default backend": run_of(default),
        "balanced": run_of(first, kept=0.4321),
        "delta=2": run_of(second, kept=None),
    }
    screen = Console(record=True, width=160)
    assert report(screen, [QUESTION], runs) == exit_code
    shown = screen.export_text()
    assert told in shown and "43.2%" in shown and "9,876" in shown
    assert "all: it has no pruning" in shown and "all: shorter than min_context" in shown
    assert shown.count("(wrong)") == [default, first, second].count(WRONG)


@pytest.mark.parametrize("count", [1, 2])
def test_report_speaks_of_other_questions_only_where_there_are_any(count):
    runs = {name: run_of(*[RIGHT] * count, kept=0.5) for name in ("default backend", "balanced")}
    screen = Console(record=True, width=160)
    assert report(screen, [QUESTION] * count, runs) == 0
    shown = screen.export_text()
    assert f"{1} of {count}" in shown or f"{count} of {count}" in shown
    assert ("the others" in shown) == (count > 1)


def test_engine_failure_is_told_and_logged(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match="KeyError: 'llm'"):
        list(run_engine({}, str(log), generate))
    assert "Traceback" in log.read_text()
