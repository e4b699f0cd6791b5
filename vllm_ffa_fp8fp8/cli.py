"""The command `ffa-fp8fp8`."""

import argparse

DOCTOR = "say what this machine has, which path would run, and what is missing"
DEMO = "ask for codes hidden in a long file, with FFA_FP8FP8 and with vLLM's default backend"
BENCH_DECODE = "time decode attention beside FlashAttention 3, on a Hopper GPU"
BENCH_SERVING = "time a whole model's output tokens with FFA_FP8FP8 and with FlashAttention"
BENCH_KPROJ = (
    "time the way from hidden states to the cache beside vLLM's kernels, on a GPU with FP8"
)


def main(arguments: list[str] | None = None) -> int:
    from vllm_ffa_fp8fp8 import bench_decode, bench_kproj, bench_serving, demo, doctor

    parser = argparse.ArgumentParser(prog="ffa-fp8fp8", description=__doc__)
    names = "doctor|demo|bench-decode|bench-serving|bench-kproj"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    commands.add_parser("doctor", help=DOCTOR, description=DOCTOR).set_defaults(
        run=lambda options: doctor.main()
    )
    for name, module, description in (
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
