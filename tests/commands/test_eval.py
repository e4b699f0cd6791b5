"""eval: its tasks, what it makes of scores, what it refuses, and lm-eval's ways to pass options."""

import json
import re
import shlex
from importlib import resources
from pathlib import Path

import pytest
from rich.console import Console

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.commands import cli, eval, eval_engine, eval_report, eval_tasks
from vllm_ffa_fp8fp8.commands.demo_model import find_model, token_counter
from vllm_ffa_fp8fp8.settings import parse_setting

MODEL = find_model()
PAGE = Path(__file__).parents[2] / "docs" / "lm-eval.md"
GENERATING = {"ffa_retrieval": 10, "ffa_distractors": 10, "ffa_majority": 4, "ffa_list": 1}
"""Documents of a text."""


@pytest.fixture(scope="module")
def load_task():
    from lm_eval.tasks import TaskManager

    folder = str(resources.files("vllm_ffa_fp8fp8.configs") / "lm_eval")

    def load(name: str, **metadata):
        given = {"pretrained": MODEL, "max_model_len": 5000, "texts": 2} | metadata
        manager = TaskManager(include_path=folder, include_defaults=False, metadata=given)
        assert sorted(manager.all_tasks) == sorted(eval.TASKS)
        return manager.load([name])["tasks"][name]

    return load


@pytest.mark.parametrize("name, each", GENERATING.items())
def test_tasks_ask_at_every_length_that_the_model_takes(load_task, name, each):
    task = load_task(name)
    count = token_counter(MODEL)
    documents = list(task.eval_docs)
    assert len(documents) == 2 * 2 * each
    assert [document["length"] for document in documents[:2]] == ["2000", "4000"]
    assert len({document["prompt"] for document in documents}) == len(documents)
    for document in documents:
        length = int(document["length"])
        assert 0.97 * length < count(task.doc_to_text(document)) <= 1.01 * length


@pytest.mark.parametrize("name", GENERATING)
def test_a_right_answer_scores_1_and_a_wrong_one_0(load_task, name):
    task = load_task(name, texts=1)
    document = task.eval_docs[0]
    right = task.doc_to_target(document)
    assert task.process_results(document, [right]) == {"2000": 1.0}
    assert task.process_results(document, [re.sub(r"\w", "7", right)]) == {"2000": 0.0}
    assert right.strip() in document["prompt"]  # it can be found


def test_most_notes_of_a_word_have_the_right_code_and_the_others_begin_alike(load_task):
    for document in load_task("ffa_majority", texts=1).eval_docs:
        file, _, question = document["prompt"].rpartition("\n# recall: the code of ")
        word = question.split()[0]
        codes = re.findall(rf"# note: the code of {word} is (\d+)\.", file)
        right = document["answer"]
        assert codes.count(right) == eval_tasks.AGREEING > eval_tasks.OTHERS > 0
        (other,) = set(codes) - {right}
        assert codes.count(other) == eval_tasks.OTHERS and other[:3] == right[:3]


def test_a_list_scores_the_items_at_their_places(load_task):
    task = load_task("ffa_list", texts=1)
    document = task.eval_docs[0]
    lines = task.doc_to_target(document).splitlines()
    almost = "\n".join(lines[:-1] + [lines[0]])
    (score,) = task.process_results(document, [almost]).values()
    assert score == 1 - 1 / len(lines)
    (score,) = task.process_results(document, ["\n".join(lines[1:])]).values()
    assert score == 0


@pytest.mark.parametrize("name", ["ffa_loss_source", "ffa_loss_prose"])
def test_losses_are_nats_a_token(load_task, name):
    task = load_task(name)
    document = task.eval_docs[0]
    tokens = token_counter(MODEL)(task.doc_to_target(document))
    assert 1940 < tokens <= 2040
    assert task.process_results(document, [-3.0 * tokens]) == {"2000": 3.0}
    assert task.higher_is_better()["2000"] is False


def test_answers_have_room(load_task):
    for name in GENERATING:
        assert load_task(name).config.generation_kwargs["max_gen_toks"] < eval_tasks.ANSWER_ROOM


def test_a_model_that_takes_no_length_is_told(load_task):
    with pytest.raises(ValueError, match="too long for the model, which takes 1,024"):
        load_task("ffa_retrieval", max_model_len=1024)
    with pytest.raises(ValueError, match="Name the model"):
        eval_tasks.retrieval(lengths=[2000], texts=1)


def answer(scores, kept=None, task="ffa_retrieval", higher_is_better=True) -> dict:
    part = {
        "task": task,
        "length": 2000,
        "scores": scores,
        "higher_is_better": higher_is_better,
        "kept": kept,
    }
    return {"backend": "SOME", "parts": [part]}


