"""What the demo shows of its runs."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench.report import show_table, table
from vllm_ffa_fp8fp8.commands.demo_prompts import Question


def report(screen: Console, questions: list[Question], results: dict[str, dict[str, Any]]) -> int:
    """Shows `results`, as `generate` makes them: the default backend's first, then each setting's
    by its name. Returns the exit code: 1 where the first setting lost one of the default backend's
    answers, or where that has none."""
    show_table(screen, answer_table(questions, results))
    show_table(screen, setting_table(questions, results))
    if environment.is_cpu_build():
        screen.print(
            "On the CPU FFA_FP8FP8 runs in plain PyTorch: its times say nothing about a GPU."
        )
    reference, *ours = (right_answers(questions, result) for result in results.values())
    if not reference:
        screen.print("The default backend answers nothing: ask fewer --tokens, or another --model.")
        return 1
    lost = reference - ours[0]
    name = list(results)[1]
    kept, all_right = len(reference) - len(lost), len(reference)
    answers = "answer" if all_right == 1 else "answers"
    screen.print(f"{name} has {kept} of the default backend's {all_right} right {answers}.")
    screen.print(
        "A larger tau, or a smaller delta, reads fewer blocks, until answers get lost. Your own "
        "model and text:\n"
        "`ffa-fp8fp8 quality` says what a setting changes, `ffa-fp8fp8 eval` what it answers."
    )
    return 1 if lost else 0


def right_answers(questions: list[Question], result: dict[str, Any]) -> set[str]:
    pairs = zip(questions, result["answers"], strict=True)
    return {question.word for question, answer in pairs if question.is_answered_by(answer)}


def answer_table(questions: list[Question], results: dict[str, dict[str, Any]]) -> Table:
    answers = table("Answers", "code of", "hidden at", "expected", *results)
    for place, question in enumerate(questions):
        shown = [marked(question, result["answers"][place]) for result in results.values()]
        depth = f"{question.depth:.0%} of the file"
        answers.add_row(question.word, depth, question.code, *shown)
    return answers


def setting_table(questions: list[Question], results: dict[str, dict[str, Any]]) -> Table:
    """What came from the cache, and how long that took, only where there was a second question."""
    several = len(questions) > 1
    headings = ["", "right answers", "kept in decode", "cache bytes per token"]
    headings += ["first question" if several else "answer"]
    headings += ["the others, file cached"] * several
    (tokens,) = {max(result["prompt_tokens"]) for result in results.values()}
    settings = table(f"Settings, at {tokens:,} tokens", *headings)
    for name, result in results.items():
        seconds = [result["first_seconds"], result["other_seconds"]][: 1 + several]
        settings.add_row(
            name,
            f"{len(right_answers(questions, result))} of {len(questions)}",
            shown_kept(result),
            f"{result['cache_bytes_per_token']:,}",
            *(f"{time:.1f} s" for time in seconds),
        )
    return settings


def marked(question: Question, answer: str) -> Text:
    text = answer.strip() or "(nothing)"
    right = question.is_answered_by(answer)
    return Text(text, "green") if right else Text(f"{text} (wrong)", "red")


def shown_kept(result: dict[str, Any]) -> str:
    """The fraction of the blocks that decode read in full."""
    if "kept" not in result:
        return "all: it has no pruning"
    kept = result["kept"]
    return "all: shorter than min_context" if kept is None else f"{kept:.1%}"
