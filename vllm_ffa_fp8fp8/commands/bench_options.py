"""What the benchmarks have in common."""

import argparse
from pathlib import Path

from vllm_ffa_fp8fp8 import environment

FOLDER = Path("plot")


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="for what is kept (default: %(default)s)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="measure again what an earlier run measured"
    )
    parser.add_argument(
        "--commit", metavar="ID",
        help="what figures say they are of (default: the clone's commit)",
    )  # fmt: skip


def tell_conditions(options: argparse.Namespace, versions: dict[str, str]) -> str:
    """Says before anything is measured what the figures will be of, and returns the commit."""
    from vllm_ffa_fp8fp8.bench.report import conditions

    commit = options.commit or environment.commit()
    print(conditions(versions, [commit]), flush=True)
    if not commit:
        print("This is no clone: --commit ID would say which code is measured.", flush=True)
    return commit


def missing_gpu() -> str | None:
    """Why nothing can be measured here, or None."""
    gpu = environment.find_gpu()
    if gpu is None:
        return "this machine has none"
    if not gpu.has_fp8:
        return f"{gpu.name} has no FP8"
    import torch

    return None if torch.cuda.is_available() else "torch does not see it (`ffa-fp8fp8 doctor`)"