def test_the_difference_is_of_the_same_documents():
    results = {"default": answer([1.0, 0.0, 1.0, 0.0]), "fast": answer([1.0, 0.0, 0.0, 0.0], 0.25)}
    default, fast = eval_report.entries([parse_setting("fast")], results)
    assert default["options"] is None and fast["options"]["tau"] == 0.05
    assert default["results"][0]["difference"] == default["results"][0]["difference_stderr"] == 0
    (result,) = fast["results"]
    assert (result["score"], result["difference"], result["kept"]) == (0.25, -0.25, 0.25)
    assert result["stderr"] == result["difference_stderr"] == 0.25
    screen = Console(record=True, width=160)
    eval_report.show(screen, "recall-9m", [default, fast])
    (line,) = (line for line in screen.export_text().splitlines() if "fast" in line)
    assert line.replace("|", "").split() == ["fast", "0.250", "0.250", "-0.250", "0.250", "0.250"]


def test_one_document_has_no_standard_error():
    (entry,) = eval_report.entries([], {"default": answer([1.0])})
    assert entry["results"][0]["stderr"] is None


def test_a_task_that_the_model_never_answers_is_told():
    screen = Console(record=True, width=160)
    eval_report.show(screen, "", eval_report.entries([], {"default": answer([0.0, 0.0])}))
    assert "the model never answers" in screen.export_text()


@pytest.mark.parametrize(
    "name, kept, said",
    [
        ("balanced", 0.5, None),
        ("balanced", 1.0, "skipped nothing: it kept every block"),
        ("delta=5", 1.0, "skipped nothing: it kept every block"),
        (
            "balanced",
            None,
            "pruned nothing: no task decoded behind a prompt of min_context",
        ),
        ("exact", 1.0, None),
        ("exact", None, None),
    ],
)
def test_a_setting_that_prunes_must_skip(name, kept, said):
    sentences = list(eval_report.unpruned([parse_setting(name)], {name: answer([1.0], kept)}))
    assert len(sentences) == (said is not None)
    assert said is None or sentences[0].startswith(f"{name} {said}")


@pytest.fixture
def fake_engines(monkeypatch):
    """Answers by the engine's name, and the jobs that were run."""
    answers, jobs = {}, {}

    def watch(screen, name, job, work):
        jobs[name] = job
        return answers.get(name, answer([1.0, 1.0], 0.5))

    monkeypatch.setattr(eval, "watch", watch)
    monkeypatch.setattr(environment, "is_cpu_build", lambda: True)
    return answers, jobs


def test_every_preset_runs_beside_the_default_backend(fake_engines, tmp_path):
    answers, jobs = fake_engines
    file = tmp_path / "eval.json"
    assert cli.main(["eval", "--json", str(file)]) == 0
    assert list(jobs) == ["default", "balanced", "exact", "fast"]
    default, fast = jobs["default"]["llm"], jobs["fast"]["llm"]
    assert "attention_backend" not in default and fast["attention_backend"] == "FFA_FP8FP8"
    assert fast["additional_config"]["ffa_fp8fp8"]["tau"] == 0.05
    assert default.items() <= fast.items()
    content = json.loads(file.read_text())
    assert [entry["name"] for entry in content["settings"]] == list(jobs)
    assert content["benchmark"] == "eval" and content["environment"]["vllm"]


def test_an_fp8_cache_is_run_where_a_gpu_has_it(fake_engines, monkeypatch):
    _, jobs = fake_engines
    monkeypatch.setattr(environment, "is_cpu_build", lambda: False)
    monkeypatch.setattr(environment, "find_gpu", lambda: environment.GPU("NVIDIA H100", (9, 0)))
    assert cli.main(["eval", "--setting", "delta=3", "--engine-args", "dtype=float16"]) == 0
    assert list(jobs) == ["default", "fp8 cache", "delta=3"]
    assert jobs["fp8 cache"]["llm"]["kv_cache_dtype"] == "fp8"
    assert len(jobs["default"]["parts"]) == 30 and jobs["default"]["limit"] is None
    assert {job["llm"]["dtype"] for job in jobs.values()} == {"float16"}


def test_figures_are_kept_after_each_engine(fake_engines, tmp_path, monkeypatch):
    file, seen = tmp_path / "eval.json", []
    watch = eval.watch

    def watch_file(*arguments):
        seen.append(len(json.loads(file.read_text())["settings"]) if file.exists() else 0)
        return watch(*arguments)

    monkeypatch.setattr(eval, "watch", watch_file)
    assert cli.main(["eval", "--json", str(file)]) == 0
    assert seen == [0, 1, 2, 3]


