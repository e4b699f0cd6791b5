"""`ffa-fp8fp8 bench serving`: time per output token of a model's shape with dummy weights.

Each variant is an engine in a process of its own. Prompts stay in the prefix cache, so that only
decode steps are timed. Dummy weights prune nothing by themselves: the threshold is moved in the
running engine, where no option could, until a wanted fraction of the blocks is kept.
"""

import argparse
import tempfile
from pathlib import Path

from vllm_ffa_fp8fp8 import environment
from vllm_ffa_fp8fp8.bench.cells import Geometry, Shape
from vllm_ffa_fp8fp8.bench.files import file_name, make_folder
from vllm_ffa_fp8fp8.bench.model_shapes import MODELS, write_model
from vllm_ffa_fp8fp8.bench.published import SERVING
from vllm_ffa_fp8fp8.bench.report import console, show_table
from vllm_ffa_fp8fp8.bench.serving import (
    PEERS,
    Results,
    Settings,
    Variant,
    as_table,
    engine_job,
    notes,
    parse_variant,
)
from vllm_ffa_fp8fp8.commands import engine_process
from vllm_ffa_fp8fp8.commands.bench_options import add_record_arguments, tell_conditions

ROWS = ("1x32000", "1x120000", "8x32000")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=MODELS, default="llama-3.1-8b", help="its shape (default: %(default)s)")
    add("--layers", type=int, metavar="N", help="number of layers (default: the model's)")
    add(
        "--tensor-parallel-size", "-tp", type=int, default=1, metavar="N",
        help="GPUs that share each layer (default: %(default)s)",
    )  # fmt: skip
    add(
        "--rows", nargs="+", default=ROWS, metavar="BxT",
        help=f"batch x prompt tokens (default: {' '.join(ROWS)})",
    )  # fmt: skip
    add(
        "--ffa", action="append", default=[], metavar="NAME=JSON",
        help="a variant of FFA_FP8FP8 with such options, for example "
        """plain='{"use_fp8_residual": false}'; may be repeated (default: one without options)""",
    )  # fmt: skip
    add("--fp8-value", action="store_true", help="a variant of FFA_FP8FP8 whose V is fp8, too")
    add("--no-peers", action="store_true", help="leave out FLASH_ATTN with bf16 and fp8 caches")
    add(
        "--kept", type=float, default=0.1, metavar="FRACTION",
        help="fraction of the blocks to keep, for which the benchmark moves the threshold; 1 "
        "leaves it to the options (default: %(default)s)",
    )  # fmt: skip
    add(
        "--uncounted", action="store_true",
        help="time FFA_FP8FP8 once more without counting blocks, at the same threshold",
    )  # fmt: skip
    add("--steps", nargs=2, type=int, default=(8, 72), metavar=("FEW", "MANY"),
        help="output tokens whose times are subtracted (default: 8 72)")  # fmt: skip
    add(
        "--repeats", type=int, default=3, metavar="N",
        help="how often a row is timed; the median counts (default: %(default)s)",
    )  # fmt: skip
    add(
        "--memory", type=float, default=0.9, metavar="PART",
        help="part of the GPU's memory for an engine (default: %(default)s)",
    )  # fmt: skip
    add_record_arguments(parser)


def run(options: argparse.Namespace) -> int:
    gpu = environment.find_gpu()
    if environment.vllm_version() is None:
        print(environment.NO_VLLM)
        return 1
    on_gpu = gpu is not None and not environment.is_cpu_build()
    if not on_gpu and options.model != "tiny":
        print("bench serving times a large model on an NVIDIA GPU, which this machine or this")
        print("build of vLLM lacks; --model tiny --no-peers --rows 1x1500 tries it on the CPU.")
        return 1
    try:
        settings, variants = read_options(options, on_gpu)
        device = gpu.name if on_gpu else "CPU"
        if settings.tensor_parallel_size > 1:
            device = f"{settings.tensor_parallel_size} x {device}"
        model = options.model + (f"-l{options.layers}" if options.layers else "")
        versions = {"gpu": device, **environment.stack()}
        path = options.folder / file_name(SERVING, versions, model)
        make_folder(options.folder)
        commit = tell_conditions(options, versions)
        results = Results(path, versions, options.fresh, commit)
        return time_variants(variants, settings, results)
    except ValueError as error:
        print(error)
        return 2


