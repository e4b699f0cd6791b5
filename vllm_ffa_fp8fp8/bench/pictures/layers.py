"""Pictures of `bench layers`: over context length, and what each layer and head keeps."""

from collections import defaultdict
from statistics import fmean

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from vllm_ffa_fp8fp8.bench.pictures.canvas import new_picture, put_ticks
from vllm_ffa_fp8fp8.bench.pictures.frontier import Panel, Point, points_of
from vllm_ffa_fp8fp8.bench.pictures.lengths import Line, draw_lengths
from vllm_ffa_fp8fp8.bench.pictures.sources import LayersFile, Options

MOST_SETTINGS = 6
LEAST_KEPT = 0.01
"""The darkest colour's; what keeps less is as dark."""
MOST_NUMBERS = 12
"""KV heads up to which a cell has room for its number."""
TICKS = (0.01, 0.03, 0.1, 0.3, 1)


def draw_over_lengths(file: LayersFile) -> dict[str, Figure]:
    """By family of settings: a line for each setting, means over layers."""
    points = points_of(file, timed=True)
    families = dict.fromkeys(p.setting.family for ps in points.values() for p in ps if p.setting)
    drawn = {family: draw_lengths(lines_of(points, family)) for family in families}
    return {family: picture for family, picture in drawn.items() if picture is not None}


def lines_of(points: dict[Panel, list[Point]], family: str) -> dict:
    """What `draw_lengths` takes."""
    ours, peers = defaultdict(lambda: defaultdict(dict)), defaultdict(lambda: defaultdict(dict))
    for (length, batch), found in points.items():
        for point in sorted(found, key=lambda point: point.cost, reverse=True):
            if point.setting is None:
                peers[batch][point.series][length] = point.cost
            elif point.setting.family == family:
                ours[batch][point.setting.label][length] = point.cost
    return {
        batch: ([Line(label, us) for label, us in lines.items()], peers[batch])
        for batch, lines in ours.items()
    }


def name(setting: Options) -> str:
    """With its family."""
    others = setting.family.partition(", ")[2]
    return ", ".join(filter(None, (setting.label, others)))


def heat_maps(file: LayersFile) -> dict[int, Figure]:
    """By length: a panel for each of up to MOST_SETTINGS settings that keep less than everything,
    what each layer and KV head keeps."""
    return {
        length: picture
        for length in sorted({figure.length for figure in file.figures})
        if (picture := draw_heat_map(file, length)) is not None
    }


def draw_heat_map(file: LayersFile, length: int) -> Figure | None:
    kept: dict[str, dict[int, list[float]]] = {}
    for f in file.figures:
        if f.length == length and f.setting and f.kept_by_head:
            kept.setdefault(name(f.setting), {})[f.layer] = f.kept_by_head
    kept = {n: rows for n, rows in kept.items() if fmean(map(fmean, rows.values())) < 1}
    shown = spread(list(kept.items()), MOST_SETTINGS)
    if not shown:
        return None
    columns = min(len(shown), 3)
    num_layers = max(len(rows) for _, rows in shown)
    heads = max(len(row) for _, rows in shown for row in rows.values())
    panel = (max(2.6, 0.42 * min(heads, 16) + 1.2), max(2.0, 0.26 * num_layers + 0.9))
    picture, axes = new_picture(-(-len(shown) // columns), columns, panel)
    for place, (label, rows) in zip(axes.flat, shown, strict=False):
        layers = sorted(rows)
        table = [[max(k, LEAST_KEPT) for k in rows[layer]] for layer in layers]
        image = place.imshow(
            table, norm=LogNorm(LEAST_KEPT, 1), cmap="cividis", aspect="auto"
        )  # fmt: skip
        place.set_title(f"{label}: kept {fmean(map(fmean, rows.values())):.2f}", fontsize="medium")
        place.set_yticks(range(len(layers)), list(map(str, layers)), fontsize="small")
        step = 1 if heads <= 8 else 4
        place.set_xticks(range(0, heads, step))
        if heads <= MOST_NUMBERS:
            put_numbers(place, [rows[layer] for layer in layers])
    for place in axes.flat[len(shown) :]:
        place.set_axis_off()
    for row in axes:
        row[0].set_ylabel("layer")
    picture.supxlabel("KV head", fontsize="medium")
    bar = picture.colorbar(image, ax=axes, label="kept fraction of the blocks", shrink=0.9)
    put_ticks(bar.ax.yaxis, TICKS)
    return picture


def spread(items: list, most: int) -> list:
    """The first one, the last one, and others evenly between them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def put_numbers(axes, table: list[list[float]]) -> None:
    for y, row in enumerate(table):
        for x, kept in enumerate(row):
            text = f"{kept:.2f}".removeprefix("0") if kept < 0.995 else "1"
            axes.text(
                x, y, text, ha="center", va="center", fontsize=6,
                color="black" if kept > 0.1 else "white",
            )  # fmt: skip
