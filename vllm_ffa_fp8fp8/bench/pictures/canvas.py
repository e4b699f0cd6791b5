"""What all pictures share: colours, axes with few ticks, labels that do not overlap, files."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vllm_ffa_fp8fp8.bench.cells import FA3_BF16, FA3_FP8
from vllm_ffa_fp8fp8.bench.files import make_folder, replacing
from vllm_ffa_fp8fp8.bench.report import conditions

FORMATS = ("png", "svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's: told apart by the colour-blind, too."""
MARKERS = "osD^vP"
PEER_NAMES = {FA3_BF16: "FA3, bf16 cache", FA3_FP8: "FA3, fp8 cache"}
PEER_STYLES = {
    FA3_BF16: {"color": "black", "linestyle": "-", "marker": "s"},
    FA3_FP8: {"color": "#777777", "linestyle": "--", "marker": "D"},
}
PANEL = (4.2, 3.3)
"""Inches of a panel."""
MOST_TICKS = 6
PLACES = (
    (6, 4, "left"), (-6, -11, "right"), (6, -11, "left"), (-6, 4, "right"), (0, 8, "center"),
    (0, -14, "center"),
)  # fmt: skip
"""Of a label beside its point: offset in points, and how it is aligned."""


def style(index: int, count: int) -> dict[str, Any]:
    """Of one line of `count`."""
    marker = MARKERS[index % len(MARKERS)]
    if count <= len(COLOURS):
        return {"color": COLOURS[index], "marker": marker}
    shade = matplotlib.colormaps["viridis"](0.9 * index / (count - 1))
    return {"color": shade, "marker": marker}


def new_picture(rows: int, columns: int, panel: tuple[float, float] = PANEL) -> tuple[Figure, Any]:
    """A picture and its panels, `[rows, columns]`."""
    width, height = panel
    size = (max(width * columns, 6.0), height * rows + 0.9)
    picture = Figure(figsize=size, layout="constrained")
    return picture, picture.subplots(rows, columns, squeeze=False)


def add_title(picture: Figure, what: str, environment: Mapping[str, str], commits=()) -> None:
    told = conditions(dict(environment), commits) if any(commits) else short(environment)
    picture.suptitle(f"{what}\n{told}", fontsize="medium")


def short(environment: Mapping[str, str]) -> str:
    return conditions(dict(environment), [""]).rpartition(";")[0]


def add_legend(picture: Figure) -> None:
    """Below the panels; what several of them have is named once."""
    known = {}
    for axes in picture.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    columns = max(1, min(len(known), int(picture.get_figwidth() / 2.4)))
    picture.legend(
        known.values(), known.keys(), loc="outside lower center", ncols=columns, fontsize="small"
    )


def log_axis(axis: Axis, values: Iterable[float], form: str = "{:g}") -> None:
    """A logarithmic axis with few ticks, at 1, 2 and 5 times powers of ten or at powers alone."""
    low, high = span(values)
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    getattr(axis.axes, f"set_{axis.axis_name}lim")(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= MOST_TICKS:
            break
    put_ticks(axis, ticks, form)


def put_ticks(axis: Axis, ticks: Sequence[float], form: str = "{:g}") -> None:
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))


def span(values: Iterable[float]) -> tuple[float, float]:
    """A little more than the positive values take, on a logarithmic axis."""
    known = [value for value in values if value > 0]
    low, high = min(known), max(known)
    room = max(1.25, (high / low) ** 0.12)
    return low / room, high * room


def grid(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class Label:
    """What a point is called, in the colour of its curve."""

    x: float
    y: float
    text: str
    color: str = "black"


def put_labels(picture: Figure, axes: Axes, labels: Sequence[Label]) -> None:
    """Names points beside them, where no other name, point or curve is; a name without room is
    left out. After everything else is drawn."""
    picture.draw_without_rendering()
    curves = [xy for line in axes.lines for xy in along(axes, line)]
    boxes, inside = [text.get_window_extent() for text in axes.texts], axes.get_window_extent()
    for label in labels:
        for right, up, align in PLACES:
            text = axes.annotate(
                label.text, (label.x, label.y), (right, up), textcoords="offset points",
                ha=align, fontsize=8, color=label.color,
            )  # fmt: skip
            box = text.get_window_extent().padded(2)
            if (
                not any(box.overlaps(other) for other in boxes)
                and not any(box.contains(*point) for point in curves)
                and all(inside.contains(*corner) for corner in box.corners())
            ):
                boxes.append(box)
                break
            text.remove()


def along(axes: Axes, line: Line2D) -> np.ndarray:
    """Points on a curve, close to each other, in pixels `[n, 2]`; none of a line across."""
    if line.get_transform() != axes.transData or len(line.get_xydata()) == 0:
        return np.empty((0, 2))
    corners = axes.transData.transform(line.get_xydata())
    if line.get_linestyle() == "None" or len(corners) == 1:
        return corners
    steps = np.linspace(0, 1, 60)[:, None, None]
    return (corners[:-1] * (1 - steps) + corners[1:] * steps).reshape(-1, 2)


def save(pictures: Mapping[Path, Figure]) -> list[Path]:
    """Writes each picture to its stem with every suffix. Raises ValueError where that fails."""
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "ffa-fp8fp8"}):  # the same file for the same data
        for stem, picture in pictures.items():
            make_folder(stem.parent)
            for suffix in FORMATS:
                path = stem.with_name(f"{stem.name}.{suffix}")
                with replacing(path) as part:
                    picture.savefig(
                        part, format=suffix, dpi=150,
                        metadata={"Date": None} if suffix == "svg" else None,
                    )  # fmt: skip
                written.append(path)
    return written
