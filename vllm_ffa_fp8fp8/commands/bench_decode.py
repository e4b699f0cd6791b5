"""`ffa-fp8fp8 bench decode`: decode attention beside FlashAttention 3, on planted skips.

Every output is checked before it is timed.
"""

import argparse
import time
from pathlib import Path

from vllm_ffa_fp8fp8.bench.bars import KEPT, bar_cells
from vllm_ffa_fp8fp8.bench.cells import (
    AHEAD,
    HOT,
    NOTHING,
    PEERS,
    PLANTED,
    SPREAD,
    VALUE_BYTES,
    Cell,
    Figures,
    Geometry,
    Shape,
    plan_cells,
    plan_planted,
)
from vllm_ffa_fp8fp8.bench.store import read_figures
from vllm_ffa_fp8fp8.commands.bench_options import (
    add_record_arguments,
    missing_gpu,
    tell_conditions,
)
from vllm_ffa_fp8fp8.settings import add_setting_arguments, parse_setting

SHAPES = (
    "1x1024", "1x8192", "1x32768", "1x131072", "8x8192", "8x32768", "8x131072", "32x8192",
    "32x32768", "64x1024",
)  # fmt: skip
DEFAULT_SETTINGS = ("balanced", "fast")
SHORTEST = 512
"""Tokens that planted scores need."""
TUNING_FIELDS = (
    "programs_per_processor", "dense_programs_per_processor", "waves", "item_tokens",
    "share_item_tokens", "dense_item_tokens", "min_blocks", "item_overhead", "chunk_blocks",
    "scan_tokens", "scan_stages", "attend_stages", "share_stages", "dense_stages", "code_runs",
    "code_stages", "code_parts", "code_warps", "code_registers",
    "merge_rows", "num_warps", "max_registers", "score_bytes",
)  # fmt: skip
"""Of `DecodeTuning`, which help cannot ask: it needs Triton."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--shapes", nargs="+", default=SHAPES, metavar="BxT",
        help=f"batch x tokens (default: {' '.join(SHAPES)})",
    )  # fmt: skip
    add(
        "--kept", nargs="+", type=float, metavar="FRACTION",
        help="fractions of the blocks to keep; of planted scores: delta is searched for "
        f"(default: {' '.join(map(str, KEPT))})",
    )  # fmt: skip
    add(
        "--hot", nargs="+", choices=HOT,
        help="where the kept blocks are: anywhere, all at the end, or in half of the KV heads only "
        "(default: spread)",
    )  # fmt: skip
    add(
        "--planted", nargs="+", choices=PLANTED, metavar="NAME",
        help="instead of hot blocks, scores of such a distribution, with the error of the output: "
        f"{', '.join(PLANTED)}; with --setting, --preset, --delta, --tau or --kept "
        f"(default: --preset {' '.join(DEFAULT_SETTINGS)})",
    )  # fmt: skip
    add_setting_arguments(parser)
    add(
        "--ahead", nargs="+", choices=AHEAD,
        help="what is timed with attention, ahead of it: nothing, or the write of the newest keys "
        "and values to the cache, as in a layer; for the peers, too (default: nothing)",
    )  # fmt: skip
    add(
        "--heads", nargs="+", default=["32:8"], metavar="Q:KV",
        help="query and KV heads (default: 32:8)",
    )  # fmt: skip
    add(
        "--head-sizes", nargs="+", type=int, default=[128], metavar="SIZE",
        help="elements of a head (default: 128)",
    )  # fmt: skip
    add(
        "--page-size", type=int, default=64, metavar="TOKENS",
        help="tokens of a page, which is also a block (default: %(default)s)",
    )  # fmt: skip
    add(
        "--value-dtypes", nargs="+", choices=VALUE_BYTES,
        help="dtypes of V (default: all that the cache can hold)",
    )  # fmt: skip
    add(
        "--vary", nargs="+", default=[], metavar="NAME=VALUE,...",
        help="launch parameters to time beside the default ones, one set an argument: "
        + ", ".join(TUNING_FIELDS),
    )  # fmt: skip
    add("--no-peers", action="store_true", help="leave out FlashAttention 3")
    add(
        "--bars", action="store_true",
        help="measure only what the bars (targets, see bench/bars.py) need, show only them",
    )  # fmt: skip
    add("--profile", action="store_true", help="show each kernel's time, too; implies --fresh")
    add_record_arguments(parser)
    add(
        "--report", nargs="+", type=Path, metavar="JSON",
        help="show what these files hold; measures nothing and needs no GPU",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    try:
        if options.report:
            sources = read_figures(options.report)
            if not sources:
                raise ValueError("There are no figures to show.")
            return max(show(options, *source) for source in sources)
        if problem := missing_gpu():
            print(f"bench decode measures on an NVIDIA GPU: {problem}.")
            print("--report FILE.json shows figures of an earlier run.")
            return 1
        return measure(options)
    except ValueError as error:
        print(error)
        return 2


def measure(options: argparse.Namespace) -> int:
    from vllm_ffa_fp8fp8.bench import sweep
    from vllm_ffa_fp8fp8.bench.decoder import CheckFailed, compiled_kernels
    from vllm_ffa_fp8fp8.bench.files import make_folder
    from vllm_ffa_fp8fp8.bench.peers import missing_peers
    from vllm_ffa_fp8fp8.bench.store import Store

    value_dtypes = options.value_dtypes or list(VALUE_BYTES)
    for changes in options.vary:
        sweep.parse_tuning(changes)
    peers = not options.no_peers
    if peers and (problem := missing_peers(128)):
        print(f"Without peers: {problem}.")
        peers = False
    cells = wanted_cells(options, value_dtypes, peers)
    cells = [c for c in cells if c.series not in PEERS or not missing_peers(head_size(c))]
    make_folder(options.folder)
    versions = sweep.environment()
    commit = tell_conditions(options, versions)
    start = time.monotonic()
    store = Store(options.folder, versions, options.fresh or options.profile, commit)
    try:
        figures = sweep.sweep(
            cells, store, lambda text: print(text, flush=True), profile=options.profile
        )
    except CheckFailed as error:
        print(f"Wrong output, so there is no report: {error}")
        return 1
    measured = sum(not figure.cached for figure in figures.values())
    print(f"{measured} of {len(figures)} cells measured in {time.monotonic() - start:.0f} s")
    if options.profile:
        print("\n".join(compiled_kernels()))
    show(options, versions, figures)
    for geometry in sorted({cell.shape.geometry for cell in figures}):
        print(store.path(geometry))
    return 0


def head_size(cell: Cell) -> int:
    return cell.shape.geometry.head_size


def wanted_cells(options: argparse.Namespace, value_dtypes: list[str], peers: bool) -> list[Cell]:
    """What the options ask for. Raises ValueError."""
    if options.settings and not options.planted:
        raise ValueError("settings are for --planted: with hot blocks, --kept says what is kept")
    if options.bars:
        return bar_cells(value_dtypes, peers, options.page_size)
    fractions = KEPT if options.kept is None else options.kept
    if bad := [kept for kept in fractions if not 0 <= kept <= 1]:
        raise ValueError(f"kept fractions lie between 0 and 1, not at {bad[0]}")
    geometries = [
        Geometry(*parse_heads(heads), size, options.page_size)
        for heads in options.heads
        for size in options.head_sizes
    ]
    shapes = [Shape.parse(text, geometry) for geometry in geometries for text in options.shapes]
    if options.planted:
        return planted_cells(options, shapes, value_dtypes, peers)
    tunings = ["", *options.vary]
    hot, ahead = options.hot or [SPREAD], options.ahead or [NOTHING]
    return plan_cells(shapes, list(fractions), value_dtypes, tunings, peers, hot, ahead)


def planted_cells(
    options: argparse.Namespace, shapes: list[Shape], value_dtypes: list[str], peers: bool
) -> list[Cell]:
    """Raises ValueError."""
    if options.hot or options.ahead or options.vary:
        raise ValueError("--hot, --ahead and --vary are for hot blocks, not for --planted")
    default = [] if options.kept else [parse_setting(name) for name in DEFAULT_SETTINGS]
    settings = options.settings or default
    configs = [setting.config for setting in settings]
    sizes = {config.block_size for config in configs} - {None}
    if bad := [size for size in sizes if size > options.page_size]:
        raise ValueError(f"blocks of {bad[0]} tokens need pages of as many: --page-size {bad[0]}")
    if options.page_size % 64 and any(config.scans_codes for config in configs):
        raise ValueError("scan: int4 needs pages of a multiple of 64 tokens: --page-size 64")
    if too_short := [shape for shape in shapes if shape.seq_len < SHORTEST]:
        raise ValueError(f"{too_short[0]} is too short to plant scores in: {SHORTEST} tokens")
    return plan_planted(shapes, options.planted, configs, options.kept or (), value_dtypes, peers)


def parse_heads(text: str) -> tuple[int, int]:
    """From `32:8`: query heads, KV heads."""
    query, _, kv = text.partition(":")
    if not (query.isdigit() and kv.isdigit() and int(kv)):
        raise ValueError(f"heads {text!r} are not QUERY:KV, such as 32:8")
    return int(query), int(kv)


def show(options: argparse.Namespace, versions: dict[str, str], figures: Figures) -> int:
    from vllm_ffa_fp8fp8.bench import report

    console = report.console()
    if not options.bars:
        for table in report.figure_tables(figures):
            report.show_table(console, table)
    console.print(report.BARS_NOTE)
    report.show_table(console, report.bar_table(figures))
    for note in report.footnotes(versions, figures):
        console.print(note)
    return 0
