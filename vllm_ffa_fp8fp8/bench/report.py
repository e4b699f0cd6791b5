"""Figures as tables."""

import sys
import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from vllm_ffa_fp8fp8.bench.bars import judge
from vllm_ffa_fp8fp8.bench.cells import (
    BASE_READ,
    EXACT,
    FA3_BF16,
    FA3_FP8,
    FIXED,
    NOTHING,
    SPREAD,
    Cell,
    Figure,
    Figures,
    over,
)
from vllm_ffa_fp8fp8.environment import MEASURED_STACKS, stack_of

PACKAGES = {"torch": "torch", "triton": "Triton", "vllm": "vLLM"}
NAMES = {FA3_BF16: "FA3 bf16", FA3_FP8: "FA3 fp8"}
CACHED = "*"
BARS_NOTE = (
    "Bars: targets set in vllm_ffa_fp8fp8/bench/bars.py, the least fractions of the byte floor or "
    "speed-ups over FA3."
)
NO_LIMIT = 10_000
HEADING_WIDTH = 7


def console() -> Console:
    """As wide as the terminal; takes text as it stands, brackets too."""
    width = None if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False, markup=False, emoji=False)


def show_table(screen: Console, table: Table) -> None:
    """As Markdown where that fits, which it always does where there is no terminal."""
    options = screen.options.update_width(NO_LIMIT)
    needed = Measurement.get(screen, options, table).maximum
    if not screen.is_terminal:
        screen.width = max(screen.width, needed)
    narrow = needed > screen.width
    if narrow:
        fold(table)
    screen.print(table)
    if narrow:
        screen.line()  # as Markdown's empty edge is


def fold(table: Table) -> None:
    """Folds headings and, where that is not enough, cells; only space is between the columns."""
    table.box, table.show_edge, table.padding = box.SIMPLE_HEAD, False, 0
    for column in table.columns:
        column.header = textwrap.fill(column.header, HEADING_WIDTH, break_long_words=False)
        column.no_wrap, column.overflow = False, "fold"


def table(title: str, *headings: str) -> Table:
    """A table that reads as Markdown where it is copied."""
    result = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for heading in headings:
        result.add_column(heading, no_wrap=True)
    return result


def microseconds(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.us:,.1f}{CACHED if figure.cached else ''}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def figure_tables(figures: Figures) -> list[Table]:
    """A table for each geometry, a row for each cell of ours."""
    ours = sorted((c for c in figures if c.series not in FIXED), key=_order)
    return [
        (_planted_table if planted else _figure_table)(str(geometry), list(cells), figures)
        for (geometry, planted), cells in groupby(
            ours, key=lambda cell: (cell.shape.geometry, bool(cell.planted))
        )
    ]


def _order(cell: Cell) -> tuple:
    exact = cell.series == EXACT
    return (
        cell.shape.geometry, bool(cell.planted), cell.planted, cell.shape, cell.value_dtype,
        cell.ahead, exact, cell.hot != SPREAD, cell.setting, -cell.kept, cell.tuning,
    )  # fmt: skip


def _variant(cell: Cell) -> Iterator[str]:
    """What sets a cell apart from the figure that counts."""
    if cell.hot != SPREAD:
        yield cell.hot
    if cell.ahead != NOTHING:
        yield f"with {cell.ahead}"
    if cell.tuning:
        yield cell.tuning


def _figure_table(geometry: str, cells: list[Cell], figures: Figures) -> Table:
    result = table(
        f"Decode attention, {geometry}, microseconds", "batch x tokens", "V", "kept", "floor",
        "FFA_FP8FP8 (of the floor)", "bare read of the base", *NAMES.values(), "over bf16",
        "over fp8",
    )  # fmt: skip
    for cell in cells:
        figure = figures[cell]
        kept = "exact" if cell.series == EXACT else f"{figure.kept:.2f}"
        result.add_row(
            str(cell.shape),
            cell.value_dtype,
            " ".join(filter(None, (kept, *_variant(cell)))),
            f"{figure.floor_us:,.1f}",
            f"{microseconds(figure)} ({figure.floor_fraction:.2f})",
            microseconds(figures.get(Cell(cell.shape, BASE_READ))),
            *(microseconds(figures.get(cell.peer(peer))) for peer in NAMES),
            *(ratio(over(figures, cell, peer)) for peer in NAMES),
        )
    return result


