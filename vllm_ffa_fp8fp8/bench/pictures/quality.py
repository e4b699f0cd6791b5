"""What is kept and what it costs in KL divergence, over the option that is turned."""

from matplotlib.figure import Figure

from vllm_ffa_fp8fp8.bench.pictures.canvas import (
    Label,
    add_legend,
    grid,
    log_axis,
    new_picture,
    put_labels,
    put_ticks,
    style,
)
from vllm_ffa_fp8fp8.bench.pictures.sources import SWEPT, Judged, QualityFile
from vllm_ffa_fp8fp8.bench.quality.plan import FP8_CACHE, floor_of

UNITS = {"delta": "delta, log2 units", "tau": "tau, a share of the softmax"}


def draw_quality(file: QualityFile) -> Figure | None:
    """A column for each option that is turned: KL above, skipped below; a line a family."""
    ours = [j for j in file.settings if j.setting and j.setting.value is not None]
    turned = [name for name in SWEPT if any(j.setting.swept == name for j in ours)]
    if not turned:
        return None
    families = list(dict.fromkeys(j.setting.family for j in ours))
    picture, axes = new_picture(2, len(turned), (5.5, 3.0))
    named = {judged.name: judged for judged in file.settings}
    fp8, floor = named.get(FP8_CACHE), floor_of(named)
    everything = [kl for j in (*ours, *filter(None, [fp8])) for kl in (j.kl_mean, j.kl_max)]
    labels = []
    for (above, below), option in zip(axes.T, turned, strict=True):
        names = []
        points = sorted((j for j in ours if j.setting.swept == option), key=value)
        for index, family in enumerate(families):
            line = [j for j in points if j.setting.family == family]
            look = style(index, len(families)) | {"markersize": 5}
            x = list(map(value, line))
            above.plot(x, [j.kl_mean for j in line], label=f"{family}, mean", **look)
            above.plot(
                x, [j.kl_max for j in line], label=f"{family}, largest of a token",
                **look | {"linestyle": ":", "markersize": 3},
            )  # fmt: skip
            below.plot(x, [1 - j.kept for j in line], **look)
            names += [
                Label(value(j), j.kl_mean, j.name, look["color"]) for j in line if "=" not in j.name
            ]
        if fp8:
            above.axhline(fp8.kl_mean, color="black", linestyle="--", label="fp8 cache, mean")
            above.axhline(
                fp8.kl_max, color="#777777", linestyle=":", label="fp8 cache, largest of a token"
            )
        log_axis(above.yaxis, everything)
        if floor:
            above.axhspan(0, floor.kl_mean, color="#eeeeee", label="the default's own rounding")
        below.set_ylim(0, 1.02)
        for place in (above, below):
            grid(place)
            if option == "tau":
                log_axis(place.xaxis, map(value, points))
            else:
                place.set_xlim(0, 1.1 * max(map(value, points)))
                put_ticks(place.xaxis, sorted(set(map(value, points))))
        below.set_xlabel(UNITS[option])
        labels.append((above, names))
    axes[0][0].set_ylabel("KL divergence, nats")
    axes[1][0].set_ylabel("skipped fraction of the blocks")
    add_legend(picture)
    for place, names in labels:
        put_labels(picture, place, names)
    return picture


def value(judged: Judged) -> float:
    return judged.setting.value
