"""Recorded decode steps on a GPU: settings and FlashAttention 3, checked and timed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vllm_ffa_fp8fp8.bench.cells import FA3_BF16, FA3_FP8, Geometry, Shape
from vllm_ffa_fp8fp8.bench.decoder import (
    TOLERANCE,
    CheckFailed,
    Decoder,
    excess,
    relative_error,
)
from vllm_ffa_fp8fp8.bench.inputs import Inputs, num_sets
from vllm_ffa_fp8fp8.bench.layers.contexts import Steps
from vllm_ffa_fp8fp8.bench.layers.rule import (
    PAGE_SIZE,
    SHARED_BY_NONE,
    Outcome,
    Truth,
    compute,
    relative,
)
from vllm_ffa_fp8fp8.bench.layers.share import Dealt
from vllm_ffa_fp8fp8.bench.peers import time_peer
from vllm_ffa_fp8fp8.bench.recording.layouts import (
    shuffled_table,
    stack,
    to_pages,
    to_planes,
)
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.kernels.cache.page_layout import KVPlanes, PageLayout
from vllm_ffa_fp8fp8.kernels.counters import new_counters
from vllm_ffa_fp8fp8.option_values import RULES

PEERS = {"fa3-bf16": FA3_BF16, "fa3-fp8": FA3_FP8}
Found = Iterator[tuple[int, str, dict[str, Any]]]
"""Batch, name of a setting or peer, and the figure."""


def shape_of(steps: Steps, batch: int, page_size: int = PAGE_SIZE) -> Shape:
    heads = (steps.shape.num_heads, steps.shape.num_kv_heads, steps.shape.head_size)
    return Shape(Geometry(*heads, page_size), batch, steps.length)


def page_size_of(config: FFAConfig) -> int:
    return max(PAGE_SIZE, config.block_size or 0)


class Batches:
    """Batches of recorded steps in pages: the steps in turn, from the first one again behind the
    last; `count` batches, or as many as together exceed the L2 cache and hold every step."""

    def __init__(self, steps: Steps, batch: int, page_size: int, count: int | None = None):
        self.shape = shape_of(steps, batch, page_size)
        self.scale, self.layer = steps.shape.scale, steps.layer
        enough = max(num_sets(self.shape), -(-len(steps.chosen) // batch))
        self.sets = [self._make(steps, number) for number in range(count or enough)]

    def _make(self, steps: Steps, number: int) -> Inputs:
        batch, page_size = self.shape.batch, self.shape.geometry.page_size
        dense = stack([steps.dense(number * batch + row) for row in range(batch)])
        device = dense.query.device
        table = shuffled_table(batch, steps.length, page_size, number, device)
        lengths = torch.full((batch,), steps.length, dtype=torch.int32, device=device)
        key, value = (to_pages(rows, table, page_size) for rows in (dense.key, dense.value))
        return Inputs(dense.query[:, 0], key, value, table, lengths, None)

    def planes(self, config: FFAConfig) -> list[KVPlanes]:
        """The keys and values of each batch in our cache."""
        layout = PageLayout(
            self.shape.geometry.head_size,
            self.sets[0].key.dtype,
            residual=config.use_fp8_residual,
            fp8_value=config.v_cache_dtype == "fp8",
        )
        return [to_planes(inputs.key, inputs.value, layout) for inputs in self.sets]

    def decoder(self, config: FFAConfig, planes: KVPlanes) -> Decoder:
        if self.shape.seq_len < config.min_context:
            config = unpruned(config)
        device, dtype = str(planes.value.device), planes.value.dtype
        decoder = Decoder(
            self.shape, config.prunes, {}, device, dtype, config=config, layer=self.layer
        )
        decoder.scale = self.scale
        return decoder


def unpruned(config: FFAConfig) -> FFAConfig:
    return replace(config, **{RULES[config.rule]: None})


class Expected:
    """The oracle's outcomes of all steps: those of the rule share for each way in which programs
    share a request, which the size of a batch decides."""

    def __init__(self, steps: Steps, configs: Mapping[str, FFAConfig]):
        self.steps, self.configs = steps, configs
        self.found: dict[tuple[str, Dealt], Outcome] = {}

    def outcomes(self, dealt: Mapping[str, Dealt]) -> dict[str, Outcome]:
        """Of settings; `dealt`: how their requests are shared."""
        due = [pair for pair in dealt.items() if pair not in self.found]
        if due:
            configs = [self.configs[name] for name, _ in due]
            truth = compute(self.steps, configs, rounded=False, dealt=[d for _, d in due])
            self.found |= zip(due, truth.ours, strict=True)
        return {name: self.found[name, d] for name, d in dealt.items()}


def measure_settings(
    steps: Steps, configs: Mapping[str, FFAConfig], truth: Truth, batches: Sequence[int]
) -> Found:
    """Figures of settings: errors and kept blocks over all steps, times of those whose outputs
    are the oracle's."""
    expected = Expected(steps, configs)
    layouts: dict[tuple, list[str]] = {}
    for name, config in configs.items():
        layout = (page_size_of(config), config.use_fp8_residual, config.v_cache_dtype)
        layouts.setdefault(layout, []).append(name)
    for (page_size, *_), names in layouts.items():
        figures = {}
        for batch in (None, *batches):
            count = None if batch else 1
            timed = Batches(steps, batch or len(steps.chosen), page_size, count)
            planes = timed.planes(configs[names[0]])
            decoders = {name: timed.decoder(configs[name], planes[0]) for name in names}
            first = (timed.sets[0], planes[0])
            outcomes = expected.outcomes({n: dealt_by(d, *first) for n, d in decoders.items()})
            for name, decoder in decoders.items():
                output, kept = run(decoder, *first)
                rows = of_rows(outcomes[name], range(timed.shape.batch))
                problem = problem_of(output, kept, rows)
                if batch is None:
                    figure = outcomes[name].figure(relative(output, truth), kept)
                    figures[name] = figure | {"failed": problem}
                    continue
                problem = figures[name]["failed"] or problem
                us = None if problem else decoder.time(timed.sets, planes)
                yield batch, name, figures[name] | {"us": us, "failed": problem}
            del timed, planes, first, decoders, decoder


