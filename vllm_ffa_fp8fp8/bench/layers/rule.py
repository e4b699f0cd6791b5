"""What attention gives for recorded decode steps, in float64: exactly, by the rule of a setting,
and rounded as FlashAttention 3 rounds. All steps of a request at once; the oracle of the kernels,
`decode_attention_reference`, does the same a step at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from vllm_ffa_fp8fp8.bench.layers.contexts import Steps, window
from vllm_ffa_fp8fp8.bench.layers.share import Dealt, share_weights
from vllm_ffa_fp8fp8.bench.rounding import (
    LEAST_SCORE_ROUNDING,
    LOG2_E,
    MOST_SCORE_ROUNDING,
    SCORE_ROUNDING,
)
from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.kernels.cache_reference import (
    join_key_reference,
    join_value_reference,
    round_value_reference,
    split_key_reference,
)

PAGE_SIZE = 64
SHARED_BY_NONE = Dealt()
"""One program has all of a request."""
FP8 = torch.float8_e4m3fn
FP8_WEIGHT_SCALE = 256.0
"""FlashAttention 3 multiplies softmax weights with it before it rounds them to E4M3."""

ANCHOR_TOKENS = 16


@dataclass(frozen=True)
class Outcome:
    """Of all steps: outputs, and what was read of their blocks.

    Args:
        output: float64 `[steps, num_heads, head_size]`.
        kept: blocks that each KV head read, `[steps, num_kv_heads]`.
        least, most: the same if all decisions that rounding may change went against, or for, a
            block.
        num_blocks: blocks of a step.
        dropped: softmax mass of the blocks that were not read, `[steps, num_heads]`.
        slack: by how much rounded scores may move the output, and the decisions that follow from
            them, `[steps, num_heads]`, Euclidean; 0 where outputs are rounded as a kernel's.
    """

    output: torch.Tensor
    kept: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor
    num_blocks: int
    dropped: torch.Tensor
    slack: torch.Tensor

    def figure(self, error: float, kept: torch.Tensor | None = None) -> dict[str, Any]:
        """What is kept of it; `kept`: blocks of each KV head, of all steps, where a kernel counted
        them."""
        kept = self.kept.sum(0) if kept is None else kept
        by_head = (kept.double() / (self.num_blocks * len(self.kept))).tolist()
        return {
            "us": None,
            "kept": round(sum(by_head) / len(by_head), 5),
            "kept_by_head": [round(fraction, 5) for fraction in by_head],
            "dropped_mass": float(f"{self.dropped.mean().item():.4g}"),
            "error": error,
            "failed": None,
        }


def block_size_of(config: FFAConfig) -> int:
    return config.block_size_in(PAGE_SIZE)


def block_weights(
    scores: torch.Tensor,
    config: FFAConfig,
    lowered: torch.Tensor | float = 0.0,
    layer: int = 0,
    kv_head: int = 0,
    dealt: Dealt = SHARED_BY_NONE,
) -> torch.Tensor:
    """The rule: which blocks a KV head reads, and how many times their weights count.

    Args:
        scores: base scores of the group's heads, log2 units, `[steps, group, seq_len]`.
        lowered: by how much to lower the threshold, log2 units, `[steps, group]`.
        layer, kv_head, dealt: what draws depend on.

    Returns `[steps, num_blocks]`: 0 where a block is not read.
    """
    size = block_size_of(config)
    steps, _, seq_len = scores.shape
    num_blocks = -(-seq_len // size)
    weights = scores.new_ones(steps, num_blocks)
    if not config.prunes or seq_len < config.min_context:
        return weights
    if config.rule == "share":
        return share_weights(
            scores, config.tau, block_size=size, layer=layer, kv_head=kv_head, dealt=dealt,
            raised=lowered,
        )  # fmt: skip
    first, last = scores[..., :ANCHOR_TOKENS], scores[..., -ANCHOR_TOKENS:]
    threshold = torch.maximum(first.amax(-1), last.amax(-1)) - config.delta - lowered
    above = in_blocks(scores - threshold[..., None], size, -math.inf).amax((1, 3)) >= 0
    above[:, -1] = True
    return weights * above


def in_blocks(tokens: torch.Tensor, block_size: int, fill: float) -> torch.Tensor:
    """`[..., seq_len]` as `[..., num_blocks, block_size]`, the last block filled up."""
    return F.pad(tokens, (0, -tokens.shape[-1] % block_size), value=fill).unflatten(
        -1, (-1, block_size)
    )


class Head:
    """One KV head of the steps of one request, with the query heads that share it."""

    def __init__(self, steps: Steps, request: int, head: int):
        recorded = steps.requests[request]
        group = steps.shape.num_heads // steps.shape.num_kv_heads
        numbers = [step for number, step in steps.chosen if number == request]
        heads = slice(head * group, (head + 1) * group)
        self.query = recorded.query[numbers, heads]  # [steps, group, head_size]
        self.key, self.value = recorded.key[:, head], recorded.value[:, head]
        windows = [window(recorded, step, steps.length) for step in numbers]
        self.tokens = torch.stack(windows)[:, None].expand(-1, group, -1)
        self.scale = steps.shape.scale * LOG2_E
        self.layer, self.number = steps.layer, head

    def scores(self, key: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """`[steps, group, seq_len]`, log2 units."""
        query = self.query if query is None else query
        return (query.double() @ key.double().mT * self.scale).gather(2, self.tokens)

    def average(self, weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Weights times values, `[steps, group, head_size]`."""
        spread = weights.new_zeros(*weights.shape[:2], len(value))
        return spread.scatter_(2, self.tokens, weights) @ value.double()

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and softmax."""
        weights = torch.softmax(self.scores(self.key) * math.log(2), -1)
        return self.average(weights, self.value), weights

    def fa3_bf16(self) -> torch.Tensor:
        """Weights, which lie in (0, 1], and output are rounded to the model's dtype."""
        scores = self.scores(self.key)
        weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
        output = self.average(self._rounded(weights), self.value)
        return self._rounded(output / weights.sum(-1, keepdim=True))

    def fa3_fp8(self) -> torch.Tensor:
        """Queries, keys, values and weights are rounded to E4M3, with scales of 1 (vLLM's, where a
        checkpoint has none)."""
        scores = self.scores(to_e4m3(self.key), to_e4m3(self.query))
        weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
        rounded = to_e4m3(weights * FP8_WEIGHT_SCALE) / FP8_WEIGHT_SCALE
        output = self.average(rounded, to_e4m3(self.value))
        return self._rounded(output / weights.sum(-1, keepdim=True))

    def ours(
        self,
        exact: torch.Tensor,
        configs: Sequence[FFAConfig],
        dealt: Sequence[Dealt],
        rounded: bool,
    ) -> list[Outcome]:
        """For each setting and how its requests are shared; `exact` is the softmax. `rounded`:
        weights and output as the kernel rounds them."""
        base, residual, exponent = split_key_reference(self.key)
        base_key = join_key_reference(base, None, exponent, dtype=torch.float64)
        whole_key = join_key_reference(base, residual, exponent, dtype=torch.float64)
        base_scores = self.scores(base_key)
        scores = {False: base_scores, True: self.scores(whole_key)}
        values = {"auto": self.value}
        values["fp8"] = join_value_reference(*round_value_reference(self.value), torch.float64)
        sizes = self.scores(base_key.abs(), self.query.abs())
        return [
            self._outcome(
                exact, base_scores, sizes, scores[c.use_fp8_residual], values[c.v_cache_dtype], c,
                d, rounded,
            )
            for c, d in zip(configs, dealt, strict=True)
        ]  # fmt: skip

    def _outcome(self, exact, base_scores, sizes, scores, value, config, dealt, rounded) -> Outcome:
        size = block_size_of(config)
        margin = sizes.amax(-1) * MOST_SCORE_ROUNDING + LEAST_SCORE_ROUNDING
        read, least, most = (
            block_weights(base_scores, config, by * margin, self.layer, self.number, dealt)
            for by in (0.0, -1.0, 1.0)
        )
        output, weights = self._attend(scores, value, read, size, rounded)
        slack = torch.zeros_like(margin)
        if not rounded:
            ends = [self._attend(scores, value, w, size, rounded)[0] for w in (least, most)]
            slack = 2 * sum((end - output).norm(dim=-1) for end in ends)
            slack += 4 * self._noise(weights * sizes, value, output)
        counts = ((weights > 0).sum(1, keepdim=True) for weights in (read, least, most))
        return Outcome(
            output,
            *counts,
            num_blocks=read.shape[1],
            dropped=(exact * (self._of_tokens(read, size) == 0)).sum(-1),
            slack=slack,
        )

    def _noise(self, weights, value, output) -> torch.Tensor:
        """By how much scores move an output, of which each is off by itself, `[steps, group]`; the
        root mean square. `weights`: of the softmax, times the sizes of scores."""
        squares = value.double().square().sum(-1, keepdim=True)
        moments = torch.cat([squares, value.double(), torch.ones_like(squares)], -1)
        square, cross, total = self.average(weights.square(), moments).split(
            [1, value.shape[-1], 1], -1
        )
        spread = square - 2 * (cross * output).sum(-1, keepdim=True)
        spread += total * output.square().sum(-1, keepdim=True)
        return math.log(2) * SCORE_ROUNDING * spread[..., 0].clamp(min=0).sqrt()

    def _attend(
        self, scores, value, weights, block_size: int, rounded: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to the tokens of blocks whose weight is not 0, `[steps, group, head_size]`, and
        the softmax that it takes, `[steps, group, seq_len]`."""
        times = self._of_tokens(weights, block_size)
        scores = scores.masked_fill(times == 0, -math.inf)
        weights = torch.exp2(scores - scores.amax(-1, keepdim=True)) * times
        output = self.average(self._rounded(weights) if rounded else weights, value)
        total = weights.sum(-1, keepdim=True)
        output = output / total
        return self._rounded(output) if rounded else output, weights / total

    def _of_tokens(self, weights: torch.Tensor, block_size: int) -> torch.Tensor:
        """`[steps, num_blocks]` as `[steps, 1, seq_len]`."""
        tokens = weights.repeat_interleave(block_size, 1)
        return tokens[:, None, : self.tokens.shape[2]]

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.query.dtype).double()


def to_e4m3(tensor: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 numbers, the largest for what is larger, in float64."""
    largest = torch.finfo(FP8).max
    return tensor.float().clamp(-largest, largest).to(FP8).double()


@dataclass(frozen=True)
class Truth:
    """Of all steps: exact outputs, FlashAttention 3's as they are simulated, by its cache, and the
    outcome of each setting."""

    exact: torch.Tensor
    peers: dict[str, torch.Tensor]
    ours: list[Outcome]


def relative(output: torch.Tensor, truth: Truth) -> float | None:
    """Relative error of outputs of all steps, in the Euclidean norm; None where it is none."""
    error = ((output.double() - truth.exact).norm() / truth.exact.norm()).item()
    return float(f"{error:.4g}") if math.isfinite(error) else None


def compute(
    steps: Steps,
    configs: Sequence[FFAConfig],
    rounded: bool,
    dealt: Sequence[Dealt] | None = None,
) -> Truth:
    """`rounded`: settings as the kernel rounds, else as its oracle gives them. `dealt`: how
    programs share the requests of each setting; None: one has all."""
    dealt = dealt or [SHARED_BY_NONE] * len(configs)
    return _joined(
        [
            _joined(
                [
                    _of_head(Head(steps, request, head), configs, dealt, rounded)
                    for head in range(steps.shape.num_kv_heads)
                ],
                dim=1,
            )
            for request in range(len(steps.requests))
        ],
        dim=0,
    )


def _of_head(head: Head, configs, dealt, rounded: bool) -> Truth:
    output, softmax = head.exact()
    peers = {"fa3-bf16": head.fa3_bf16(), "fa3-fp8": head.fa3_fp8()}
    return Truth(output, peers, head.ours(softmax, configs, dealt, rounded))


def _joined(parts: Sequence[Truth], dim: int) -> Truth:
    return Truth(
        torch.cat([part.exact for part in parts], dim),
        {name: torch.cat([p.peers[name] for p in parts], dim) for name in parts[0].peers},
        [_join_outcomes(o, dim) for o in zip(*(part.ours for part in parts), strict=True)],
    )


def _join_outcomes(outcomes: Sequence[Outcome], dim: int) -> Outcome:
    tensors = {
        field.name: torch.cat([getattr(outcome, field.name) for outcome in outcomes], dim)
        for field in fields(Outcome)
        if field.name != "num_blocks"
    }
    return replace(outcomes[0], **tensors)
