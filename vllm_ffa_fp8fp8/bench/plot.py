"""Figures as pictures: PNG and SVG files."""

from itertools import groupby
from pathlib import Path

from vllm_ffa_fp8fp8.bench.cells import (
    FA3_BF16,
    FA3_FP8,
    OURS,
    PEERS,
    Cell,
    Figures,
    Geometry,
    Shape,
    over,
)
from vllm_ffa_fp8fp8.bench.files import make_folder
from vllm_ffa_fp8fp8.bench.report import NAMES

FORMATS = ("png", "svg")
HEIGHT, LINE_HEIGHT, TITLE_HEIGHT = 4, 0.18, 0.3
"""Inches of a picture, at least, of a line of its legend, and of its title."""
PEER_STYLES = {FA3_BF16: "k-", FA3_FP8: "k--"}


def plot_figures(figures: Figures, stem: Path, gpu: str) -> list[Path]:
    """Writes `STEM-time`, `STEM-ratio` and `STEM-floor`, those that have a line to draw; all
    figures are of one geometry."""
    import matplotlib

    matplotlib.use("Agg")
    make_folder(stem.parent)
    figures = {cell: figure for cell, figure in figures.items() if not cell.is_variant}
    written = []
    for name, draw in (("time", draw_times), ("ratio", draw_ratios), ("floor", draw_floor)):
        picture = draw(figures)
        if picture is None:
            continue
        geometry = next(iter(figures)).shape.geometry
        picture.suptitle(f"{gpu}, {describe(geometry)}", fontsize="medium")
        for suffix in FORMATS:
            path = stem.with_name(f"{stem.name}-{name}.{suffix}")
            picture.savefig(path, dpi=120)
            written.append(path)
    return written


def describe(geometry: Geometry) -> str:
    return (
        f"{geometry.num_heads} heads over {geometry.num_kv_heads}, head size {geometry.head_size}"
    )


def _panels(count: int):
    from matplotlib.figure import Figure

    picture = Figure(figsize=(2 + 4 * count, HEIGHT), layout="constrained")
    return picture, picture.subplots(1, count, squeeze=False)[0]


def _legend(picture, axes) -> None:
    """Beside the panels, which all have the lines of `axes`, and below the height of the title."""
    handles, labels = axes.get_legend_handles_labels()
    picture.set_figheight(max(HEIGHT, LINE_HEIGHT * (len(labels) + 1) + 2 * TITLE_HEIGHT))
    picture.legend(handles, labels, loc="outside right center", fontsize="small")


def _ours(figures: Figures, value_dtype: str | None = None) -> list[Cell]:
    return sorted(
        cell for cell in figures if cell.series == OURS and value_dtype in (None, cell.value_dtype)
    )


def draw_times(figures: Figures):
    """Microseconds over context, a panel for each batch size with several lengths; V 16-bit."""
    from matplotlib.ticker import LogLocator, NullFormatter

    lengths: dict[int, set[int]] = {}
    for cell in _ours(figures, "auto"):
        lengths.setdefault(cell.shape.batch, set()).add(cell.shape.seq_len)
    batches = sorted(batch for batch in lengths if len(lengths[batch]) > 1)
    if not batches:
        return None
    picture, panels = _panels(len(batches))
    for batch, axes in zip(batches, panels, strict=True):
        for peer, style in PEER_STYLES.items():
            points = _points(
                figures, lambda c, b=batch, p=peer: c.series == p and c.shape.batch == b
            )
            axes.plot(*points, style, label=NAMES[peer])
        for kept in sorted({cell.kept for cell in _ours(figures, "auto")}, reverse=True):
            points = _points(
                figures,
                lambda c, b=batch, k=kept: (
                    (c.series, c.value_dtype, c.kept, c.shape.batch) == (OURS, "auto", k, b)
                ),
            )
            axes.plot(*points, "o-", markersize=3, label=f"FFA_FP8FP8, kept {kept:g}")
        axes.set(title=f"batch {batch}", xlabel="tokens a request", ylabel="microseconds")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sorted(lengths[batch]), [f"{n:,}" for n in sorted(lengths[batch])])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(picture, panels[0])
    return picture


def _points(figures: Figures, matches) -> tuple[list[int], list[float]]:
    cells = sorted((c for c in figures if matches(c)), key=lambda c: c.shape.seq_len)
    return [c.shape.seq_len for c in cells], [figures[c].us for c in cells]


def draw_ratios(figures: Figures):
    """How many times faster than each peer over the kept fraction, a line for each shape."""
    peers = [peer for peer in PEERS if any(cell.series == peer for cell in figures)]
    if not peers or not _has_lines(figures):
        return None
    picture, panels = _panels(len(peers))
    for peer, axes in zip(peers, panels, strict=True):
        for label, style, cells in _lines(figures):
            timed = [cell for cell in cells if over(figures, cell, peer) is not None]
            axes.plot(
                [figures[cell].kept for cell in timed],
                [over(figures, cell, peer) for cell in timed],
                style, markersize=3, label=label,
            )  # fmt: skip
        axes.axhline(1, color="k", linewidth=0.8)
        axes.set(title=f"over {NAMES[peer]}", xlabel="kept fraction", ylabel="times faster")
    _legend(picture, panels[0])
    return picture


def draw_floor(figures: Figures):
    """Fraction of the byte floor over the kept fraction, a line for each shape."""
    if not _has_lines(figures):
        return None
    picture, (axes,) = _panels(1)
    for label, style, cells in _lines(figures):
        axes.plot(
            [figures[cell].kept for cell in cells],
            [figures[cell].floor_fraction for cell in cells],
            style, markersize=3, label=label,
        )  # fmt: skip
    axes.axhline(1, color="k", linewidth=0.8)
    axes.set(xlabel="kept fraction", ylabel="fraction of the byte floor", ylim=(0, 1.05))
    _legend(picture, axes)
    return picture


def _has_lines(figures: Figures) -> bool:
    """Whether anything was timed at several kept fractions; else a picture is of lone points."""
    return any(len(cells) > 1 for _, _, cells in _lines(figures))


def _lines(figures: Figures):
    """Label, style and cells of each shape and dtype of V, colours by shape."""
    colours: dict[Shape, str] = {}
    cells = sorted(_ours(figures), key=lambda c: (c.shape, c.value_dtype, c.kept))
    for (shape, value_dtype), line in groupby(cells, key=lambda c: (c.shape, c.value_dtype)):
        colour = colours.setdefault(shape, f"C{len(colours)}")
        fp8 = value_dtype == "fp8"
        yield f"{shape}{', V fp8' if fp8 else ''}", f"{colour}{'s--' if fp8 else 'o-'}", list(line)
