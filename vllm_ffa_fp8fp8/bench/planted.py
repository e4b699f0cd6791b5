"""Decode batches whose scores follow a known distribution, as small models do not show them all.

Scores are in log2 units: a softmax weight is `2^score` over their sum. Rows of a group have scores
of their own where nothing else is said.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from vllm_ffa_fp8fp8.bench.cells import OFFSET, SINK, Shape
from vllm_ffa_fp8fp8.bench.inputs import Inputs

MASS = 0.9
"""What a sink, a needle and a window have of the softmax."""
THIN = 0.3
"""Spread of the scores of tokens that do not matter."""
HOT_SCORE = 16.0
LEAST_HOT, MOST_HOT = 0.03, 0.3
"""Fractions of the blocks that matter to the first and to the last KV head, the first and the last
block among them."""
SMALLEST_WINDOW, WINDOWS = 64, 6
SINK_VALUE = 1e-3
OFFSET_KEY, OFFSET_CHANNELS, OFFSET_QUERY = 24.0, 8, 6.0
"""Of keys whose spread is 1, and what the query has in those channels."""

Draw = Callable[..., torch.Tensor]
"""Normal numbers of a shape."""


def dominant(scores: torch.Tensor) -> torch.Tensor:
    """The score, `[...]`, that has `MASS` beside `scores`, `[..., tokens]`."""
    return torch.logsumexp(scores * math.log(2), -1) / math.log(2) + math.log2(MASS / (1 - MASS))


def thin(shape: Shape, draw: Draw) -> torch.Tensor:
    geometry = shape.geometry
    return THIN * draw(geometry.num_kv_heads, geometry.group, shape.seq_len)


def sink(shape: Shape, draw: Draw) -> torch.Tensor:
    """The first token has most of the mass, and next to no value."""
    scores = thin(shape, draw)
    scores[..., 0] = dominant(scores[..., 1:])
    return scores


def needle(shape: Shape, draw: Draw) -> torch.Tensor:
    """One token somewhere between has most of the mass."""
    scores = thin(shape, draw)
    place = shape.seq_len // 4 + (draw(len(scores)).abs() * 1e6).long() % (shape.seq_len // 2)
    place = place[:, None, None].expand(*scores.shape[:2], 1)
    rest = scores.scatter(-1, place, -math.inf)
    return scores.scatter(-1, place, dominant(rest)[..., None])


def local(shape: Shape, draw: Draw) -> torch.Tensor:
    """The newest tokens have most of the mass: 64 of them to 2,048, by KV head."""
    scores = thin(shape, draw)
    for head, rows in enumerate(scores):
        window = min(SMALLEST_WINDOW << head % WINDOWS, shape.seq_len // 2)
        inside = draw(len(rows), window)
        weight = torch.logsumexp(inside * math.log(2), -1) / math.log(2)
        rows[:, -window:] = inside + (dominant(rows[:, :-window]) - weight)[:, None]
    return scores


def heads(shape: Shape, draw: Draw) -> torch.Tensor:
    """As many blocks with a high score in the last KV head as tenfold those of the first."""
    scores = thin(shape, draw)
    size, count = shape.geometry.page_size, len(scores)
    for head, rows in enumerate(scores):
        kept = LEAST_HOT * (MOST_HOT / LEAST_HOT) ** (head / max(1, count - 1))
        others = 1 + draw(shape.pages - 2).argsort()  # the first and the last are kept anyhow
        blocks = others[: max(0, round(kept * shape.pages) - 2)]
        rows[:, blocks * size + size // 2] = HOT_SCORE
    scores[..., 0] = HOT_SCORE
    return scores


def lognormal(spread: float) -> Callable[[Shape, Draw], torch.Tensor]:
    """Normal scores; half of their variance is that of the whole group."""

    def scores(shape: Shape, draw: Draw) -> torch.Tensor:
        geometry = shape.geometry
        shared = draw(geometry.num_kv_heads, 1, shape.seq_len)
        own = draw(geometry.num_kv_heads, geometry.group, shape.seq_len)
        return (own + shared) * (spread / math.sqrt(2))

    return scores


SCORES: dict[str, Callable[[Shape, Draw], torch.Tensor]] = {
    SINK: sink,
    "needle": needle,
    "local": local,
    "heads": heads,
    OFFSET: lognormal(2.0),
    "lognormal-1": lognormal(1.0),
    "lognormal-2": lognormal(2.0),
    "lognormal-3": lognormal(3.0),
}
"""Scores of a request, `[num_kv_heads, group, tokens]`."""


def make_planted(shape: Shape, planted: str, seed: int, device: str = "cuda") -> Inputs:
    """Random keys and values with such scores, up to the rounding of keys and queries to bf16."""
    geometry, dtype = shape.geometry, torch.bfloat16
    num_kv_heads, group, head_size = geometry.num_kv_heads, geometry.group, geometry.head_size
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    query = draw(shape.batch, num_kv_heads, group, head_size)
    if planted == OFFSET:
        query[..., :OFFSET_CHANNELS] = OFFSET_QUERY * draw(num_kv_heads, 1, OFFSET_CHANNELS)
    query = query.to(dtype)
    keys, values = [], []
    for rows in query.float():  # [num_kv_heads, group, head_size]
        key, value = draw(2, num_kv_heads, shape.seq_len, head_size)
        if planted == OFFSET:
            key[..., :OFFSET_CHANNELS] += offsets(rows[:, 0, :OFFSET_CHANNELS], draw)
        wanted = SCORES[planted](shape, draw) / (head_size**-0.5 * math.log2(math.e))
        missing = wanted - rows @ key.mT
        key += missing.mT @ torch.linalg.pinv(rows).mT  # the least change that gives the scores
        if planted == SINK:
            value[:, 0] *= SINK_VALUE
        keys.append(key.to(dtype))
        values.append(value.to(dtype))
    return paged(shape, query.flatten(1, 2), keys, values, generator)


def offsets(query: torch.Tensor, draw: Draw) -> torch.Tensor:
    """The same for all tokens, `[num_kv_heads, 1, channels]`, and at a right angle to the query,
    `[num_kv_heads, channels]`: they cost precision and change no score."""
    found = OFFSET_KEY * draw(*query.shape).sign()
    along = (found * query).sum(-1, keepdim=True) / query.square().sum(-1, keepdim=True)
    return (found - along * query)[:, None]


def paged(
    shape: Shape,
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    generator: torch.Generator,
) -> Inputs:
    """Lays keys and values, `[num_kv_heads, tokens, head_size]` a request, in shuffled pages."""
    device, page_size = query.device, shape.geometry.page_size
    order = torch.randperm(shape.batch * shape.pages, generator=generator, device=device)
    block_table = order.view(shape.batch, shape.pages)
    num_kv_heads, _, head_size = keys[0].shape
    cache = query.new_zeros(2, len(order), page_size, num_kv_heads, head_size)
    for pages, *planes in zip(block_table, keys, values, strict=True):
        for plane, rows in zip(cache, planes, strict=True):
            rows = F.pad(rows, (0, 0, 0, shape.pages * page_size - shape.seq_len))
            plane[pages] = rows.transpose(0, 1).unflatten(0, (-1, page_size))
    seq_lens = torch.full((shape.batch,), shape.seq_len, dtype=torch.int32, device=device)
    return Inputs(query, *cache, block_table.to(torch.int32), seq_lens, None)
