"""The command `ffa-fp8fp8`."""

import argparse

DOCTOR = "say what this machine has, which path would run, and what is missing"
DEMO = "ask for codes hidden in a long file, with FFA_FP8FP8 and with vLLM's default backend"


def main(arguments: list[str] | None = None) -> int:
    from vllm_ffa_fp8fp8 import demo, doctor

    parser = argparse.ArgumentParser(prog="ffa-fp8fp8", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="doctor|demo")
    commands.add_parser("doctor", help=DOCTOR, description=DOCTOR)
    demo.add_arguments(commands.add_parser("demo", help=DEMO, description=DEMO))
    options = parser.parse_args(arguments)
    return doctor.main() if options.command == "doctor" else demo.run(options)


if __name__ == "__main__":
    raise SystemExit(main())