def read_options(options: argparse.Namespace, on_gpu: bool) -> tuple[Settings, list[Variant]]:
    """What to time, and how. Raises ValueError."""
    shapes = [Shape.parse(text, Geometry()) for text in options.rows]
    few, many = options.steps
    if not 0 < few < many:
        raise ValueError(f"--steps are a small and a larger number, not {few} {many}")
    room = MODELS[options.model]["max_position_embeddings"] - many
    if too_long := [shape for shape in shapes if shape.seq_len > room]:
        raise ValueError(f"{too_long[0]} is too long: {options.model} has room for {room:,}")
    if not 0 < options.kept <= 1:
        raise ValueError(f"--kept is a fraction above 0 and up to 1, not {options.kept}")
    if options.repeats < 1:
        raise ValueError(f"--repeats is 1 or more, not {options.repeats}")
    if options.tensor_parallel_size < 1:
        given = options.tensor_parallel_size
        raise ValueError(f"--tensor-parallel-size is 1 or more, not {given}")
    if options.layers is not None and options.layers < 1:
        raise ValueError(f"--layers is 1 or more, not {options.layers}")
    if not 0 < options.memory <= 1:
        raise ValueError(f"--memory is a part above 0 and up to 1, not {options.memory}")
    variants = [parse_variant(text) for text in options.ffa or ["FFA_FP8FP8={}"]]
    if options.fp8_value:
        variants.append(parse_variant('FFA_FP8FP8, V fp8={"v_cache_dtype": "fp8"}'))
    if options.uncounted:
        variants += [variant.uncounted() for variant in variants]
    if not options.no_peers:
        variants += PEERS
    if options.kept < 1:
        check_lengths(shapes, variants)
    settings = Settings(
        model=options.model,
        rows=tuple((shape.batch, shape.seq_len) for shape in shapes),
        kept=options.kept if options.kept < 1 else None,
        steps=(few, many),
        repeats=options.repeats,
        memory=options.memory,
        on_gpu=on_gpu,
        changes={"num_hidden_layers": options.layers} if options.layers else {},
        tensor_parallel_size=options.tensor_parallel_size,
    )
    return settings, variants


def check_lengths(shapes: list[Shape], variants: list[Variant]) -> None:
    """Raises ValueError where a wanted fraction cannot be kept, since nothing is pruned."""
    for variant in variants:
        for shape in shapes:
            if variant.options is not None and shape.seq_len < variant.min_context:
                raise ValueError(
                    f"{shape} is too short for {variant.name} to skip anything: min_context is "
                    f"{variant.min_context:,} tokens. Give longer --rows, or --kept 1, or a "
                    """variant such as --ffa 'all={"min_context": 0}'"""
                )


def time_variants(variants: list[Variant], settings: Settings, results: Results) -> int:
    from vllm_ffa_fp8fp8.bench.serving_engine import time_rows

    screen, failed = console(), False
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = write_model(settings.model, Path(folder), **settings.changes)["vocab_size"]
        for variant in variants:
            rows = results.missing(variant, settings)
            if not rows:
                screen.print(f"{variant.name}: timed by an earlier run")
                continue
            job = engine_job(variant, rows, settings, folder, vocab_size)
            try:
                job["thresholds"] = results.thresholds(variant, rows, settings)
            except ValueError as error:
                screen.print(str(error))
                failed = True
                continue
            answer = engine_process.watch(screen, variant.name, job, time_rows)
            if answer is None:
                failed = True  # the other engines' figures still count
            else:
                results.put(variant, settings, answer)
    records = results.of(variants, settings)
    if not records:
        return 1
    show_table(screen, as_table(records))
    for note in notes(results.environment, records, settings):
        screen.print(note)
    screen.print(str(results.path))
    return int(failed)
