"""Figures of recorded layers: what is asked for, what earlier runs have, and what is measured."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from vllm_ffa_fp8fp8.bench.files import Records
from vllm_ffa_fp8fp8.bench.layers.contexts import (
    Steps,
    choose_steps,
    main_shape,
    on_device,
    with_heads,
)
from vllm_ffa_fp8fp8.bench.layers.device import (
    PEERS,
    measure_peers,
    measure_settings,
    unpruned,
)
from vllm_ffa_fp8fp8.bench.layers.rule import compute, relative
from vllm_ffa_fp8fp8.bench.recording.store import Recording, digest_of
from vllm_ffa_fp8fp8.bench.store import PEER_FILES, fingerprint
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.settings import Setting

OURS = "ours"
WHOLE = {"kept": 1.0, "kept_by_head": [], "dropped_mass": 0.0, "failed": None, "us": None}
"""What is known of a kernel that reads everything."""
OUR_FILES = (
    "contexts.py", "decoder.py", "device.py", "inputs.py", "layouts.py", "measure.py", "rule.py",
    "rounding.py", "share.py", "timing.py",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One figure to measure: of a setting's name and options, or of a peer, which has neither."""

    layer: int
    length: int
    batch: int
    series: str
    setting: str = ""
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    def key(self, digest: str) -> dict[str, Any]:
        """Of its record; `digest`: of the layer's data."""
        return asdict(self) | {"data": digest}


def plan_points(
    layers: Sequence[int],
    lengths: Sequence[int],
    batches: Sequence[int],
    settings: Sequence[Setting],
    peers: bool = True,
) -> list[Point]:
    points = []
    for layer in layers:
        for length in lengths:
            for batch in batches:
                place = (layer, length, batch)
                points += [Point(*place, OURS, s.name, s.options) for s in settings]
                points += [Point(*place, peer) for peer in PEERS if peers]
    return points


def measure(
    recording: Recording,
    points: Sequence[Point],
    heads: str,
    device: str,
    records: Records,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The figures of `points`, from earlier runs or measured now; saved layer by layer and length
    by length. Raises ValueError for a recording that is damaged or too short."""
    codes = {series: code_of(series) for series in (OURS, *PEERS)}
    figures = []
    for layer, of_layer in groupby(points, key=lambda point: point.layer):
        digest, loaded = recording.digest(layer), None
        for length, group in groupby(of_layer, key=lambda point: point.length):
            found = {point: records.find(point.key(digest), codes[point.series]) for point in group}
            due = [point for point, record in found.items() if record is None]
            if due:
                tell(f"layer {layer}, {length:,} tokens: {len(due)} of {len(found)} to measure")
                loaded = loaded or with_heads(on_device(recording.load(layer), device), heads)
                steps = choose_steps(loaded, length)
                for point, figure in measure_steps(steps, due, recording.header.num_layers):
                    found[point] = records.put(point.key(digest), figure, codes[point.series])
                records.save()
            figures += found.values()
    return figures


def code_of(series: str) -> str:
    """Names the code that a figure depends on. Peers' own versions are part of the environment."""
    ours = fingerprint("vllm_ffa_fp8fp8.bench", only=OUR_FILES)[:6]
    if series == OURS:
        return f"{fingerprint('vllm_ffa_fp8fp8.kernels')}-{ours}"
    return f"{fingerprint('vllm_ffa_fp8fp8.bench', only=PEER_FILES)}-{ours}"


def measure_steps(
    steps: Steps, points: Sequence[Point], num_layers: int
) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Figures of points of one layer and length: measured where the steps are on a GPU, else
    simulated."""
    configs = {
        point.setting: effective(point, num_layers) for point in points if point.series == OURS
    }
    peers = list(dict.fromkeys(point.series for point in points if point.series != OURS))
    by_name = {(point.batch, point.setting or point.series): point for point in points}
    found = measured if steps.requests[0].key.is_cuda else simulated
    for batch, name, figure in found(steps, configs, peers, {point.batch for point in points}):
        if (batch, name) in by_name:
            yield by_name[batch, name], figure


def effective(point: Point, num_layers: int) -> FFAConfig:
    """The options that hold in a layer. Raises ValueError where `dense_layers` names layers that
    the model does not have."""
    config = FFAConfig.load(overrides=point.options, num_layers=num_layers)
    return unpruned(config) if point.layer in config.dense_layers else config


Figures = Iterator[tuple[int, str, dict[str, Any]]]


def measured(steps, configs: Mapping[str, FFAConfig], peers, batches: set[int]) -> Figures:
    truth = compute(steps, [], rounded=False)
    if configs:
        yield from measure_settings(steps, configs, truth, sorted(batches))
    for batch, peer, figure in measure_peers(steps, peers, truth, sorted(batches)):
        yield batch, peer, WHOLE | figure


def simulated(steps, configs: Mapping[str, FFAConfig], peers, batches: set[int]) -> Figures:
    truth = compute(steps, list(configs.values()), rounded=True)
    figures = {peer: WHOLE | {"error": relative(truth.peers[peer], truth)} for peer in peers}
    for name, outcome in zip(configs, truth.ours, strict=True):
        figures[name] = outcome.figure(relative(outcome.output, truth))
    for batch in batches:
        for name, figure in figures.items():
            yield batch, name, figure


def subject(recording: Recording, layers: Sequence[int], heads: str) -> dict[str, Any]:
    """What all figures of a file are of. Raises ValueError for layers of different shapes, and for
    what FFA_FP8FP8 does not store."""
    header = recording.header
    if header.dtype not in ("bfloat16", "float16"):
        raise ValueError(f"{recording.folder} is of dtype {header.dtype}, not of 16 bits")
    shapes = {
        (s.num_heads, s.num_kv_heads, s.head_size)
        for s in (main_shape(recording.shape(layer), heads) for layer in layers)
    }
    if len(shapes) > 1:
        raise ValueError(f"layers of several shapes: choose --layers of one, {sorted(shapes)}")
    (shape,) = shapes
    content = json.dumps([header.model, header.prompts, header.steps, header.environment])
    return {
        "model": header.model,
        "data": {
            "fingerprint": digest_of(content.encode()),
            "layers": header.num_layers,
            "tokens": recording.lengths,
            "steps": header.steps,
            "recorded": header.environment,
        },
        "heads": heads,
        "shape": dict(zip(("num_heads", "num_kv_heads", "head_size"), shape, strict=True)),
    }
