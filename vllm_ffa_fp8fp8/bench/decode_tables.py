"""Tables of decode attention."""

from collections.abc import Iterable
from dataclasses import replace

from vllm_ffa_fp8fp8.bench.bars import COMPARED, MAIN, OTHERS, judge
from vllm_ffa_fp8fp8.bench.cells import (
    BASE_READ,
    EXACT,
    FA3_BF16,
    NEWEST,
    NOTHING,
    OURS,
    PEERS,
    SPREAD,
    UNEVEN,
    WRITE,
    Cell,
    Figures,
    Shape,
    over,
)
from vllm_ffa_fp8fp8.bench.published import Published, Source
from vllm_ffa_fp8fp8.bench.report import NAMES, ratio
from vllm_ffa_fp8fp8.bench.store import DECODE
from vllm_ffa_fp8fp8.bench.tables import (
    Tables,
    commits_of,
    markdown,
    shown,
    time,
    time_of_floor,
    with_conditions,
)

WHAT = ("batch x tokens", "kept")
MAIN_ROWS = (
    (1, 8192, 0.1), (1, 32_768, 0.1), (8, 32_768, 0.1), (8, 131_072, 0.03), (8, 131_072, 0.1),
    (8, 131_072, 0.5), (8, 131_072, 1.0), (8, 131_072, None),
)  # fmt: skip
"""Batch, tokens and planted kept fraction, None for `exact`."""
LIMITED = ((1, 8192, 0.1), (1, 32_768, 0.1), (32, 8192, 0.1), (8, 32_768, 0.1), (8, 131_072, 0.03))


def cell_of(batch: int, tokens: int, kept: float | None) -> Cell:
    shape = Shape(MAIN, batch, tokens)
    return Cell(shape, EXACT) if kept is None else Cell(shape, OURS, kept=kept)


def has_main(source: Source) -> bool:
    return any(cell_of(*row) in source.figures for row in MAIN_ROWS)


def row_head(cell: Cell, figures: Figures) -> tuple[str, str]:
    """What a row is of, with the fraction that was kept, not the planted one."""
    if cell.series == EXACT:
        return str(cell.shape), "`exact`"
    kept = figures[cell].kept if cell in figures else cell.kept
    return str(cell.shape), f"{kept:.2f}"


def our_cells(source: Source, hot: str = SPREAD, ahead: str = NOTHING) -> list[Cell]:
    """Cells of the main geometry with 16-bit V, `exact` after the others of its shape."""
    wanted = {"value_dtype": "auto", "tuning": "", "hot": hot, "ahead": ahead, "planted": ""}
    return sorted(
        (
            cell
            for cell in source.figures
            if cell.series in (OURS, EXACT) and cell == replace(cell, **wanted)
            and cell.shape.geometry == MAIN
        ),
        key=lambda cell: (cell.shape, cell.series == EXACT, cell.kept),
    )  # fmt: skip


def main_table(published: Published) -> str:
    """Ours beside FlashAttention 3, for the README."""
    source = published.newest(DECODE, has_main)
    figures = source.figures
    cells = [cell_of(*row) for row in MAIN_ROWS]
    rows = [
        (
            *row_head(cell, figures),
            time(figures.get(cell)),
            time(figures.get(replace(cell, value_dtype="fp8"))),
            *(time(figures.get(cell.peer(peer))) for peer in PEERS),
        )
        for cell in cells
    ]
    headings = (*WHAT, "FFA_FP8FP8", "with FP8 V", "FA3, bf16 cache", "FA3, fp8 cache")
    return with_conditions(markdown(headings, rows), source, commits_of(figures, cells))


def all_table(published: Published) -> str:
    """Every length and fraction of the main geometry."""
    source = published.newest(DECODE, has_main)
    figures = source.figures
    cells = our_cells(source)
    rows = [
        (
            *row_head(cell, figures),
            time_of_floor(figures[cell]),
            time_of_floor(figures.get(replace(cell, value_dtype="fp8"))),
            time(figures.get(Cell(cell.shape, BASE_READ))),
            *(time(figures.get(cell.peer(peer))) for peer in PEERS),
            *(ratio(over(figures, cell, peer)) for peer in PEERS),
        )
        for cell in cells
    ]
    headings = (
        *WHAT, "V 16-bit", "V FP8", "base alone", *NAMES.values(), "over bf16", "over fp8",
    )  # fmt: skip
    return with_conditions(markdown(headings, rows), source, commits_of(figures, cells))


def hot_table(published: Published) -> str:
    """Where the kept blocks are."""
    source = published.newest(DECODE, lambda source: bool(our_cells(source, hot=UNEVEN)))
    figures = source.figures
    cells = [replace(cell, hot=SPREAD) for cell in our_cells(source, hot=UNEVEN)]
    places = (SPREAD, NEWEST, UNEVEN)
    rows = [
        (
            *row_head(cell, figures),
            *(time_of_floor(figures.get(replace(cell, hot=hot))) for hot in places),
        )
        for cell in cells
    ]
    headings = (*WHAT, "anywhere", "at the end", "half of the heads")
    return with_conditions(markdown(headings, rows), source, commits_of(figures, cells))


