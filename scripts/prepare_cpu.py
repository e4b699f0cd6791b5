"""Repairs two faults of the CPU build of vLLM in the environment of the Python that runs this."""

from vllm_ffa_fp8fp8.commands.repair import repair

if __name__ == "__main__":
    repair()
