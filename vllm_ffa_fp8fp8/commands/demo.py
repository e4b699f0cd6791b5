"""`make demo`: codes hidden in a long file, asked with FFA_FP8FP8 and with the default backend."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.commands.demo_engine import generate
from vllm_ffa_fp8fp8.commands.demo_prompts import Question, make_questions
from vllm_ffa_fp8fp8.commands.engine_process import watch

MODEL = Path("tests", "assets", "recall-9m")
OURS = {
    "attention_backend": "FFA_FP8FP8",
    "worker_extension_cls": "vllm_ffa_fp8fp8.stats.WorkerExtension",
    "additional_config": {"ffa_fp8fp8": {"record_skip_ratio": True}},
}
NOTES = 16
DEFAULT_TOKENS = {"cpu": 12_000, "gpu": 16_000}
ANSWER_ROOM = 32
"""Tokens after a prompt: an answer, and some to spare."""
NO_MODEL = (
    f"The demo's model, {MODEL}, is part of the repository, and neither what is installed nor the "
    "current folder is a clone of it: run this in a clone, or name a model with --model FOLDER."
)
OTHER_MODEL = "restore the file, or name another model with --model FOLDER."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=int, metavar="N",
        help="prompt length, as far as the model's positions go (default: {cpu} on the CPU, {gpu} "
        "on a GPU)".format_map(DEFAULT_TOKENS),
    )  # fmt: skip
    parser.add_argument(
        "--questions", type=int, default=4, metavar="N",
        help=f"codes to ask for, 1 to {NOTES} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="FOLDER", help=f"a model's folder (default: {MODEL} of the clone)"
    )


def run(options: argparse.Namespace) -> int:
    console = Console()
    if environment.vllm_version() is None:
        print(environment.NO_VLLM)
        return 1
    model = options.model or find_model()
    if problem := missing_model(model):
        print(problem)
        return 1
    try:
        count = token_counter(model)
        tokens = prompt_length(options, model)
        questions = make_questions(tokens, count, asked=options.questions, notes=NOTES)
    except ValueError as error:
        print(error)
        return 2
    longest = max(count(question.prompt) for question in questions)
    console.print(
        f"{longest:,} tokens of Python source hide {NOTES} notes like\n"
        f"  [green]# note: the code of {questions[0].word} is {questions[0].code}.[/]\n"
        f"Codes to ask for, one a prompt: {len(questions)}. Such a prompt ends like\n"
        f"  [green]# recall: the code of {questions[0].word} is[/]"
    )
    shared = {"model": model, "max_model_len": longest + ANSWER_ROOM, "seed": 0}
    results = []
    for name, choice in (("FFA_FP8FP8", OURS), ("default backend", {})):
        job = {"llm": shared | choice, "prompts": [question.prompt for question in questions]}
        results.append(watch(console, name, job, generate))
        if results[-1] is None:
            return 1
    return report(console, questions, *results)


def find_model() -> str | None:
    """The model of the clone that this is installed from (`pip install -e`), or that it runs in."""
    for clone in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (clone / MODEL).is_dir():
            return str(clone / MODEL)
    return None


def missing_model(model: str | None) -> str | None:
    """Why no model can be read, or None."""
    if model is None:
        return NO_MODEL
    needed = ("config.json", "tokenizer.json")
    missing = [name for name in needed if not Path(model, name).is_file()]
    return f"No model in {model}: it has no {' and no '.join(missing)}." if missing else None


def prompt_length(options: argparse.Namespace, model: str) -> int:
    """What the options ask for, of a length that the model has positions for. Raises ValueError,
    also where config.json cannot be read."""
    if not 1 <= options.questions <= NOTES:
        raise ValueError(f"--questions is a number from 1 to {NOTES}, not {options.questions}")
    file = Path(model, "config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        positions = config.get("text_config", config).get("max_position_embeddings", math.inf)
        most = positions - ANSWER_ROOM
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no model's configuration ({error}): {OTHER_MODEL}") from error
    if options.tokens is None:
        return min(most, DEFAULT_TOKENS["cpu" if environment.is_cpu_build() else "gpu"])
    if options.tokens > most:
        raise ValueError(
            f"--tokens {options.tokens} is too long: the model has {positions:,} positions, of "
            f"which the answer takes {ANSWER_ROOM}; give {most} at most"
        )
    return options.tokens


def token_counter(model: str) -> Callable[[str], int]:
    """What counts the tokens of a text. Raises ValueError for a broken tokenizer.json."""
    from tokenizers import Tokenizer

    file = Path(model, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file} is no tokenizer ({error}): {OTHER_MODEL}") from error
    return lambda text: len(tokenizer.encode(text).ids)


def report(
    console: Console, questions: list[Question], ours: dict[str, Any], default: dict[str, Any]
) -> int:
    answers = Table(title="Answers", title_justify="left")
    backends = (ours["backend"], default["backend"])
    for heading in ("code of", "hidden at", "expected", *backends, "agree"):
        answers.add_column(heading)
    pairs = list(zip(ours["answers"], default["answers"], strict=True))
    for question, (our_answer, default_answer) in zip(questions, pairs, strict=True):
        answers.add_row(
            question.word,
            f"{question.depth:.0%} of the file",
            question.code,
            marked(question, our_answer),
            marked(question, default_answer),
            "yes" if our_answer == default_answer else "[red]no[/]",
        )
    console.print(answers)

    figures = Table(title="Figures", title_justify="left")
    for heading in ("", *backends):
        figures.add_column(heading)
    for label, show in (
        ("prompt length, tokens", lambda result: f"{max(result['prompt_tokens']):,}"),
        ("blocks kept in decode", lambda result: shown_kept(result.get("kept"))),
        ("cache bytes per token", lambda result: f"{result['cache_bytes_per_token']:,}"),
        ("first question, reads the file", lambda result: f"{result['first_seconds']:.1f} s"),
        ("the other questions, file cached", lambda result: f"{result['other_seconds']:.1f} s"),
        ("their tokens from the cache", lambda result: f"{sum(result['cached_tokens'][1:]):,}"),
    ):
        figures.add_row(label, show(ours), show(default))
    console.print(figures)
    if environment.is_cpu_build():
        console.print(
            "On the CPU FFA_FP8FP8 runs in plain PyTorch: its times say nothing about a GPU."
        )

    agreed = sum(our_answer == default_answer for our_answer, default_answer in pairs)
    wrong = sum(
        not question.is_answered_by(answer)
        for question, pair in zip(questions, pairs, strict=True)
        for answer in pair
    )
    console.print(f"They agree on {agreed} of {len(pairs)} answers; {wrong} answers are wrong.")
    return 1 if wrong else 0


def marked(question: Question, answer: str) -> str:
    text = escape(answer.strip() or "(nothing)")
    return f"[green]{text}[/]" if question.is_answered_by(answer) else f"[red]{text} (wrong)[/]"


def shown_kept(kept: float | None) -> str:
    return "all: it has no pruning" if kept is None else f"{kept:.1%}"
