"""What decode has to reach: bars, the cells that they need, and whether figures clear them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_ffa_fp8fp8.bench.cells import (
    EXACT,
    FA3_BF16,
    FA3_FP8,
    OURS,
    Cell,
    Figure,
    Figures,
    Geometry,
    Shape,
    over,
    plan_cells,
)

FLOOR, MAIN_SHAPE = "of the byte floor", "of the floor beside the main shape"
MAIN = Geometry()
OTHERS = (
    Geometry(28, 4),  # groups of 7
    Geometry(64, 8),  # groups of 8
    Geometry(head_size=64),
    Geometry(head_size=256),
)
LARGE = 256 * 1024
"""Tokens of a batch from which on only bandwidth should count."""
COMPARED = (8, 32_768)
SHAPES = ("1x1024", "64x1024", "1x8192", "1x32768", "32x8192", "8x32768", "8x131072")
KEPT = (1.0, 0.5, 0.1, 0.03)
ANSWERED = (0.15, 0.06)
"""Kept fractions of which a real model's answers are known: timed at `COMPARED`, for the README."""


@dataclass(frozen=True)
class Bar:
    """A least ratio for all cells that match; `at_least` None: the figure is only shown.

    `against` is FLOOR, MAIN_SHAPE (the fraction of the floor, less that of the main shape) or the
    peer whose time is divided by ours.
    """

    what: str
    matches: Callable[[Cell, Figure], bool]
    against: str
    at_least: float | None


@dataclass(frozen=True)
class Verdict:
    """The worst figure of a bar and its cell; both None where nothing was measured."""

    bar: Bar
    figure: float | None
    cell: Cell | None

    @property
    def word(self) -> str:
        if self.figure is None:
            return "not measured"
        if self.bar.at_least is None:
            return "shown"
        return "PASS" if self.figure >= self.bar.at_least else "miss"


def is_main(cell: Cell) -> bool:
    return replace(cell.shape.geometry, page_size=MAIN.page_size) == MAIN


def _at(
    *shapes: tuple[int, int],
    series: str | tuple[str, ...] = OURS,
    kept: tuple[float, float] = (0.0, 1.0),
    value_dtype: str = "auto",
) -> Callable[[Cell, Figure], bool]:
    """Matches cells of the main geometry, batches of `LARGE` tokens where no shape is given."""

    def matches(cell: Cell, figure: Figure) -> bool:
        shape = (cell.shape.batch, cell.shape.seq_len)
        return (
            is_main(cell)
            and (shape in shapes if shapes else cell.shape.tokens >= LARGE)
            and cell.series in ((series,) if isinstance(series, str) else series)
            and kept[0] <= figure.kept <= kept[1]
            and cell.value_dtype == value_dtype
        )

    return matches


def _like(geometry: Geometry) -> Callable[[Cell, Figure], bool]:
    def matches(cell: Cell, figure: Figure) -> bool:
        own = replace(cell.shape.geometry, page_size=MAIN.page_size)
        shape = (cell.shape.batch, cell.shape.seq_len)
        return own == geometry and shape == COMPARED and cell.series == OURS

    return matches


TENTH, LITTLE, ALL = (0.08, 0.12), (0.02, 0.04), (1.0, 1.0)
SHORT = ((1, 1024), (64, 1024))

BARS = (
    Bar("256k tokens and more, kept 0.02 to 0.5", _at(kept=(0.02, 0.5)), FLOOR, 0.9),
    Bar(
        "256k tokens and more, kept 0.02 to 0.5, V fp8",
        _at(kept=(0.02, 0.5), value_dtype="fp8"), FLOOR, 0.9,
    ),
    Bar("8 x 32,768, kept 0.1", _at((8, 32_768), kept=TENTH), FA3_BF16, 2.8),
    Bar("8 x 32,768, kept 0.1", _at((8, 32_768), kept=TENTH), FA3_FP8, 1.5),
    Bar("8 x 131,072, kept 0.03", _at((8, 131_072), kept=LITTLE), FA3_BF16, 3.5),
    Bar("8 x 131,072, kept 0.03", _at((8, 131_072), kept=LITTLE), FA3_FP8, 1.85),
    Bar(
        "8 x 32,768, kept 0.1, V fp8",
        _at((8, 32_768), kept=TENTH, value_dtype="fp8"), FA3_FP8, 1.65,
    ),
    Bar("1 x 32,768, kept 0.1", _at((1, 32_768), kept=TENTH), FA3_BF16, 2.5),
    Bar("1 x 8,192, kept 0.1", _at((1, 8192), kept=TENTH), FA3_BF16, 1.5),
    Bar("256k tokens and more, kept 1, pruning on", _at(kept=ALL), FA3_BF16, 0.92),
    Bar("256k tokens and more, exact", _at(series=EXACT), FA3_BF16, 0.97),
    Bar("1 x 1,024 and 64 x 1,024, pruning on", _at(*SHORT), FA3_BF16, 0.9),
    Bar("1 x 1,024 and 64 x 1,024, exact", _at(*SHORT, series=EXACT), FA3_BF16, 0.9),
    *(
        Bar(f"8 x 32,768, group {g.group}, head size {g.head_size}", _like(g), MAIN_SHAPE, -0.15)
        for g in OTHERS
    ),
    *(
        Bar(f"8 x 32,768, group {g.group}, head size {g.head_size}", _like(g), FA3_BF16, None)
        for g in OTHERS
    ),
)  # fmt: skip


def bar_cells(value_dtypes: list[str], peers: bool = True, page_size: int = 64) -> list[Cell]:
    """The cells that the bars and the README are about."""
    main, *others = (replace(geometry, page_size=page_size) for geometry in (MAIN, *OTHERS))
    shapes = [Shape.parse(text, main) for text in SHAPES]
    cells = plan_cells(shapes, list(KEPT), value_dtypes, [""], peers)
    cells += [Cell(Shape(main, *COMPARED), OURS, kept=kept) for kept in ANSWERED]
    for geometry in others:
        cells.append(Cell(Shape(geometry, *COMPARED), OURS, kept=0.1))
        if peers:
            cells.append(Cell(Shape(geometry, *COMPARED), FA3_BF16))
    return cells


def judge(figures: Figures) -> list[Verdict]:
    """What each bar's worst matching figure is; variants do not count."""
    return [_judge(bar, figures) for bar in BARS]


def _judge(bar: Bar, figures: Figures) -> Verdict:
    ratios = [
        (ratio, cell)
        for cell, figure in figures.items()
        if not cell.is_variant
        and bar.matches(cell, figure)
        and (ratio := _ratio(bar.against, cell, figures)) is not None
    ]
    return Verdict(bar, *min(ratios, default=(None, None)))


def _ratio(against: str, cell: Cell, figures: Figures) -> float | None:
    if against == FLOOR:
        return figures[cell].floor_fraction
    if against != MAIN_SHAPE:
        return over(figures, cell, against)
    geometry = replace(MAIN, page_size=cell.shape.geometry.page_size)
    main = figures.get(replace(cell, shape=replace(cell.shape, geometry=geometry)))
    return figures[cell].floor_fraction - main.floor_fraction if main else None
