"""`ffa-fp8fp8 quality`: what a setting changes in a model's next-token distributions."""

import argparse
import platform
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench.quality.plan import COPIES, Texts, plan_engines
from vllm_ffa_fp8fp8.bench.quality.report import Report
from vllm_ffa_fp8fp8.bench.recording.prompts import cut_prompts, read_prompts
from vllm_ffa_fp8fp8.bench.report import console
from vllm_ffa_fp8fp8.commands.engine_options import (
    add_engine_arguments,
    check_path,
    engine_arguments,
    run_with_engines,
)
from vllm_ffa_fp8fp8.commands.engine_process import watch
from vllm_ffa_fp8fp8.settings import Setting, add_setting_arguments, settings_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a model's folder or name")
    add("--text", nargs="+", type=Path, default=[], metavar="FILE", help="text files")
    add(
        "--prompts", nargs="+", type=Path, default=[], metavar="FILE",
        help="more texts: text files, or .jsonl files with a text a line",
    )  # fmt: skip
    add_setting_arguments(parser)
    add(
        "--last", type=int, default=128, metavar="N",
        help="tokens at the end of each text that are decoded and judged (default: %(default)s)",
    )  # fmt: skip
    add(
        "--tokens", nargs="+", type=int, default=[], metavar="N",
        help="take only the first N tokens of each text; several N: a table for each "
        "(default: whole texts)",
    )  # fmt: skip
    add(
        "--floor", nargs="*", type=batch_size, metavar="N",
        help="also show the default backend's own rounding: itself in batches of N requests "
        f"(without N: {COPIES})",
    )  # fmt: skip
    add_engine_arguments(parser)
    add(
        "--json", type=Path, metavar="FILE",
        help="keep the figures; with several --tokens a file for each, FILE-N",
    )  # fmt: skip


def batch_size(text: str) -> int:
    size = int(text)
    if size < 2:
        raise ValueError("the reference itself runs alone")
    return size


def run(options: argparse.Namespace) -> int:
    return run_with_engines(lambda: compare(options))


def compare(options: argparse.Namespace) -> int:
    """Raises ValueError for what the user can mend."""
    settings = settings_of(options)
    texts = read_texts(options)
    check_lengths(options, settings, texts)
    arguments = engine_arguments(options.engine_args, "quality")
    check_path(options.json)
    return judge(console(), options, settings, texts, {"model": options.model} | arguments)


def read_texts(options: argparse.Namespace) -> Texts:
    """Raises ValueError."""
    if not options.text and not options.prompts:
        raise ValueError("--text FILE or --prompts FILE: on which text is the model judged?")
    if options.tokens and min(options.tokens) < 1:
        raise ValueError(f"--tokens is 1 or more, not {min(options.tokens)}")
    named = read_prompts([*options.text, *options.prompts])
    encode, positions = load_tokenizer(options.model)
    lengths = list(dict.fromkeys(options.tokens))
    texts = Texts(*cut_prompts(named, lengths, encode))
    for source, tokens in zip(texts.sources, texts.tokens, strict=True):
        if positions and len(tokens) > positions:
            raise ValueError(
                f"{source} has {len(tokens):,} tokens, and the model {positions:,} positions: "
                f"cut it with --tokens {positions} or less"
            )
    return texts


def load_tokenizer(model: str) -> tuple[Any, int | None]:
    """What makes tokens of a text, and how many positions the model has. Raises ValueError."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # what can be wrong with files raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{model!r} is neither a model's folder nor a model that was downloaded: {reason}"
        ) from error
    return tokenizer.encode, getattr(config, "max_position_embeddings", None)


def check_lengths(options: argparse.Namespace, settings: list[Setting], texts: Texts) -> None:
    """Raises ValueError for texts at which there would be nothing to see."""
    last = options.last
    if last < 1:
        raise ValueError(f"--last is 1 or more, not {last}")
    for source, tokens in zip(texts.sources, texts.tokens, strict=True):
        if len(tokens) < last + 2:
            raise ValueError(
                f"{source} is too short: {len(tokens):,} tokens, of which --last {last} are judged "
                "and two or more must stand before them"
            )
        for setting in settings:
            config, shortest = setting.config, len(tokens) - last
            if config.prunes and shortest < config.min_context:
                raise ValueError(
                    f"{source} is too short for {setting.name} to skip anything: the judged tokens "
                    f"begin after {shortest:,}, and min_context is {config.min_context:,}. Give a "
                    f"longer text, or a setting such as --setting {setting.name},min_context=0"
                )


def judge(
    screen: Console, options: argparse.Namespace, settings: list[Setting], texts: Texts,
    llm: dict[str, Any],
) -> int:  # fmt: skip
    """Raises ValueError for what the user can mend."""
    from vllm_ffa_fp8fp8.bench.quality.engine import judge_texts

    gpu = None if environment.is_cpu_build() else environment.find_gpu()
    fp8_cache = gpu is not None and gpu.has_fp8
    floor = [] if options.floor is None else options.floor or [COPIES]
    engines = plan_engines(settings, llm, floor=floor, fp8_cache=fp8_cache)
    report = Report(
        head=head(options, gpu),
        texts=texts,
        last=options.last,
        order=[setting.name for setting in settings],
        lengths=list(dict.fromkeys(options.tokens)) or [None],
        path=options.json,
    )
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            is_reference = engine is engines[0]
            check = settings if is_reference else []
            job = engine.job(texts, options.last, folder, check)
            answer = watch(screen, engine.name, job, judge_texts)
            if answer is None and is_reference:
                return 1
            if answer is None:
                failed = True  # the others' figures still count
            elif "problem" in answer:
                raise ValueError(answer["problem"])
            else:
                report.put(engine, answer)
    report.show(screen)
    return int(failed)


def head(options: argparse.Namespace, gpu: environment.GPU | None) -> dict[str, Any]:
    return {
        "benchmark": "quality",
        "environment": {
            "gpu": gpu.name if gpu else "CPU",
            **environment.stack(),
            "python": platform.python_version(),
            "commit": environment.commit(),
        },
        "model": options.model,
        "engine_args": options.engine_args,
    }
