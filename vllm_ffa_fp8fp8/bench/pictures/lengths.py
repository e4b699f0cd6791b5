"""Latency and speed-up over context length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from vllm_ffa_fp8fp8.bench.pictures.canvas import (
    PEER_NAMES,
    PEER_STYLES,
    add_legend,
    grid,
    log_axis,
    new_picture,
    put_ticks,
    style,
)


@dataclass(frozen=True)
class Line:
    """Microseconds by tokens of a request."""

    label: str
    us: dict[int, float]


Peers = Mapping[str, dict[int, float]]
"""Microseconds of FA3_BF16 and FA3_FP8 by tokens."""


def draw_lengths(panels: Mapping[int, tuple[Sequence[Line], Peers]]) -> Figure | None:
    """A column for each batch of which several lengths were timed: latency, then how many times
    faster than each peer."""
    panels = {
        batch: ([line for line in lines if len(line.us) > 1], peers)
        for batch, (lines, peers) in sorted(panels.items())
    }
    panels = {batch: (lines, peers) for batch, (lines, peers) in panels.items() if lines}
    if not panels:
        return None
    peers = [name for name in PEER_NAMES if any(name in p for _, p in panels.values())]
    labels = list(dict.fromkeys(line.label for lines, _ in panels.values() for line in lines))
    styles = {label: style(i, len(labels)) for i, label in enumerate(labels)}
    picture, axes = new_picture(1 + len(peers), len(panels))
    for column, (batch, (lines, known)) in enumerate(panels.items()):
        first = axes[0][column]
        for peer in peers:
            plot(first, known.get(peer, {}), PEER_STYLES[peer], PEER_NAMES[peer])
        for line in lines:
            plot(first, line.us, styles[line.label], line.label)
        times = [us for line in lines for us in line.us.values()]
        times += [us for peer in known.values() for us in peer.values()]
        first.set_title(f"batch {batch}", fontsize="medium")
        log_axis(first.yaxis, times)
        for row, peer in enumerate(peers, start=1):
            for line in lines:
                plot(axes[row][column], faster(known.get(peer, {}), line.us), styles[line.label])
            axes[row][column].axhline(1, **line_only(PEER_STYLES[peer]))
            axes[row][column].set_ylim(bottom=0)
        lengths = sorted({n for line in lines for n in line.us})
        for row in range(1 + len(peers)):
            grid(axes[row][column])
            log_axis(axes[row][column].xaxis, lengths)
            put_ticks(axes[row][column].xaxis, lengths, "{:,.0f}")
        axes[-1][column].set_xlabel("tokens of a request")
    axes[0][0].set_ylabel("microseconds")
    for row, peer in enumerate(peers, start=1):
        axes[row][0].set_ylabel(f"times faster than\n{PEER_NAMES[peer]}")
    add_legend(picture)
    return picture


def plot(axes, points: Mapping[int, float], look: Mapping[str, Any], label: str = "") -> None:
    lengths = sorted(points)
    axes.plot(lengths, [points[n] for n in lengths], markersize=4, label=label or None, **look)


def faster(peer: Mapping[int, float], ours: Mapping[int, float]) -> dict[int, float]:
    return {length: peer[length] / us for length, us in ours.items() if length in peer}


def line_only(look: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in look.items() if name != "marker"} | {"linewidth": 0.8}
