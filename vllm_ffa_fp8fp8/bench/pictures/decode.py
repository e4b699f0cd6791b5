"""Pictures of `bench decode`."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from vllm_ffa_fp8fp8.bench.cells import OURS, PEERS, Cell, Figures, Geometry, over
from vllm_ffa_fp8fp8.bench.pictures.canvas import (
    PEER_NAMES,
    add_legend,
    add_title,
    grid,
    log_axis,
    new_picture,
    style,
)
from vllm_ffa_fp8fp8.bench.pictures.lengths import Line, draw_lengths


def decode_pictures(
    figures: Figures, environment: dict[str, str], stem: Path
) -> dict[Path, Figure]:
    """Pictures by the stem of their files, those that have a line to draw; all figures are of one
    geometry."""
    figures = {cell: figure for cell, figure in figures.items() if not cell.is_variant}
    commits = {figure.commit for figure in figures.values()}
    drawn = {}
    for name, draw in (
        ("lengths", draw_over_lengths),
        ("speedup", draw_speedups),
        ("floor", draw_floor),
    ):
        picture = draw(figures)
        if picture is not None:
            geometry = next(iter(figures)).shape.geometry
            what = f"Decode attention, planted blocks: {describe(geometry)}"
            add_title(picture, what, environment, commits)
            drawn[stem.with_name(f"{stem.name}-{name}")] = picture
    return drawn


def describe(geometry: Geometry) -> str:
    return (
        f"{geometry.num_heads} heads over {geometry.num_kv_heads}, head size {geometry.head_size}"
    )


def draw_over_lengths(figures: Figures) -> Figure | None:
    """A line for each kept fraction; V 16-bit."""
    panels = {}
    for batch in sorted({cell.shape.batch for cell in figures}):
        own = {cell: f.us for cell, f in figures.items() if cell.shape.batch == batch}
        ours = [cell for cell in own if cell.series == OURS and cell.value_dtype == "auto"]
        lines = [
            Line(
                f"FFA_FP8FP8, kept {kept:g}",
                {c.shape.seq_len: own[c] for c in ours if c.kept == kept},
            )
            for kept in sorted({cell.kept for cell in ours}, reverse=True)
        ]
        peers = {
            peer: {c.shape.seq_len: us for c, us in own.items() if c.series == peer}
            for peer in PEERS
        }
        panels[batch] = (lines, {peer: us for peer, us in peers.items() if us})
    return draw_lengths(panels)


def draw_speedups(figures: Figures) -> Figure | None:
    """How many times faster than each peer over the kept fraction, a line for each shape."""
    peers = [peer for peer in PEERS if any(cell.series == peer for cell in figures)]
    lines = list(lines_of(figures))
    if not peers or not lines:
        return None
    picture, (panels,) = new_picture(1, len(peers))
    for peer, axes in zip(peers, panels, strict=True):
        for label, look, cells in lines:
            timed = [cell for cell in cells if over(figures, cell, peer) is not None]
            kept = [figures[cell].kept for cell in timed]
            axes.plot(kept, [over(figures, c, peer) for c in timed], label=label, **look)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="kept fraction", ylabel=f"times faster than {PEER_NAMES[peer]}")
        kept_axis(axes, figures, lines)
    add_legend(picture)
    return picture


def draw_floor(figures: Figures) -> Figure | None:
    """Fraction of the byte floor over the kept fraction, a line for each shape."""
    lines = list(lines_of(figures))
    if not lines:
        return None
    picture, ((axes,),) = new_picture(1, 1, (6.5, 3.6))
    for label, look, cells in lines:
        kept = [figures[cell].kept for cell in cells]
        axes.plot(kept, [figures[cell].floor_fraction for cell in cells], label=label, **look)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="kept fraction", ylabel="fraction of the byte floor", ylim=(0, 1.05))
    kept_axis(axes, figures, lines)
    add_legend(picture)
    return picture


def kept_axis(axes, figures: Figures, lines: list) -> None:
    grid(axes)
    log_axis(axes.xaxis, (figures[cell].kept for *_, cells in lines for cell in cells))


def lines_of(figures: Figures) -> Iterator[tuple[str, dict, list[Cell]]]:
    """Label, look and cells of each shape that was timed at several kept fractions; V 16-bit."""
    cells = [cell for cell in figures if cell.series == OURS and cell.value_dtype == "auto"]
    cells.sort(key=lambda cell: (cell.shape, figures[cell].kept))
    found = [(s, list(line)) for s, line in groupby(cells, key=lambda cell: cell.shape)]
    found = [(shape, line) for shape, line in found if len(line) > 1]
    for index, (shape, line) in enumerate(found):
        yield str(shape), style(index, len(found)) | {"markersize": 3.5}, line
