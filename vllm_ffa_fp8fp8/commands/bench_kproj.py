"""`ffa-fp8fp8 bench kproj`: from hidden states to the cache in one kernel, beside vLLM's linear
layer and rotary kernel and our cache write.

Every way is checked against float64 before it is timed: all tokens of a decode step, tokens from
all over a prompt.
"""

import argparse
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.table import Table

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench.files import Records, file_name, make_folder
from vllm_ffa_fp8fp8.bench.model_shapes import PROJECTIONS
from vllm_ffa_fp8fp8.bench.published import KPROJ
from vllm_ffa_fp8fp8.bench.report import CACHED, conditions, console, ratio, show_table, table
from vllm_ffa_fp8fp8.bench.store import fingerprint
from vllm_ffa_fp8fp8.commands.bench_options import (
    add_record_arguments,
    missing_gpu,
    tell_conditions,
)

Step = tuple[str, str, int]
"""Model, phase (decode or prefill) and tokens."""
ONE_KERNEL = "one kernel, "
TIMING_FILES = ("projection.py", "timing.py")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
DECODE_FIELDS = ("splits", "hidden_block", "stages", "warps", "finish_rows", "shared_memory")
PREFILL_FIELDS = ("tokens", "heads", "warps")
"""Of `ProjectionTuning` and `RopeWriteTuning`, which help cannot ask: they need Triton."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--models", nargs="+", default=list(PROJECTIONS), choices=PROJECTIONS,
        help=f"Llama's shapes (default: {' '.join(PROJECTIONS)})",
    )  # fmt: skip
    add(
        "--batches", nargs="*", type=int, default=BATCHES, metavar="TOKENS",
        help=f"tokens of a decode step (default: {' '.join(map(str, BATCHES))})",
    )  # fmt: skip
    add(
        "--prefill", nargs="*", type=int, default=[8192], metavar="TOKENS",
        help="tokens of a prefill step (default: 8192)",
    )  # fmt: skip
    add(
        "--vary", nargs="*", default=[], metavar="NAME=VALUE,...",
        help="launch parameters of decode to time beside the default ones, one set an argument: "
        + ", ".join(DECODE_FIELDS),
    )  # fmt: skip
    add(
        "--vary-prefill", nargs="*", default=[], metavar="NAME=VALUE,...",
        help=f"the same of prefill: {', '.join(PREFILL_FIELDS)}",
    )  # fmt: skip
    add_record_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if problem := missing_gpu():
        print(f"bench kproj times kernels on an NVIDIA GPU with FP8: {problem}.")
        return 1
    if environment.vllm_version() is None:
        print(environment.NO_VLLM)
        return 1
    try:
        check_options(options)
        from vllm_ffa_fp8fp8.bench import sweep

        versions = sweep.environment()
        commit = tell_conditions(options, versions)
        path = options.folder / file_name(KPROJ, versions)
        records = Records(path, KPROJ, versions, fresh=options.fresh, commit=commit)
        measured = measure(options, records)
    except ValueError as error:
        print(error)
        return 2
    screen = console()
    show_table(screen, as_table(measured, records))
    screen.print(conditions(versions, (row["commit"] for row in measured)))
    screen.print(str(records.path))
    return 0


def as_table(rows: list[dict[str, Any]], records: Records) -> Table:
    """A row for each record: the best of the tunings, and speed-ups over unfused."""
    result = table(
        "From hidden states to the cache, microseconds", "shape", "step", "tokens", "floor",
        "unfused", "linear + kernel", "over unfused", "one kernel", "over unfused", "of the floor",
        "launch parameters",
    )  # fmt: skip
    for row in rows:
        us = row["us"]
        best, name = min((us, name) for name, us in us.items() if name.startswith(ONE_KERNEL))
        linear, cached = us.get("linear + kernel"), CACHED if records.is_cached(row) else ""
        result.add_row(
            row["model"],
            row["phase"],
            f"{row['tokens']:,}",
            f"{row['floor_us']:,.1f}",
            f"{us['unfused']:,.1f}{cached}",
            "-" if linear is None else f"{linear:,.1f}{cached}",
            ratio(linear and us["unfused"] / linear),
            f"{best:,.1f}{cached}",
            ratio(us["unfused"] / best),
            ratio(row["floor_us"] / best),
            name.removeprefix(ONE_KERNEL),
        )
    return result


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be measured or kept, before any work."""
    from vllm_ffa_fp8fp8.bench.sweep import parse_tuning
    from vllm_ffa_fp8fp8.kernels.projection.tuning import (
        MAX_PROJECTED_TOKENS,
        ProjectionTuning,
        RopeWriteTuning,
    )

    if bad := [n for n in options.batches if not 1 <= n <= MAX_PROJECTED_TOKENS]:
        raise ValueError(f"--batches are 1 to {MAX_PROJECTED_TOKENS} tokens, not {bad[0]}")
    if bad := [n for n in options.prefill if n < 1]:
        raise ValueError(f"--prefill is 1 token or more, not {bad[0]}")
    make_folder(options.folder)
    for texts, parameters in (
        (options.vary, ProjectionTuning),
        (options.vary_prefill, RopeWriteTuning),
    ):
        for text in texts:
            parse_tuning(text, parameters)


