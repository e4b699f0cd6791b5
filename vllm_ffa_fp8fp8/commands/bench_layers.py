"""`ffa-fp8fp8 bench layers`: a recorded model's attention layers: latency, error and kept fraction
of settings beside FlashAttention 3 with a bf16 and an fp8 cache.

On the CPU the same errors are simulated, and nothing is timed.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.commands.bench_options import (
    add_record_arguments,
    missing_gpu,
    tell_conditions,
)
from vllm_ffa_fp8fp8.option_values import BLOCK_SIZES, V_CACHE_DTYPES
from vllm_ffa_fp8fp8.settings import Setting, add_setting_arguments, settings_of

LAYERS = "layers"
ON_CPU = (
    "Nothing is timed: {}. Errors, kept fractions and dropped mass are simulated: attention in "
    "float64, softmax weights and outputs rounded as the kernels round them, FA3's fp8 cache by "
    "rounding queries, keys, values and softmax weights to E4M3 with scales of 1."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="a recording: ffa-fp8fp8 record")
    add(
        "--layers", nargs="+", type=int, metavar="N",
        help="of the recorded ones (default: all of them)",
    )  # fmt: skip
    add(
        "--lengths", nargs="+", type=int, metavar="TOKENS",
        help="context lengths; longer contexts are cut to their first 64 tokens and the newest "
        "(default: the lengths of the prompts)",
    )  # fmt: skip
    add(
        "--batch", nargs="+", type=int, default=[1], metavar="N",
        help="requests of a step, made by repeating those recorded (default: 1)",
    )  # fmt: skip
    add_setting_arguments(parser)
    add(
        "--block-size", nargs="+", type=int, choices=BLOCK_SIZES, metavar="TOKENS",
        help="every setting with each of these",
    )  # fmt: skip
    add("--v-cache-dtype", nargs="+", choices=V_CACHE_DTYPES, help="every setting with each")
    add("--residual", nargs="+", choices=("on", "off"), help="every setting with, without")
    add(
        "--heads", choices=("model", "main"), default="model",
        help="the model's own, or repeated to 32 query heads over 8 KV heads of size 128, as in "
        "bench decode (default: %(default)s)",
    )  # fmt: skip
    add_record_arguments(parser)


def run(options: argparse.Namespace) -> int:
    try:
        return measure(options)
    except ValueError as error:
        print(error)
        return 2
    except KeyboardInterrupt:
        print(f"Stopped. {options.folder} keeps what was finished; the same command goes on.")
        return 130


def measure(options: argparse.Namespace) -> int:
    """Raises ValueError for what cannot be measured, before any work where that can be known."""
    from vllm_ffa_fp8fp8.bench import report
    from vllm_ffa_fp8fp8.bench.files import Records, file_name, make_folder, slug
    from vllm_ffa_fp8fp8.bench.layers.measure import measure as measure_points
    from vllm_ffa_fp8fp8.bench.layers.measure import plan_points, subject
    from vllm_ffa_fp8fp8.bench.layers.tables import failures, figure_tables
    from vllm_ffa_fp8fp8.bench.peers import missing_peers
    from vllm_ffa_fp8fp8.bench.recording.store import Recording

    recording = Recording.open(options.data)
    layers = chosen_layers(options.layers, recording)
    settings = varied(settings_of(options), options)
    if min(options.batch) < 1 or min(options.lengths or [1]) < 1:
        raise ValueError("--batch and --lengths are 1 or more")
    make_folder(options.folder)
    reason = missing_gpu()
    about = subject(recording, layers, options.heads)
    no_peers = None if reason else missing_peers(about["shape"]["head_size"])
    versions = versions_here(on_gpu=not reason)
    commit = tell_conditions(options, versions)
    if reason:
        print(ON_CPU.format(reason))
    if no_peers:
        print(f"Without peers: {no_peers}.")
    name = file_name(LAYERS, versions, slug(Path(about["model"]).name), options.heads)
    path = options.folder / name
    records = Records(path, LAYERS, versions, about, fresh=options.fresh, commit=commit)
    points = plan_points(
        layers, options.lengths or recording.lengths, options.batch, settings, not no_peers
    )
    device = "cpu" if reason else "cuda"
    figures = measure_points(recording, points, options.heads, device, records, print)
    screen = report.console()
    for table in figure_tables(figures, records):
        report.show_table(screen, table)
    for failure in failures(figures):
        screen.print(f"Check failed, so there is no time: {failure}")
    screen.print(report.conditions(versions, (figure["commit"] for figure in figures)))
    if any(map(records.is_cached, figures)):
        screen.print("Some figures come from earlier runs; --fresh measures them again.")
    screen.print(str(path))
    return 1 if failures(figures) else 0


def versions_here(on_gpu: bool) -> dict[str, str]:
    """What figures depend on besides our code."""
    import torch

    gpu = torch.cuda.get_device_name() if on_gpu else "CPU"
    return {"gpu": gpu, **environment.stack()}


def chosen_layers(wanted: Sequence[int] | None, recording) -> list[int]:
    """Raises ValueError for layers that are not there."""
    known = ", ".join(map(str, recording.layers)) or "none"
    if bad := set(wanted or ()) - set(recording.layers):
        raise ValueError(f"{recording.folder} has no layer {min(bad)}; recorded are: {known}")
    if not recording.layers:
        raise ValueError(f"{recording.folder} holds no finished layer: record it again")
    return sorted(set(wanted)) if wanted else recording.layers


def varied(settings: Sequence[Setting], options: argparse.Namespace) -> list[Setting]:
    """Every setting with each of the block sizes, V dtypes and residuals that are asked for."""
    residuals = [value == "on" for value in options.residual or ()]
    changes = [
        [(key, value) for value in values] or [None]
        for key, values in (
            ("block_size", options.block_size or ()),
            ("v_cache_dtype", options.v_cache_dtype or ()),
            ("use_fp8_residual", residuals),
        )
    ]
    found = {}
    for setting, *pairs in product(settings, *changes):
        own = dict(filter(None, pairs))
        name = ",".join([setting.name, *(f"{key}={str(v).lower()}" for key, v in own.items())])
        found[name] = Setting(name, setting.options | own)
    return list(found.values())