def write_table(published: Published) -> str:
    """Behind the cache write of the newest tokens."""
    source = published.newest(DECODE, lambda source: bool(our_cells(source, ahead=WRITE)))
    figures = source.figures
    cells = our_cells(source, ahead=WRITE)

    def both(cell: Cell) -> str:
        alone = figures.get(replace(cell, ahead=NOTHING))
        return f"{time(figures.get(cell))} ({time(alone)})"

    rows = [
        (
            *row_head(cell, figures),
            both(cell),
            *(both(cell.peer(peer)) for peer in PEERS),
            *(ratio(over(figures, cell, peer)) for peer in PEERS),
        )
        for cell in cells
    ]
    headings = (*WHAT, "ours", *NAMES.values(), "over bf16", "over fp8")
    return with_conditions(markdown(headings, rows), source, commits_of(figures, cells))


def geometry_table(published: Published) -> str:
    """Other heads and head sizes at one batch."""

    def cells(geometries: Iterable) -> list[Cell]:
        return [Cell(Shape(geometry, *COMPARED), OURS, kept=0.1) for geometry in geometries]

    source = published.newest(
        DECODE, lambda source: any(cell in source.figures for cell in cells(OTHERS))
    )
    figures = source.figures
    found = [cell for cell in cells((MAIN, *OTHERS)) if cell in figures]
    rows = [
        (
            f"{cell.shape.geometry.num_heads} over {cell.shape.geometry.num_kv_heads}",
            str(cell.shape.geometry.head_size),
            time_of_floor(figures[cell]),
            time(figures.get(cell.peer(FA3_BF16))),
            ratio(over(figures, cell, FA3_BF16)),
        )
        for cell in found
    ]
    headings = ("query heads over KV heads", "head size", "ours", "FA3 bf16", "over bf16")
    return with_conditions(markdown(headings, rows), source, commits_of(figures, found))


def limit_table(published: Published) -> str:
    """What reading alone takes: the base as a kernel reads it, kept blocks at full bandwidth."""

    def base(cell: Cell) -> Cell:
        return Cell(cell.shape, BASE_READ)

    cells = [cell_of(*row) for row in LIMITED]
    source = published.newest(
        DECODE, lambda source: any(base(cell) in source.figures for cell in cells)
    )
    figures = source.figures
    found = [cell for cell in cells if cell in figures and base(cell) in figures]
    rows = []
    for cell in found:
        alone = figures[base(cell)]
        kept = figures[cell].floor_us - alone.floor_us
        peer = figures.get(cell.peer(FA3_BF16))
        rows.append(
            (
                *row_head(cell, figures),
                f"{shown(alone.us)} + {shown(kept)} = {shown(alone.us + kept)}",
                time(figures[cell]),
                ratio(peer and peer.us / (alone.us + kept)),
                ratio(over(figures, cell, FA3_BF16)),
            )
        )
    headings = (
        *WHAT, "base alone + kept blocks", "measured", "over bf16 at best", "over bf16",
    )  # fmt: skip
    return with_conditions(markdown(headings, rows), source, commits_of(figures, found))


def bar_table(published: Published) -> str:
    """Each target and the worst figure that it is about."""
    source = published.newest(DECODE, has_main)
    figures = source.figures
    verdicts = [v for v in judge(figures) if v.cell and v.bar.at_least is not None]
    rows = [
        (
            verdict.bar.what,
            f"{verdict.bar.at_least:.2f} {against(verdict.bar.against)}",
            ratio(verdict.figure),
            "held" if verdict.word == "PASS" else "missed",
            ", ".join(row_head(verdict.cell, figures)),
        )
        for verdict in verdicts
    ]
    headings = ("cells", "at least", "worst", "", "at")
    used = commits_of(figures, (verdict.cell for verdict in verdicts))
    return with_conditions(markdown(headings, rows), source, used)


def against(name: str) -> str:
    return f"x {NAMES[name]}" if name in NAMES else name


def stack_table(published: Published) -> str:
    """Ours with every stack that was measured on the newest one's card."""
    newest = published.newest(DECODE, has_main)
    sources = [
        source
        for source in published.of(DECODE)
        if has_main(source) and source.environment["gpu"] == newest.environment["gpu"]
    ]
    cells = [cell_of(*row) for row in MAIN_ROWS]
    rows = [
        (
            *row_head(cell, newest.figures),
            *(time(source.figures.get(cell)) for source in sources),
            *(time(newest.figures.get(cell.peer(peer))) for peer in PEERS),
        )
        for cell in cells
    ]
    headings = (*WHAT, *(source.stack for source in sources), *NAMES.values())
    lines = [
        with_conditions("", source, commits_of(source.figures, cells)).strip() for source in sources
    ]
    return "\n\n".join((markdown(headings, rows), " ".join(lines)))


DECODE_TABLES: Tables = {
    "decode": main_table,
    "decode-all": all_table,
    "decode-hot": hot_table,
    "decode-write": write_table,
    "decode-geometries": geometry_table,
    "decode-limits": limit_table,
    "decode-bars": bar_table,
    "decode-stacks": stack_table,
}