def measure(options: argparse.Namespace, records: Records) -> list[dict[str, Any]]:
    """Returns what the options ask for, measured now as far as no earlier run did."""
    code = "-".join(
        (
            fingerprint("vllm_ffa_fp8fp8.kernels"),
            fingerprint("vllm_ffa_fp8fp8.bench", only=TIMING_FILES)[:4],
        )
    )
    steps = [(model, "decode", tokens) for model in options.models for tokens in options.batches]
    steps += [(model, "prefill", tokens) for model in options.models for tokens in options.prefill]
    found = {step: find(records, step, code, options) for step in steps}
    missing = [step for step in steps if found[step] is None]
    for step, row in measured_now(missing, options):
        found[step] = records.put(as_key(step), row, code)
        records.save()
        for name, us in row["us"].items():
            print("{} {} x{} ".format(*step) + f"{name}: {us:.1f} us", flush=True)
    return list(found.values())


def as_key(step: Step) -> dict[str, Any]:
    return dict(zip(("model", "phase", "tokens"), step, strict=True))


def variants(phase: str, options: argparse.Namespace) -> list[str]:
    return options.vary if phase == "decode" else options.vary_prefill


def find(records: Records, step: Step, code: str, options: argparse.Namespace):
    """The record of a step, if it has all the launch parameters that are to be varied."""
    record = records.find(as_key(step), code)
    wanted = {ONE_KERNEL + text for text in variants(step[1], options)}
    return record if record and wanted <= record["us"].keys() else None


def measured_now(
    steps: list[Step], options: argparse.Namespace
) -> Iterator[tuple[Step, dict[str, Any]]]:
    if not steps:
        return
    import torch

    from vllm_ffa_fp8fp8.bench import projection
    from vllm_ffa_fp8fp8.bench.timing import copy_bandwidth, read_bandwidth

    bandwidth, copies = read_bandwidth(), copy_bandwidth()
    print(f"read {bandwidth / 1e6:.2f} TB/s, copy {copies / 1e6:.2f} TB/s")
    ways = {
        "decode": (projection.bench_decode_step, bandwidth),
        "prefill": (projection.bench_prefill, copies),
    }
    for model, its_steps in groupby(sorted(steps, key=itemgetter(0)), key=itemgetter(0)):
        weights = projection.make_weights(model)
        for step in its_steps:
            _, phase, tokens = step
            bench, speed = ways[phase]
            yield step, bench(model, tokens, weights, speed, variants(phase, options))
        del weights
        torch.cuda.empty_cache()
