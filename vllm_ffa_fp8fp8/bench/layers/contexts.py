"""Decode steps of a recorded layer, all with a context of one length, and heads for them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vllm_ffa_fp8fp8.bench.recording.layouts import FIRST_TOKENS, Dense, decode_step
from vllm_ffa_fp8fp8.bench.recording.store import LayerShape, RecordedLayer, RecordedRequest

MODEL, MAIN = "model", "main"
HEADS = (MODEL, MAIN)
MAIN_HEADS, MAIN_KV_HEADS, MAIN_HEAD_SIZE = 32, 8, 128
MOST_STEPS = 16
"""Decode steps that figures are means of."""
LONGER = 1.25
"""Prompts up to so many times the shortest that is long enough count as of its length."""


@dataclass(frozen=True)
class Steps:
    """Some decode steps of a layer, the model's `layer`-th; `chosen` are pairs of request and
    step."""

    layer: int
    shape: LayerShape
    requests: list[RecordedRequest]
    chosen: list[tuple[int, int]]
    length: int

    def dense(self, place: int) -> Dense:
        """One of the chosen steps, a batch of one."""
        request, step = self.chosen[place % len(self.chosen)]
        return decode_step(self.requests[request], step, self.length)


def on_device(layer: RecordedLayer, device: str) -> RecordedLayer:
    """The layer there, without its hidden states."""
    requests = [
        RecordedRequest(*(tensor.to(device) for tensor in (r.query, r.key, r.value)), None)
        for r in layer.requests
    ]
    return replace(layer, requests=requests)


def choose_steps(layer: RecordedLayer, length: int) -> Steps:
    """Up to MOST_STEPS steps, evenly spread over the requests of about `length` tokens. Raises
    ValueError where all prompts are shorter."""
    tokens = [request.prompt_tokens for request in layer.requests]
    enough = [n for n in tokens if n + 1 >= length]
    if not enough:
        raise ValueError(
            f"no prompt has {length:,} tokens, the longest has {max(tokens):,}: record a longer "
            "one, or choose shorter --lengths"
        )
    places = [
        (number, step)
        for number, request in enumerate(layer.requests)
        if length <= request.prompt_tokens + 1 <= LONGER * (min(enough) + 1)
        for step in range(request.steps)
    ]
    count = min(MOST_STEPS, len(places))
    chosen = [places[i * len(places) // count] for i in range(count)]
    used = sorted({number for number, _ in chosen})
    return Steps(
        layer.index,
        layer.shape,
        [layer.requests[number] for number in used],
        [(used.index(number), step) for number, step in chosen],
        length,
    )


def window(request: RecordedRequest, step: int, length: int) -> torch.Tensor:
    """Which of the request's tokens `decode_step` leaves, `[length]`."""
    seen = request.prompt_tokens + 1 + step
    first = min(FIRST_TOKENS, length // 2) if length < seen else 0
    device = request.key.device
    newest = torch.arange(seen - (length - first), seen, device=device)
    return torch.cat([torch.arange(first, device=device), newest])


def main_shape(shape: LayerShape, heads: str) -> LayerShape:
    """The shape that `with_heads` gives."""
    if heads == MODEL:
        return shape
    size = max(shape.head_size, MAIN_HEAD_SIZE)
    return replace(shape, num_heads=MAIN_HEADS, num_kv_heads=MAIN_KV_HEADS, head_size=size)


def with_heads(layer: RecordedLayer, heads: str) -> RecordedLayer:
    """The layer as it is, or with its heads repeated to the main shape.

    KV heads are repeated in turn; each copy takes the next four query heads of its group, from the
    first one again behind the last. Head sizes below 128 are filled up with zeros, which leaves
    scores and outputs as they are; larger ones stay.
    """
    if heads == MODEL:
        return layer
    shape = layer.shape
    group, main_group = shape.num_heads // shape.num_kv_heads, MAIN_HEADS // MAIN_KV_HEADS
    kv_heads = [head % shape.num_kv_heads for head in range(MAIN_KV_HEADS)]
    query_heads = [
        kv_head * group + (copy // shape.num_kv_heads * main_group + i) % group
        for copy, kv_head in enumerate(kv_heads)
        for i in range(main_group)
    ]
    main = main_shape(shape, heads)
    requests = [
        RecordedRequest(
            _select(request.query, query_heads, main.head_size),
            _select(request.key, kv_heads, main.head_size),
            _select(request.value, kv_heads, main.head_size),
            request.hidden,
        )
        for request in layer.requests
    ]
    return replace(layer, shape=main, requests=requests)


def _select(tensor: torch.Tensor, heads: Sequence[int], head_size: int) -> torch.Tensor:
    return F.pad(tensor[:, list(heads)], (0, head_size - tensor.shape[2]))
