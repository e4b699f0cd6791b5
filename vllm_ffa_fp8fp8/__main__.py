"""`python -m vllm_ffa_fp8fp8`: the command `ffa-fp8fp8`."""

from vllm_ffa_fp8fp8.commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
