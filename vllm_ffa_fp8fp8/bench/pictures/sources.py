"""Files of `bench layers` and `quality`, checked before anything is drawn."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_ffa_fp8fp8.bench.cells import FA3_BF16, FA3_FP8, NOT_OF_DECODE
from vllm_ffa_fp8fp8.bench.files import ENVIRONMENT, FIGURES, entry, read_content, read_object
from vllm_ffa_fp8fp8.bench.store import NUMBER
from vllm_ffa_fp8fp8.config import FFAConfig

LAYERS, QUALITY = "layers", "quality"
OURS = "ours"
SERIES = {"ours": OURS, "fa3-bf16": FA3_BF16, "fa3-fp8": FA3_FP8}
NUMBER_OR_NONE = (*NUMBER, type(None))
SWEPT = ("tau", "delta")
"""Options that make the points of a curve; the first that an option's rule uses."""
SHORT = {
    ("rule", "share"): "by share",
    ("v_cache_dtype", "fp8"): "FP8 V",
    ("use_fp8_residual", False): "no residual",
}


@dataclass(frozen=True)
class Options:
    """What a setting is: its name, and its options as plain data."""

    name: str
    options: dict[str, Any] = field(hash=False)

    @property
    def swept(self) -> str:
        """The option that makes the points of its curve."""
        return "tau" if self.options.get("rule") == "share" else "delta"

    @property
    def value(self) -> float | None:
        """Of that option; None keeps everything."""
        return self.options.get(self.swept)

    @property
    def family(self) -> str:
        """What it has beside the points of its curve, as a legend says it."""
        defaults = FFAConfig(rule="threshold").to_dict()
        others = [
            SHORT.get((name, value), f"{name} {value}".replace("block_size", "blocks of"))
            for name, value in self.options.items()
            if name not in (*SWEPT, *NOT_OF_DECODE) and value != defaults.get(name)
        ]
        return ", ".join(("FFA_FP8FP8", *others))

    @property
    def label(self) -> str:
        """Of its point: a preset's name, or the value."""
        preset, *pairs = self.name.split(",")
        if "=" not in preset and not any(pair.startswith(f"{self.swept}=") for pair in pairs):
            return Path(preset).stem
        return "exact" if self.value is None else f"{self.swept} {self.value:g}"

    @property
    def key(self) -> str:
        """Equal where a launch of decode is."""
        known = {n: v for n, v in self.options.items() if n not in NOT_OF_DECODE}
        return json.dumps(known, sort_keys=True)


@dataclass(frozen=True)
class LayerFigure:
    """One figure of `bench layers`; `setting` None for a peer, `us` None where it was not timed;
    `error` None of a peer that failed."""

    layer: int
    length: int
    batch: int
    series: str
    setting: Options | None
    us: float | None
    kept: float
    kept_by_head: list[float]
    error: float | None
    commit: str


@dataclass(frozen=True)
class LayersFile:
    path: Path
    environment: dict[str, str]
    model: str
    shape: dict[str, int]
    figures: list[LayerFigure]


@dataclass(frozen=True)
class Judged:
    """One setting of `quality`; `setting` None where it is not of ours."""

    name: str
    setting: Options | None
    kept: float
    kl_mean: float
    kl_max: float


@dataclass(frozen=True)
class QualityFile:
    path: Path
    environment: dict[str, str]
    model: str
    text: str
    tokens: int
    last: int
    settings: list[Judged]


def read_layers(path: Path) -> LayersFile:
    """Raises ValueError with the file's name and what is wrong with it."""
    content = read_content(path, LAYERS)

    def parse() -> LayersFile:
        shape = entry(content, "shape", dict)
        sizes = {n: entry(shape, n, int) for n in ("num_heads", "num_kv_heads", "head_size")}
        figures = [parse_layer(record) for record in content[FIGURES]]
        model = entry(content, "model", str)
        return LayersFile(path, content[ENVIRONMENT], model, sizes, figures)

    return told(path, LAYERS, parse)


def parse_layer(record: dict[str, Any]) -> LayerFigure:
    series = entry(record, "series", str)
    if series not in SERIES:
        raise ValueError(f"the entry 'series' cannot be {series!r}")
    setting = None
    if series == OURS:
        setting = Options(entry(record, "setting", str), entry(record, "options", dict))
    return LayerFigure(
        *(entry(record, name, int) for name in ("layer", "length", "batch")),
        SERIES[series],
        setting,
        entry(record, "us", NUMBER_OR_NONE),
        entry(record, "kept", NUMBER),
        entry(record, "kept_by_head", list),
        entry(record, "error", NUMBER_OR_NONE),
        entry({"commit": ""} | record, "commit", str),
    )


def read_quality(path: Path) -> QualityFile:
    """Raises ValueError with the file's name and what is wrong with it."""

    def parse() -> QualityFile:
        content = read_object(path)
        environment = entry(content, ENVIRONMENT, dict)
        for name in ("gpu", "torch", "triton", "vllm"):
            entry(environment, name, str)
        return QualityFile(
            path,
            environment,
            *(entry(content, name, str) for name in ("model", "text")),
            *(entry(content, name, int) for name in ("tokens", "last")),
            [parse_judged(record) for record in entry(content, "settings", list)],
        )

    return told(path, QUALITY, parse)


def parse_judged(record: dict[str, Any]) -> Judged:
    name, options = entry(record, "name", str), record.get("options")
    return Judged(
        name,
        Options(name, entry(record, "options", dict)) if options else None,
        *(entry(record, key, NUMBER) for key in ("kept", "kl_mean", "kl_max")),
    )


def told(path: Path, benchmark: str, parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except ValueError as error:
        raise ValueError(f"{path} holds no figures of {benchmark}: {error}") from error


def model_name(model: str) -> str:
    """Of a folder or a hub's name, without what is before it."""
    return Path(model).name or model
