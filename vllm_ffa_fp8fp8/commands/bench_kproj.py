"""`ffa-fp8fp8 bench-kproj`: from hidden states to the cache in one kernel, beside vLLM's linear
layer and rotary kernel and our cache write.

Every way is checked against float64 before it is timed: all tokens of a decode step, tokens from
all over a prompt. Figures are kept as JSON; each run measures all that it is asked for.
"""

import argparse
from typing import Any

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench.files import Records, file_name, make_folder
from vllm_ffa_fp8fp8.bench.model_shapes import PROJECTIONS
from vllm_ffa_fp8fp8.commands.bench_options import (
    add_record_arguments,
    missing_gpu,
    tell_conditions,
)

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


def describe(row: dict) -> str:
    best = min((us, name) for name, us in row["us"].items() if name.startswith("one kernel"))
    unfused, floor = row["us"]["unfused"], row["floor_us"]
    linear = row["us"].get("linear + kernel")
    middle = "" if linear is None else f"{linear:9.1f} ({unfused / linear:.2f}x)"
    return (
        f"{row['model']:>4} {row['tokens']:6d} {floor:8.1f} {unfused:9.1f} {middle:18} "
        f"{best[0]:9.1f} ({unfused / best[0]:.2f}x, {floor / best[0]:.2f} of the floor) {best[1]}"
    )


def run(options: argparse.Namespace) -> int:
    if problem := missing_gpu():
        print(f"bench-kproj times kernels on an NVIDIA GPU with FP8: {problem}.")
        return 1
    if environment.vllm_version() is None:
        print(environment.NO_VLLM)
        return 1
    try:
        check_options(options)
        from vllm_ffa_fp8fp8.bench import sweep

        versions = sweep.environment()
        path = options.folder / file_name("kproj", versions)
        records = Records(path, "bench-kproj", versions)
    except ValueError as error:
        print(error)
        return 2
    measured = measure(options, records, tell_conditions(options, versions))
    print("\nmicroseconds; best of the tunings; speed-ups over unfused")
    print("model tokens    floor   unfused   linear + kernel   one kernel")
    for row in measured:
        print(describe(row))
    print(records.path)
    return 0


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


def measure(options: argparse.Namespace, records: Records, commit: str) -> list[dict[str, Any]]:
    """Measures, keeps and returns what the options ask for."""
    import torch

    from vllm_ffa_fp8fp8.bench import projection
    from vllm_ffa_fp8fp8.bench.store import fingerprint
    from vllm_ffa_fp8fp8.bench.timing import copy_bandwidth, read_bandwidth

    bandwidth, copies = read_bandwidth(), copy_bandwidth()
    print(f"read {bandwidth / 1e6:.2f} TB/s, copy {copies / 1e6:.2f} TB/s")
    origin = {"code": fingerprint("vllm_ffa_fp8fp8.kernels"), "commit": commit}
    measured = []

    def keep(phase: str, row: dict[str, Any]) -> None:
        key = {"phase": phase, "model": row["model"], "tokens": row["tokens"]}
        measured.append(records.put(key, row | origin))
        records.save()
        for name, us in row["us"].items():
            print(f"{row['model']} {phase} x{row['tokens']} {name}: {us:.1f} us", flush=True)

    for model in options.models:
        weights = projection.make_weights(model)
        for batch in options.batches:
            row = projection.bench_decode_step(model, batch, weights, bandwidth, options.vary)
            keep("decode", row)
        for tokens in options.prefill:
            row = projection.bench_prefill(model, tokens, weights, copies, options.vary_prefill)
            keep("prefill", row)
        del weights
        torch.cuda.empty_cache()
    return sorted(measured, key=lambda row: row["phase"])