def _planted_table(geometry: str, cells: list[Cell], figures: Figures) -> Table:
    result = table(
        f"Decode attention on planted scores, {geometry}, microseconds", "scores",
        "batch x tokens", "setting", "kept", "FFA_FP8FP8 (of the floor)", "error",
        *(heading for name in NAMES.values() for heading in (name, "error")),
        "over bf16", "over fp8",
    )  # fmt: skip
    for cell in cells:
        figure = figures[cell]
        peers = [figures.get(cell.peer(peer)) for peer in NAMES]
        result.add_row(
            cell.planted,
            str(cell.shape),
            cell.setting or _found(cell, figure),
            f"{figure.kept:.3f}",
            f"{microseconds(figure)} ({figure.floor_fraction:.2f})",
            f"{figure.exact_error:.1e}",
            *(
                text
                for peer in peers
                for text in (microseconds(peer), f"{peer.exact_error:.1e}" if peer else "-")
            ),
            *(ratio(over(figures, cell, peer)) for peer in NAMES),
        )
    return result


def _found(cell: Cell, figure: Figure) -> str:
    """The delta that was searched for."""
    value = "" if cell.value_dtype == "auto" else f", V {cell.value_dtype}"
    return f"delta={figure.delta:.2f} for {cell.kept:g}{value}"


def bar_table(figures: Figures) -> Table:
    """PASS or miss for each bar, with the worst figure and where it was measured."""
    result = table("Bars", "cells", "least", "figure", "", "measured at")
    for verdict in judge(figures):
        bar, cell = verdict.bar, verdict.cell
        against = f"x {NAMES[bar.against]}" if bar.against in NAMES else bar.against
        where = ""
        if cell:
            kept = "exact" if cell.series == EXACT else f"kept {figures[cell].kept:.2f}"
            where = f"{cell.shape}, {kept}{CACHED if figures[cell].cached else ''}"
        least = against if bar.at_least is None else f"{bar.at_least:.2f} {against}"
        style = {"PASS": "green", "miss": "red"}.get(verdict.word)
        result.add_row(bar.what, least, ratio(verdict.figure), verdict.word, where, style=style)
    return result


def conditions(environment: dict[str, str], commits: Iterable[str]) -> str:
    """Card, versions and commits that figures are of."""
    versions = ", ".join(f"{PACKAGES[name]} {environment[name]}" for name in PACKAGES)
    known = sorted(set(commits) - {""})
    commit = f"commit {', '.join(known)}" if known else "commit unknown"
    usual = environment["gpu"] == "CPU" or stack_of(environment) in MEASURED_STACKS
    unusual = "" if usual else " (not a stack that pip installs)"
    return f"{environment['gpu']}; {versions}{unusual}; {commit}."


def footnotes(environment: dict[str, str], figures: Figures) -> list[str]:
    """Where the figures come from."""
    notes = [conditions(environment, (figure.commit for figure in figures.values()))]
    cell, figure = max(figures.items(), key=lambda item: item[1].floor_us)
    bandwidth = cell.floor_bytes(figure.kept) / figure.floor_us
    notes.append(
        "Floor: bytes of the base, and of residual and V of what is kept, at the "
        f"{bandwidth / 1e6:.2f} TB/s that a large sum reads."
    )
    worst = max((figure.error for cell, figure in figures.items() if cell.series not in FIXED),
                default=0.0)  # fmt: skip
    notes.append(f"Every output was checked first; our largest relative error is {worst:.1e}.")
    if any(cell.planted for cell in figures):
        notes.append(
            "Errors of planted scores: of the output, 2-norm, relative, against float64 attention "
            "to everything. A delta below 0 is a threshold that no option gives."
        )
    cached = sum(figure.cached for figure in figures.values())
    if cached:
        notes.append(
            f"{CACHED} {cached} of {len(figures)} figures come from earlier runs on such a GPU; "
            "--fresh measures them again, side by side."
        )
    codes = {figure.code for cell, figure in figures.items() if cell.series not in FIXED}
    if len(codes) > 1:
        notes.append(f"Our figures come from {len(codes)} versions of the code.")
    return notes
