"""`make demo`: codes hidden in a long file, asked with FFA_FP8FP8 and with the default backend."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_ffa_fp8fp8.demo_engine import run_engine
from vllm_ffa_fp8fp8.demo_prompts import Question, make_questions
from vllm_ffa_fp8fp8.environment import is_cpu_build, vllm_version

MODEL = Path(__file__).resolve().parent.parent / "tests" / "assets" / "recall-9m"
OURS = {
    "attention_backend": "FFA_FP8FP8",
    "worker_extension_cls": "vllm_ffa_fp8fp8.stats.WorkerExtension",
    "additional_config": {"ffa_fp8fp8": {"record_skip_ratio": True}},
}
NOTES = 16
DEFAULT_TOKENS = {"cpu": 12_000, "gpu": 16_000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=int, help="prompt length (default: 12000 on CPU, 16000 on a GPU)"
    )
    parser.add_argument(
        "--questions", type=int, default=4, help=f"codes to ask for, up to {NOTES} (default: 4)"
    )
    parser.add_argument("--model", default=str(MODEL), help="a folder (default: recall-9m)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ffa-fp8fp8 demo", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    console = Console()
    if vllm_version() is None:
        console.print("vLLM is not installed: `ffa-fp8fp8 doctor` says what to do.")
        return 1
    if not Path(options.model, "tokenizer.json").is_file():
        console.print(f"No model in {options.model}: run this in a clone, or use --model.")
        return 1
    tokens = options.tokens or DEFAULT_TOKENS["cpu" if is_cpu_build() else "gpu"]
    count = token_counter(options.model)
    questions = make_questions(tokens, count, asked=options.questions, notes=NOTES)
    longest = max(count(question.prompt) for question in questions)
    console.print(
        f"{longest:,} tokens of Python source hide {NOTES} notes like\n"
        f"  [green]# note: the code of {questions[0].word} is {questions[0].code}.[/]\n"
        f"{len(questions)} prompts ask for one code each, and end like\n"
        f"  [green]# recall: the code of {questions[0].word} is[/]"
    )
    shared = {"model": options.model, "max_model_len": longest + 32, "seed": 0}
    results = []
    for name, choice in (("FFA_FP8FP8", OURS), ("default backend", {})):
        job = {"llm": shared | choice, "prompts": [question.prompt for question in questions]}
        results.append(watch(console, name, job))
        if results[-1] is None:
            return 1
    return report(console, questions, *results)


def token_counter(model: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model, "tokenizer.json")))
    return lambda text: len(tokenizer.encode(text).ids)


def watch(
    console: Console, name: str, job: dict[str, Any], work: Callable | None = None
) -> dict[str, Any] | None:
    """Runs one job of `run_engine`, shows what it is doing, and its log only if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "vllm.log")
        start = time.monotonic()
        try:
            with console.status(name) as status:
                for kind, value in run_engine(job, str(log), work):
                    if kind == "result":
                        console.print(f"{name}: done in {time.monotonic() - start:.0f} s")
                        return value
                    status.update(f"{name}: {value}")
                    if not console.is_terminal:
                        console.print(f"{name}: {value} ({time.monotonic() - start:.0f} s)")
        except RuntimeError as error:
            console.print(escape(log.read_text(errors="replace")[-6000:]), style="dim")
            console.print(f"[red]{name} failed[/]: {escape(str(error))}")
    return None


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
        ("blocks skipped in decode", lambda result: shown_ratio(result.get("skip_ratio"))),
        ("cache bytes per token", lambda result: f"{result['cache_bytes_per_token']:,}"),
        ("first question, reads the file", lambda result: f"{result['first_seconds']:.1f} s"),
        ("the other questions, file cached", lambda result: f"{result['other_seconds']:.1f} s"),
        ("their tokens from the cache", lambda result: f"{sum(result['cached_tokens'][1:]):,}"),
    ):
        figures.add_row(label, show(ours), show(default))
    console.print(figures)

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


def shown_ratio(ratio: float | None) -> str:
    return "none: it has no pruning" if ratio is None else f"{ratio:.1%}"


if __name__ == "__main__":
    raise SystemExit(main())
