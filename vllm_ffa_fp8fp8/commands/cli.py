"""The command `ffa-fp8fp8`."""

import argparse
import importlib
import sys

from vllm_ffa_fp8fp8 import environment

DESCRIPTION = (
    "Checks, shows and measures FFA_FP8FP8, an attention backend for vLLM that reads less memory "
    "where it decodes over long contexts. `ffa-fp8fp8 COMMAND --help` lists a command's options."
)
BENCH = "time kernels, layers or a model beside FlashAttention"
ALL_BENCHMARKS = (
    "What is measured is kept as JSON and reused by later runs of the same code on such a GPU with "
    "such versions; `ffa-fp8fp8 plot` draws it."
)
COMMANDS = {
    "doctor": "say what this machine has, which path would run, and what is missing",
    "config": "say what each option is for, and check and show the options in force",
    "demo": "ask for codes hidden in a long file, with FFA_FP8FP8 and with vLLM's default backend",
    "eval": "score a model's answers with settings of FFA_FP8FP8 and without, by tasks of lm-eval",
    "record": "save what a model's attention layers see on your prompts, for `bench layers`",
    "quality": "compare next-token distributions with the default backend's on your text",
    "calibrate": "find the tau or delta that reaches a wished quality on your model and text",
    "plot": "draw what bench and quality measured",
}
"""Each is a module of this folder with `add_arguments(parser)` and `run(options)`."""
BENCHMARKS = {
    "layers": "recorded layers of a real model: latency, error and kept fraction of settings",
    "decode": "decode attention on planted keys beside FlashAttention 3, on a Hopper GPU",
    "serving": "a whole model's output tokens with FFA_FP8FP8 and with FlashAttention",
    "kproj": "one kernel from hidden states to the cache beside vLLM's linear layer and rotary "
    "kernel and our cache write, on a GPU with FP8",
}
"""The same, in modules named `bench_...`."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="ffa-fp8fp8", description=DESCRIPTION)
    version = environment.version_of(environment.PROJECT) or "(not installed)"
    parser.add_argument("--version", action="version", version=f"{environment.PROJECT} {version}")
    commands = add_commands(parser, COMMANDS)
    description = f"{sentence(BENCH)} {ALL_BENCHMARKS}"
    bench = commands.add_parser("bench", help=BENCH, description=description)
    add_commands(bench, BENCHMARKS, "bench_")
    name, _, benchmark = (arguments or [""])[0].partition("-")
    if name == "bench" and benchmark in BENCHMARKS:
        parser.error(f"{arguments[0]} is now: ffa-fp8fp8 bench {benchmark}")
    options = parser.parse_args(arguments)
    return options.run(options)


def add_commands(
    parser: argparse.ArgumentParser, described: dict[str, str], prefix: str = ""
) -> argparse._SubParsersAction:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in described.items():
        command = commands.add_parser(name, help=text, description=sentence(text))
        module = importlib.import_module(f"vllm_ffa_fp8fp8.commands.{prefix}{name}")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return commands


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    raise SystemExit(main())
