"""`make demo`: codes hidden in a long file, asked with settings of FFA_FP8FP8 and without it."""

import argparse
import math

from rich.console import Console

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench.report import console
from vllm_ffa_fp8fp8.commands.demo_engine import arguments_of, generate
from vllm_ffa_fp8fp8.commands.demo_model import (
    MODEL,
    max_positions,
    model_folder,
    token_counter,
)
from vllm_ffa_fp8fp8.commands.demo_prompts import Question, make_questions
from vllm_ffa_fp8fp8.commands.demo_report import report
from vllm_ffa_fp8fp8.commands.engine_process import watch
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.settings import Setting, add_setting_arguments, parse_setting, settings_of

NOTES = 16
COARSER = (4, 16)
"""How many times `tau` is tried beside the one in force; `delta` over the square roots."""
LARGEST_TAU = 0.99
DEFAULT_BACKEND = "default backend"
DEFAULT_TOKENS = {"cpu": 3_000, "gpu": 16_000}
ANSWER_ROOM = 32
"""Tokens after a prompt: an answer, and some to spare."""


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
        "--model", metavar="FOLDER",
        help=f"a model's folder, or the name of one that was downloaded (default: {MODEL} of the "
        "clone)",
    )  # fmt: skip
    add_setting_arguments(parser)
    parser.epilog = (
        f"Without a setting: the options in force, and {' and '.join(map(str, COARSER))} times "
        "their tau (half and a quarter of their delta)."
    )


def run(options: argparse.Namespace) -> int:
    if environment.vllm_version() is None:
        print(environment.NO_VLLM)
        return 1
    try:
        model = model_folder(options.model)
        count = token_counter(model)
        tokens = prompt_length(options, model)
        questions = make_questions(tokens, count, asked=options.questions, notes=NOTES)
        settings = demo_settings(options)
    except ValueError as error:
        print(error)
        return 2
    longest = max(count(question.prompt) for question in questions)
    screen = console()
    tell_questions(screen, questions, longest)
    shared = {"model": model, "max_model_len": longest + ANSWER_ROOM, "seed": 0}
    engines = {DEFAULT_BACKEND: {}} | {s.name: arguments_of(s) for s in settings}
    results = {}
    for name, arguments in engines.items():
        job = {"llm": shared | arguments, "prompts": [question.prompt for question in questions]}
        results[name] = watch(screen, name, job, generate)
        if results[name] is None:
            return 1
    return report(screen, questions, results)


def prompt_length(options: argparse.Namespace, model: str) -> int:
    """What the options ask for, of a length that the model has positions for. Raises ValueError,
    also where config.json cannot be read."""
    if not 1 <= options.questions <= NOTES:
        raise ValueError(f"--questions is a number from 1 to {NOTES}, not {options.questions}")
    positions = max_positions(model)
    most = positions - ANSWER_ROOM
    if options.tokens is None:
        return min(most, DEFAULT_TOKENS["cpu" if environment.is_cpu_build() else "gpu"])
    if options.tokens > most:
        raise ValueError(
            f"--tokens {options.tokens} is too long: the model has {positions:,} positions, of "
            f"which the answer takes {ANSWER_ROOM}; give {most} at most"
        )
    return options.tokens


def demo_settings(options: argparse.Namespace) -> list[Setting]:
    """Those that were asked for, else the options in force and two that read less."""
    settings = settings_of(options)
    if options.settings:
        return settings
    return settings + list(map(parse_setting, coarser(settings[0].config)))


def coarser(config: FFAConfig) -> list[str]:
    """Settings of the same rule that read fewer blocks; the presets that prune where none is
    skipped."""
    if config.limit is None:
        return ["balanced", "fast"]
    if config.rule == "threshold":
        return [f"delta={config.limit / math.sqrt(factor):.3g}" for factor in COARSER]
    taus = (min(LARGEST_TAU, config.limit * factor) for factor in COARSER)
    return list(dict.fromkeys(f"tau={tau:.2g}" for tau in taus))


def tell_questions(screen: Console, questions: list[Question], longest: int) -> None:
    first = questions[0]
    asked = "one code" if len(questions) == 1 else f"{len(questions)} codes, one a prompt"
    screen.print(
        f"{longest:,} tokens of Python source hide {NOTES} notes like\n"
        f"  # note: the code of {first.word} is {first.code}.\n"
        f"The model is asked for {asked}. {'The' if len(questions) == 1 else 'Such a'} prompt "
        f"ends with\n  # recall: the code of {first.word} is"
    )
