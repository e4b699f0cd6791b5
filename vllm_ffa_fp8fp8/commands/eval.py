"""`ffa-fp8fp8 eval`: what a model answers with settings of FFA_FP8FP8, by tasks of lm-eval."""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench.files import replacing
from vllm_ffa_fp8fp8.bench.quality.plan import DEFAULT, FP8_CACHE
from vllm_ffa_fp8fp8.bench.report import console
from vllm_ffa_fp8fp8.commands.demo_engine import arguments_of
from vllm_ffa_fp8fp8.commands.demo_model import MODEL, max_positions, model_folder
from vllm_ffa_fp8fp8.commands.engine_options import (
    add_engine_arguments,
    check_path,
    engine_arguments,
    run_with_engines,
)
from vllm_ffa_fp8fp8.commands.engine_process import watch
from vllm_ffa_fp8fp8.commands.eval_engine import evaluate
from vllm_ffa_fp8fp8.commands.eval_report import entries, show, unpruned
from vllm_ffa_fp8fp8.commands.eval_tasks import ANSWER_ROOM, NOTES, fitting_lengths
from vllm_ffa_fp8fp8.config import preset_names
from vllm_ffa_fp8fp8.settings import Setting, add_setting_arguments, parse_setting, settings_of

CPU_TASKS = ("ffa_retrieval", "ffa_distractors", "ffa_majority", "ffa_loss_source")
TASKS = (*CPU_TASKS, "ffa_list", "ffa_loss_prose")
LENGTHS, CPU_LENGTHS = (2_000, 4_000, 8_000, 16_000, 31_000), (2_000,)
CPU_LIMIT = 10
STEP_TOKENS = 2_048
"""Of a prefill step: longer prompts are read in several, from the cache and not only into it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model", metavar="FOLDER",
        help=f"a model's folder, or the name of one that was downloaded (default: {MODEL} of the "
        "clone)",
    )  # fmt: skip
    add_setting_arguments(parser)
    parser.epilog = "Without a setting: every preset."
    add(
        "--tasks", nargs="+", choices=TASKS, metavar="TASK",
        help=f"{', '.join(TASKS)} (default: all, on the CPU {', '.join(CPU_TASKS)})",
    )  # fmt: skip
    add(
        "--lengths", nargs="+", type=int, metavar="TOKENS",
        help=f"lengths of the prompts (default: those of {' '.join(map(str, LENGTHS))} that the "
        f"model takes, on the CPU {' '.join(map(str, CPU_LENGTHS))})",
    )  # fmt: skip
    add(
        "--texts", type=int, metavar="N",
        help="texts of each task and length, of which those of codes ask "
        f"{NOTES} questions each: 50 for 500 questions (default: 3 or 10, as the task has it)",
    )  # fmt: skip
    add(
        "--limit", type=int, metavar="N",
        help=f"documents of each task and length (default: all, on the CPU {CPU_LIMIT} unless "
        "--texts is given)",
    )  # fmt: skip
    add_engine_arguments(parser)
    add("--json", type=Path, metavar="FILE", help="keep the figures")


def run(options: argparse.Namespace) -> int:
    return run_with_engines(lambda: check_and_compare(options))


def check_and_compare(options: argparse.Namespace) -> int:
    """Raises ValueError for what the user can mend."""
    if environment.version_of("lm-eval") is None:
        print(f"eval runs tasks of lm-eval: {environment.install_command('eval')}")
        return 1
    settings = eval_settings(options)
    job = make_job(options, settings)
    check_path(options.json)
    return compare(options, settings, job)


def eval_settings(options: argparse.Namespace) -> list[Setting]:
    """Those that were asked for, else every preset. Raises ValueError."""
    return settings_of(options) if options.settings else list(map(parse_setting, preset_names()))


def make_job(options: argparse.Namespace, settings: list[Setting]) -> dict[str, Any]:
    """What `evaluate` takes, for all engines. Raises ValueError."""
    on_cpu = environment.is_cpu_build()
    for name in ("limit", "texts"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ValueError(f"--{name} is 1 or more, not {number}")
    limit = options.limit
    if limit is None and options.texts is None and on_cpu:
        limit = CPU_LIMIT
    folder = model_folder(options.model)
    asked = options.lengths or (CPU_LENGTHS if on_cpu else LENGTHS)
    lengths = fitting_lengths(asked, max_positions(folder))
    if options.lengths and len(lengths) < len(asked):
        raise ValueError(
            f"--lengths {max(asked)} is too long: the model takes {max_positions(folder):,} "
            f"tokens, of which the answer takes {ANSWER_ROOM}"
        )
    check_context(settings, lengths)
    tasks = options.tasks or (CPU_TASKS if on_cpu else TASKS)
    own = {
        "pretrained": folder,
        "max_model_len": max(lengths) + ANSWER_ROOM,
        "max_num_batched_tokens": STEP_TOKENS,
        "seed": 0,
    }
    return {
        "llm": own | engine_arguments(options.engine_args, "eval"),
        "parts": [(task, length) for task in dict.fromkeys(tasks) for length in lengths],
        "limit": limit,
        "texts": options.texts,
    }


def check_context(settings: list[Setting], lengths: list[int]) -> None:
    """Raises ValueError for prompts at which nothing could be skipped."""
    for setting in settings:
        if setting.config.prunes and max(lengths) < setting.config.min_context:
            raise ValueError(
                f"--lengths {max(lengths)} is too short for {setting.name} to skip anything: its "
                f"min_context is {setting.config.min_context:,} tokens. Give longer prompts, or a "
                f"setting such as --setting {setting.name},min_context=0"
            )


def compare(options: argparse.Namespace, settings: list[Setting], job: dict[str, Any]) -> int:
    """Runs the engines, shows and keeps what they answered."""
    screen = console()
    gpu = None if environment.is_cpu_build() else environment.find_gpu()
    engines: dict[str, dict[str, Any]] = {DEFAULT: {}}
    if gpu is not None and gpu.has_fp8:
        engines[FP8_CACHE] = {"kv_cache_dtype": "fp8"}
    engines |= {setting.name: arguments_of(setting) for setting in settings}
    results = {}
    for name, arguments in engines.items():
        answer = watch(screen, name, job | {"llm": job["llm"] | arguments}, evaluate)
        if answer is not None:
            results[name] = answer
            keep(options, gpu, entries(settings, results))
        elif name == DEFAULT:
            return 1
    show(screen, Path(job["llm"]["pretrained"]).name, entries(settings, results))
    problems = list(unpruned(settings, results))
    for problem in problems:
        screen.print(problem)
    return int(bool(problems) or len(results) < len(engines))


def keep(
    options: argparse.Namespace, gpu: environment.GPU | None, found: list[dict[str, Any]]
) -> None:
    """Writes what was found so far, since the next engine may take an hour."""
    if options.json:
        with replacing(options.json) as part:
            part.write_text(json.dumps(head(options, gpu) | {"settings": found}, indent=1) + "\n")


def head(options: argparse.Namespace, gpu: environment.GPU | None) -> dict[str, Any]:
    return {
        "benchmark": "eval",
        "environment": {
            "gpu": gpu.name if gpu else "CPU",
            **environment.stack(),
            "lm-eval": environment.version_of("lm-eval"),
            "python": platform.python_version(),
            "commit": environment.commit(),
        },
        "model": str(options.model or MODEL),
        "engine_args": options.engine_args,
    }
