"""`ffa-fp8fp8 calibrate`: the tau or delta that reaches a wished quality on a user's text."""

import argparse
import shlex
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from vllm_ffa_fp8fp8 import environment, envs
from vllm_ffa_fp8fp8.bench.files import replacing
from vllm_ffa_fp8fp8.bench.quality.plan import Engine, Texts, plan_engines
from vllm_ffa_fp8fp8.bench.quality.report import Report
from vllm_ffa_fp8fp8.bench.quality.search import SCALES, Scale, Wish
from vllm_ffa_fp8fp8.bench.quality.windows import cut_windows
from vllm_ffa_fp8fp8.bench.recording.prompts import read_prompts
from vllm_ffa_fp8fp8.bench.report import console
from vllm_ffa_fp8fp8.commands.engine_options import (
    add_engine_arguments,
    check_path,
    engine_arguments,
    run_with_engines,
)
from vllm_ffa_fp8fp8.commands.engine_process import watch
from vllm_ffa_fp8fp8.commands.quality import check_lengths, head, load_tokenizer
from vllm_ffa_fp8fp8.config import DEFAULT_PRESET
from vllm_ffa_fp8fp8.option_values import RULES
from vllm_ffa_fp8fp8.settings import Setting, parse_setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a model's folder or name")
    add(
        "--text", required=True, nargs="+", type=Path, metavar="FILE",
        help="text files, or .jsonl files with a text a line, of the kind that the model reads",
    )  # fmt: skip
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument(
        "--kl", type=float, metavar="NATS",
        help="the mean KL divergence from the default backend's next tokens to reach: 0.003",
    )  # fmt: skip
    wish.add_argument(
        "--kept", type=float, metavar="FRACTION", help="the fraction of the blocks to read: 0.1"
    )
    add(
        "--rule", choices=RULES,
        help="share: find tau; threshold: find delta (default: --setting's rule, or share)",
    )  # fmt: skip
    add(
        "--setting", metavar="NAME_OR_PAIRS",
        help="the other options: a preset, pairs, or both: balanced | block_size=64 | "
        "fast,v_cache_dtype=fp8 (default: the options in force)",
    )  # fmt: skip
    add(
        "--tokens", type=int, default=8000, metavar="N",
        help="tokens of a window of the text, as long as the requests that you serve "
        "(default: %(default)s)",
    )  # fmt: skip
    add(
        "--windows", type=int, default=8, metavar="N",
        help="windows over which figures are averaged (default: %(default)s)",
    )  # fmt: skip
    add(
        "--last", type=int, default=64, metavar="N",
        help="tokens at the end of each window that are decoded and judged (default: %(default)s)",
    )  # fmt: skip
    add_engine_arguments(parser)
    add(
        "--out", type=Path, metavar="FILE.yaml",
        help="keep the options that were found, for FFA_FP8FP8_CONFIG=FILE.yaml",
    )  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="keep all figures, for `plot`")


def run(options: argparse.Namespace) -> int:
    return run_with_engines(lambda: check_and_calibrate(options))


def check_and_calibrate(options: argparse.Namespace) -> int:
    """Raises ValueError for what the user can mend."""
    wish = wish_of(options)
    base = base_setting(options)
    windows = read_windows(options)
    check_lengths(options, [base], windows)
    if options.out is not None and options.out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out {options.out}: options are read from files named .yaml")
    check_path(options.out, "--out")
    check_path(options.json)
    llm = {"model": options.model, "enforce_eager": True}
    llm |= engine_arguments(options.engine_args, "calibrate")
    return calibrate(console(), options, wish, base, windows, llm)


def wish_of(options: argparse.Namespace) -> Wish:
    """Raises ValueError."""
    if options.kl is not None and not 0 < options.kl < float("inf"):
        raise ValueError(f"--kl is above 0, in nats, such as 0.003, not {options.kl:g}")
    if options.kept is not None and not 0 < options.kept < 1:
        raise ValueError(f"--kept is a fraction between 0 and 1, such as 0.1, not {options.kept:g}")
    return Wish("kept", options.kept) if options.kl is None else Wish("kl_mean", options.kl)


def base_setting(options: argparse.Namespace) -> Setting:
    """What all values share, at the first of them. Raises ValueError."""
    text = options.setting or envs.config() or DEFAULT_PRESET
    rule = options.rule or (parse_setting(text).config.rule if options.setting else "share")
    base = parse_setting(text if "rule=" in text else f"{text},rule={rule}")
    return with_limit(base, SCALES[rule], SCALES[rule].limit(SCALES[rule].first[0]))


def with_limit(base: Setting, scale: Scale, limit: float) -> Setting:
    return Setting(scale.name(limit), base.options | {scale.option: limit})