def dealt_by(decoder: Decoder, inputs: Inputs, planes: KVPlanes) -> Dealt:
    """How programs share each of the decoder's requests, which are equally long."""
    if decoder.limit is None or decoder.config.rule != "share":
        return SHARED_BY_NONE
    return Dealt(**decoder.dealt(inputs, planes)[0])


def measure_peers(
    steps: Steps, peers: Sequence[str], truth: Truth, batches: Sequence[int]
) -> Found:
    """Figures of FlashAttention 3: errors over all steps, and times."""
    for peer in peers:
        figure: dict[str, Any] = {"error": None, "failed": None}
        whole = Batches(steps, len(steps.chosen), PAGE_SIZE, count=1)
        for batch in (None, *batches):
            timed = whole if batch is None else Batches(steps, batch, PAGE_SIZE)
            rows = [row % len(truth.exact) for row in range(timed.shape.batch)]
            try:
                us, error = time_peer(
                    timed.shape, timed.sets, PEERS[peer], exact=truth.exact[rows], scale=timed.scale
                )
            except CheckFailed as problem:
                us, figure["failed"] = None, str(problem)
            if batch is None:
                figure["error"] = None if figure["failed"] else error
            else:
                yield batch, peer, figure | {"us": us}


def run(decoder: Decoder, inputs: Inputs, planes: KVPlanes) -> tuple[torch.Tensor, torch.Tensor]:
    """The output in float64, and the blocks that each KV head kept."""
    dtype = inputs.query.dtype
    if not inputs.query.is_cuda:
        dtype = torch.float32  # interpreted casts truncate
    output = torch.full_like(inputs.query, float("nan"), dtype=dtype)
    heads = decoder.shape.geometry.num_kv_heads
    counters = new_counters(heads, output.device)
    decoder.launch(inputs, planes, output, counters)
    return output.double(), counters[:, 0]


def problem_of(output: torch.Tensor, kept: torch.Tensor, expected: Outcome) -> str | None:
    """What is wrong with a kernel's output and kept blocks, or None. `expected` is the oracle's
    outcome of the same steps."""
    if not output.isfinite().all():
        return "the output is not finite"
    if not excess(output, expected.output, expected.slack) <= TOLERANCE:
        return f"the output is off by {relative_error(output, expected.output):.1e}"
    least, most = expected.least.sum(0), expected.most.sum(0)
    if not ((least <= kept) & (kept <= most)).all():
        return f"{kept.tolist()} blocks kept, where {least.tolist()} to {most.tolist()} can be"
    return None


def of_rows(outcome: Outcome, rows: Sequence[int]) -> Outcome:
    """The outcome of some steps, counted on from the first one behind the last."""
    names = ("output", "kept", "least", "most", "dropped", "slack")
    rows = [row % len(outcome.output) for row in rows]
    return replace(outcome, **{name: getattr(outcome, name)[rows] for name in names})
