"""`ffa-fp8fp8 plot`: pictures of what bench and quality measured.

Everything is read and drawn before the first file is written.
"""

import argparse
from pathlib import Path

from vllm_ffa_fp8fp8 import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="DIR|JSON",
        help="files of bench decode, bench layers and quality, or folders of such; with files of "
        "bench layers and of quality that are of one model, latency is drawn over KL, too",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for PNG and SVG files (default: beside the JSON files)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    if environment.version_of("matplotlib") is None:
        print(f"plot needs matplotlib: {environment.install_command('bench')}")
        return 1
    from vllm_ffa_fp8fp8.bench.pictures.canvas import save
    from vllm_ffa_fp8fp8.bench.pictures.draw import draw_all, read_all

    try:
        pictures = draw_all(read_all(options.paths, print), options.out)
        if not pictures:
            print("There is nothing to draw: a curve needs several settings, lengths or fractions.")
            return 2
        for path in save(pictures):
            print(path)
    except ValueError as error:
        print(error)
        return 2
    return 0
