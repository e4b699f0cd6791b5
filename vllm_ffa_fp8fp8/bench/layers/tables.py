"""Figures of recorded layers as tables."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.table import Table

from vllm_ffa_fp8fp8.bench.files import Records
from vllm_ffa_fp8fp8.bench.report import CACHED, ratio, table

OURS, FA3_BF16, FA3_FP8 = "ours", "fa3-bf16", "fa3-fp8"
NAMES = {FA3_BF16: "FA3, bf16 cache", FA3_FP8: "FA3, fp8 cache"}
ALL = "all"


def figure_tables(figures: Sequence[dict[str, Any]], records: Records) -> list[Table]:
    """A table for each batch and length: layer by layer, and the means of all layers."""

    def shape(figure: dict[str, Any]) -> tuple[int, int]:
        return figure["length"], figure["batch"]

    return [
        _table(f"{batch} x {length:,} tokens", list(group), records)
        for (length, batch), group in groupby(sorted(figures, key=shape), key=shape)
    ]


def _table(title: str, figures: list[dict[str, Any]], records: Records) -> Table:
    timed = any(figure["us"] is not None or figure["failed"] for figure in figures)
    times = ["us", "over bf16", "over fp8"] if timed else []
    result = table(
        title, "layer", "", *times, "kept", "by KV head", "dropped mass", "relative error"
    )
    layers = sorted({figure["layer"] for figure in figures})
    groups = [(str(n), [f for f in figures if f["layer"] == n]) for n in layers]
    if len(layers) > 1:
        groups.append((ALL, means(figures)))
    for name, group in groups:
        by_series = {figure["series"]: figure for figure in group}
        for figure in group:
            result.add_row(
                name,
                label(figure),
                *(_times(figure, by_series, records) if timed else ()),
                f"{figure['kept']:.3f}",
                _spread(figure["kept_by_head"]),
                f"{figure['dropped_mass']:.2g}",
                "-" if figure["error"] is None else f"{figure['error']:.2e}",
            )
    return result


def label(figure: dict[str, Any]) -> str:
    return NAMES.get(figure["series"], figure["setting"])


def _times(
    figure: dict[str, Any], by_series: dict[str, dict[str, Any]], records: Records
) -> tuple[str, str, str]:
    if figure["us"] is None:
        return ("check failed" if figure["failed"] else "-", "-", "-")
    cached = CACHED if "code" in figure and records.is_cached(figure) else ""
    others = (by_series.get(name, {}).get("us") for name in NAMES)
    return f"{figure['us']:,.1f}{cached}", *(ratio(us and us / figure["us"]) for us in others)


def _spread(by_head: Sequence[float]) -> str:
    return f"{min(by_head):.3f} to {max(by_head):.3f}" if by_head else "-"


def means(figures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the layers of each setting and peer; errors as root of the mean square. A setting that
    failed in a layer has neither time nor error."""
    names = dict.fromkeys(map(label, figures))
    return [_mean([figure for figure in figures if label(figure) == name]) for name in names]


def _mean(figures: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(values: list[float | None]) -> float | None:
        return None if None in values else sum(values) / len(values)

    squares = [figure["error"] and figure["error"] ** 2 for figure in figures]
    square = mean(squares)
    return {
        "series": figures[0]["series"],
        "setting": figures[0]["setting"],
        "us": mean([figure["us"] for figure in figures]),
        "kept": mean([figure["kept"] for figure in figures]),
        "kept_by_head": [k for figure in figures for k in figure["kept_by_head"]],
        "dropped_mass": mean([figure["dropped_mass"] for figure in figures]),
        "error": None if square is None else square**0.5,
        "failed": next((figure["failed"] for figure in figures if figure["failed"]), None),
    }


def failures(figures: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"layer {f['layer']}, {f['batch']} x {f['length']:,}, {label(f)}: {f['failed']}"
        for f in figures
        if f["failed"]
    ]
