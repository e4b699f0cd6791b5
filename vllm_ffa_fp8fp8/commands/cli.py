"""The command `ffa-fp8fp8`."""

import argparse

DESCRIPTION = (
    "Checks, shows and times FFA_FP8FP8, an attention backend for vLLM that reads less memory "
    "where it decodes over long contexts. `ffa-fp8fp8 COMMAND --help` lists a command's options."
)
DOCTOR = "say what this machine has, which path would run, and what is missing"
DEMO = "ask for codes hidden in a long file, with FFA_FP8FP8 and with vLLM's default backend"
BENCH_DECODE = "time decode attention beside FlashAttention 3, on a Hopper GPU"
BENCH_SERVING = "time a whole model's output tokens with FFA_FP8FP8 and with FlashAttention"
BENCH_KPROJ = (
    "time one kernel from hidden states to the cache beside vLLM's linear layer and rotary kernel "
    "and our cache write, on a GPU with FP8"
)


def main(arguments: list[str] | None = None) -> int:
    from vllm_ffa_fp8fp8 import environment
    from vllm_ffa_fp8fp8.commands import bench_decode, bench_kproj, bench_serving, demo, doctor

    parser = argparse.ArgumentParser(prog="ffa-fp8fp8", description=DESCRIPTION)
    version = environment.version_of(environment.PROJECT) or "(not installed)"
    parser.add_argument("--version", action="version", version=f"{environment.PROJECT} {version}")
    names = "doctor|demo|bench-decode|bench-serving|bench-kproj"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for name, module, description in (
        ("doctor", doctor, DOCTOR),
        ("demo", demo, DEMO),
        ("bench-decode", bench_decode, BENCH_DECODE),
        ("bench-serving", bench_serving, BENCH_SERVING),
        ("bench-kproj", bench_kproj, BENCH_KPROJ),
    ):
        command = commands.add_parser(name, help=description, description=description)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    raise SystemExit(main())