def read_windows(options: argparse.Namespace) -> Texts:
    """Raises ValueError."""
    named = read_prompts(options.text)
    if options.last < 1:
        raise ValueError(f"--last is 1 or more, not {options.last}")
    if options.windows < len(named):
        raise ValueError(
            f"--windows {options.windows}: each text needs one, and there are {len(named)}"
        )
    if options.tokens < options.last + 2:
        raise ValueError(
            f"--tokens {options.tokens}: --last {options.last} of them are judged, and two or more "
            "must stand before them"
        )
    encode, positions = load_tokenizer(options.model)
    if positions and options.tokens > positions:
        raise ValueError(f"--tokens {options.tokens:,}: the model has {positions:,} positions")
    texts = [(name, list(encode(text))) for name, text in named]
    return cut_windows(
        texts, list(encode("")), count=options.windows, tokens=options.tokens, last=options.last
    )


def calibrate(
    screen: Console, options: argparse.Namespace, wish: Wish, base: Setting, windows: Texts,
    llm: dict[str, Any],
) -> int:  # fmt: skip
    """Raises ValueError for what the user can mend."""
    from vllm_ffa_fp8fp8.bench.quality.calibration import find_limit
    from vllm_ffa_fp8fp8.bench.quality.engine import judge_texts

    gpu = None if environment.is_cpu_build() else environment.find_gpu()
    (reference,) = plan_engines([], llm, floor=[], fp8_cache=False)
    report = Report(head(options, gpu), windows, options.last, [], [None], options.json)
    with tempfile.TemporaryDirectory() as folder:
        job = reference.job(windows, options.last, folder, [base])
        answer = watch(screen, reference.name, job, judge_texts)
        if answer is None:
            return 1
        if "problem" in answer:
            raise ValueError(answer["problem"])
        report.put(reference, answer)
        ours = Engine(llm, [base])
        job = ours.job(windows, options.last, folder, []) | {"wish": (wish.figure, wish.value)}
        answer = watch(screen, f"looking for {wish.name}", job, find_limit)
    if answer is None:
        return 1
    scale = SCALES[base.options["rule"]]
    best = with_limit(base, scale, answer["best"])
    report.order = put_values(report, Engine(llm), base, scale, answer)
    report.show(screen)
    return tell_result(screen, options, wish, best, report)


def put_values(
    report: Report, engine: Engine, base: Setting, scale: Scale, answer: dict[str, Any]
) -> list[str]:
    """Hands the measured values to the report. Returns their names, the most careful last."""
    for limit in answer["limits"]:
        setting = with_limit(base, scale, limit)
        engine.settings.append(setting)
        engine.add(setting.name, limit=limit)
    order = sorted(answer["limits"], reverse=scale.rule == "share")
    report.order = list(map(scale.name, order))
    report.put(engine, answer)
    return report.order


def tell_result(
    screen: Console, options: argparse.Namespace, wish: Wish, best: Setting, report: Report
) -> int:
    content = report.content(None)
    found = next(entry for entry in content["settings"] if entry["name"] == best.name)
    screen.line()
    if not wish.is_reached(found[wish.figure]):
        least = "reading nearly everything" if wish.figure == "kl_mean" else "reading the least"
        screen.print(
            f"{wish.name} is out of reach: {least}, {best.name}, is at KL {found['kl_mean']:.1e}, "
            f"kept {found['kept']:.3f}. Nothing was written; ask for more than that.",
            soft_wrap=True,
        )
        return 1
    text = preset_text(options, best, content, found)
    if options.out is None:
        screen.print(text, soft_wrap=True)
        return 0
    with replacing(options.out) as part:
        part.write_text(text, encoding="utf-8")
    screen.print(
        f"{best.name}: KL {found['kl_mean']:.1e}, kept {found['kept']:.3f}. "
        f"Run with it: FFA_FP8FP8_CONFIG={shlex.quote(str(options.out))}",
        soft_wrap=True,
    )
    return 0


def preset_text(
    options: argparse.Namespace, best: Setting, content: dict[str, Any], found: dict[str, Any]
) -> str:
    """A preset, and what was measured of it in comments."""
    stack = content["environment"]
    texts = ", ".join(map(str, options.text))
    per_window = [part["kl_mean"] for part in found["texts"]]
    wished = f"--kl {options.kl:g}" if options.kept is None else f"--kept {options.kept:g}"
    comments = (
        f"{best.name}, as ffa-fp8fp8 calibrate {wished} found it.",
        f"Model: {options.model}",
        f"Text: {texts}; {len(per_window)} windows of {content['tokens']:,} tokens, the last "
        f"{content['last']} of each judged.",
        f"KL divergence from the default backend, mean: {found['kl_mean']:.2e} nats, of windows "
        f"{min(per_window):.1e} to {max(per_window):.1e}; largest of a token: "
        f"{found['kl_max']:.1e}.",
        f"Kept: {found['kept']:.3f} of the blocks. Loss over the default's: "
        f"{found['loss'] - content['settings'][0]['loss']:+.4f} nats a token.",
        f"{stack['gpu']}; vLLM {stack['vllm']}, torch {stack['torch']}, Triton {stack['triton']}.",
    )
    kept = {name: v for name, v in best.options.items() if name != "record_skip_ratio"}
    lines = [f"# {' '.join(comment.split())}\n" for comment in comments]
    return "".join(lines) + yaml.safe_dump(kept, sort_keys=False, default_flow_style=None)