def test_more_texts_are_all_asked_about(fake_engines):
    _, jobs = fake_engines
    for arguments, found in (([], (None, 10)), (["--texts", "50"], (50, None))):
        assert cli.main(["eval", *arguments]) == 0
        assert (jobs["default"]["texts"], jobs["default"]["limit"]) == found


def test_questions_of_a_text_are_asked_together(monkeypatch):
    """lm-eval sorts what it is given at once."""
    from lm_eval.models.vllm_causallms import VLLM

    asked = []

    def answer_in_order(self, requests, disable_tqdm):
        asked.append(len(requests))
        return [str(request) for request in requests]

    monkeypatch.setattr(VLLM, "generate_until", answer_in_order)
    model = object.__new__(eval_engine.model_class())
    assert model.generate_until(list(range(120))) == list(map(str, range(120)))
    assert asked == [50, 50, 20]


def test_a_preset_that_skipped_nothing_fails(fake_engines, capsys):
    answers, _ = fake_engines
    answers["fast"] = answer([1.0, 1.0], 1.0)
    assert cli.main(["eval"]) == 1
    assert "fast skipped nothing" in capsys.readouterr().out


def test_a_setting_that_does_not_run_fails_and_others_are_shown(fake_engines, tmp_path, capsys):
    answers, jobs = fake_engines
    answers["balanced"] = None
    assert cli.main(["eval", "--json", str(tmp_path / "eval.json")]) == 1
    assert "fast" in capsys.readouterr().out and "fast" in jobs
    kept = json.loads((tmp_path / "eval.json").read_text())["settings"]
    assert [entry["name"] for entry in kept] == ["default", "exact", "fast"]
    answers["default"] = None
    jobs.clear()
    assert cli.main(["eval"]) == 1 and list(jobs) == ["default"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lengths", "32600"], "too long for the model, which takes 32,768"),
        (["--lengths", "2000", "32600"], "--lengths 32600 is too long: the model takes 32,768"),
        (["--lengths", "500"], "--lengths 500 is too short for balanced to skip anything"),
        (["--limit", "-1"], "--limit is 1 or more, not -1"),
        (["--limit", "0"], "--limit is 1 or more, not 0"),
        (["--texts", "0"], "--texts is 1 or more, not 0"),
        (["--model", "no/such-model"], "no/such-model is neither a model's folder nor the name"),
        (["--engine-args", "dtype"], "--engine-args are KEY=VALUE"),
        (["--json", "/"], "--json"),
    ],
)
def test_wrong_arguments_are_told_before_any_engine(fake_engines, capsys, arguments, words):
    assert cli.main(["eval", *arguments]) == 2
    assert words in capsys.readouterr().out and not fake_engines[1]


def test_eval_without_lm_eval_says_what_to_install(monkeypatch, capsys):
    known = environment.version_of
    monkeypatch.setattr(
        environment, "version_of", lambda name: None if name == "lm-eval" else known(name)
    )
    assert cli.main(["eval"]) == 1
    assert "[eval]" in capsys.readouterr().out


def blocks_of_the_page(language: str) -> str:
    return "".join(re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))


def model_args(monkeypatch, command: str) -> dict:
    """What lm-eval makes of a command of the page."""
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    words = shlex.split(command)
    monkeypatch.setattr("sys.argv", words[words.index("lm-eval") :])
    parsed = EvaluatorConfig.from_cli(HarnessCLI().parse_args())
    assert parsed.model == "vllm"
    return parsed.model_args


def test_lm_eval_understands_every_way_of_the_page(tmp_path, monkeypatch):
    (tmp_path / "ffa.yaml").write_text(blocks_of_the_page("yaml"))
    monkeypatch.chdir(tmp_path)
    lines = blocks_of_the_page("sh").replace("\\\n", "").splitlines()
    commands = [line for line in lines if "lm-eval run" in line]
    assert len(commands) == 5
    chosen = {"pretrained": "MODEL", "attention_backend": "FFA_FP8FP8"}
    for command in commands:
        found = model_args(monkeypatch, command)
        assert chosen.items() <= found.items()
        options = found.get("additional_config", {"ffa_fp8fp8": {"tau": 0.05}})
        assert options == {"ffa_fp8fp8": {"tau": 0.05}}
    assert sum("additional_config" in command for command in commands) == 2


def test_what_the_page_says_cannot_work_does_not(monkeypatch):
    (said,) = re.findall(r"`(pretrained=MODEL,additional_config=){", PAGE.read_text("utf-8"))
    arguments = said + '{"ffa_fp8fp8": {"tau": 0.05}}'
    with pytest.raises(ValueError, match="Invalid JSON"):
        model_args(monkeypatch, f"lm-eval run --model vllm --tasks T --model_args '{arguments}'")
