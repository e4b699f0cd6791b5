"""The frontier: what a setting costs over how exact it is, beside FlashAttention's two caches."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from vllm_ffa_fp8fp8.bench.cells import FA3_BF16, FA3_FP8
from vllm_ffa_fp8fp8.bench.pictures.canvas import (
    PEER_NAMES,
    PEER_STYLES,
    Label,
    add_legend,
    grid,
    log_axis,
    new_picture,
    put_labels,
    style,
)
from vllm_ffa_fp8fp8.bench.pictures.sources import LayerFigure, LayersFile, Options, QualityFile
from vllm_ffa_fp8fp8.bench.quality.plan import DEFAULT, FP8_CACHE, floor_of


@dataclass(frozen=True)
class Point:
    """Means over layers; `cost` in microseconds or, where nothing was timed, the kept fraction."""

    setting: Options | None
    series: str
    cost: float
    error: float


Panel = tuple[int, int]
"""Length and batch."""


def points_of(file: LayersFile, timed: bool) -> dict[Panel, list[Point]]:
    """What was measured of all layers, by length and batch."""
    layers = {figure.layer for figure in file.figures}
    groups: dict[tuple, list[LayerFigure]] = defaultdict(list)
    for f in file.figures:
        if f.error is not None and not (timed and f.us is None):
            groups[f.length, f.batch, f.series, f.setting and f.setting.key].append(f)
    panels: dict[Panel, list[Point]] = defaultdict(list)
    for (length, batch, series, _), figures in sorted(groups.items(), key=lambda g: g[0][:2]):
        if {figure.layer for figure in figures} != layers:
            continue
        cost = fmean(f.us if timed else f.kept for f in figures)
        error = fmean(f.error for f in figures)
        panels[length, batch].append(Point(figures[0].setting, series, cost, error))
    return dict(panels)


def panels_of(file: LayersFile) -> tuple[bool, dict[int, dict[int, list[Point]]]]:
    """Whether anything was timed, and points by length and batch: batch 0 where nothing was, as on
    a CPU, since what is kept does not depend on it."""
    timed = any(figure.us is not None for figure in file.figures)
    by_length: dict[int, dict[int, list[Point]]] = defaultdict(dict)
    for (length, batch), points in points_of(file, timed).items():
        by_length[length][batch if timed else 0] = points
    return timed, by_length


def draw_frontiers(file: LayersFile) -> dict[int, Figure]:
    """By length: latency over the output's error, a panel for each batch; where nothing was timed,
    the kept fraction over it."""
    timed, by_length = panels_of(file)
    drawn = {
        length: draw_panels(length, panels, "relative error of the output, 2-norm", timed)
        for length, panels in by_length.items()
    }
    return {length: picture for length, picture in drawn.items() if picture is not None}


def draw_kl_frontier(file: LayersFile, quality: QualityFile) -> Figure | None:
    """The same over KL divergence, at the length that is nearest to the text's."""
    judged = {j.setting.key: j.kl_mean for j in quality.settings if j.setting}
    named = {j.name: j.kl_mean for j in quality.settings if not j.setting}
    kl = {FA3_BF16: named.get(DEFAULT), FA3_FP8: named.get(FP8_CACHE)}
    timed, by_length = panels_of(file)
    if not by_length:
        return None
    nearest = min(by_length, key=lambda length: abs(length - quality.tokens))
    found = {
        batch: [
            Point(p.setting, p.series, p.cost, error)
            for p in points
            if (error := judged.get(p.setting.key) if p.setting else kl[p.series]) is not None
        ]
        for batch, points in by_length[nearest].items()
    }
    what = f"mean KL divergence from the default backend, nats, at {quality.tokens:,} tokens"
    picture = draw_panels(nearest, found, what, timed)
    if picture is not None and (floor := floor_of(named)):
        for axes in picture.axes:
            axes.axvspan(0, floor, color="#eeeeee", zorder=0)
            axes.annotate(
                "the default's own rounding", (floor, 0), (-3, 4), textcoords="offset points",
                rotation=90, ha="right", fontsize=7, color="#777777",
            )  # fmt: skip
    return picture


def draw_panels(
    length: int, panels: Mapping[int, list[Point]], error: str, timed: bool
) -> Figure | None:
    """`panels`: points by batch."""
    panels = {
        batch: points
        for batch, points in sorted(panels.items())
        if any(p.setting and p.error > 0 for p in points)
    }
    if not panels:
        return None
    picture, (axes,) = new_picture(1, len(panels), (5.4, 4.2))
    everything = [point for points in panels.values() for point in points]
    families = list(dict.fromkeys(p.setting.family for p in everything if p.setting))
    labels = []
    for place, (batch, points) in zip(axes, panels.items(), strict=True):
        labels.append((place, draw_panel(place, points, families, timed)))
        log_axis(place.xaxis, (point.error for point in everything))
        grid(place)
        place.set_title(
            f"{batch} x {length:,} tokens" if timed else f"{length:,} tokens", fontsize="medium"
        )
        place.set_xlabel(error)
    axes[0].set_ylabel("microseconds of a layer" if timed else "kept fraction")
    add_legend(picture)
    for place, named in labels:
        put_labels(picture, place, named)
    return picture


def draw_panel(axes, points: Iterable[Point], families: list[str], timed: bool) -> list[Label]:
    """Curves of ours, lines and points of the peers; returns the labels of our points."""
    points = list(points)
    labels = []
    for index, family in enumerate(families):
        ours = [p for p in points if p.setting and p.setting.family == family and p.error > 0]
        ours.sort(key=lambda p: p.error)
        look = style(index, len(families))
        errors, costs = [p.error for p in ours], [p.cost for p in ours]
        axes.plot(errors, costs, markersize=5, label=family, **look)
        labels += [Label(p.error, p.cost, p.setting.label, look["color"]) for p in ours]
    peers = [p for p in points if p.setting is None and timed]
    slowest = max((peer.cost for peer in peers), default=0)
    for peer in peers:
        look = PEER_STYLES[peer.series]
        axes.axhline(peer.cost, color=look["color"], linestyle=":", linewidth=0.9)
        axes.annotate(
            PEER_NAMES[peer.series], (1, peer.cost), (0, 2.5 if peer.cost == slowest else -10),
            xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
            fontsize=8, color=look["color"],
        )  # fmt: skip
        if peer.error > 0:
            axes.plot([peer.error], [peer.cost], markersize=7, **look)
    axes.set_ylim(0, 1.15 * max(point.cost for point in points))
    return labels
