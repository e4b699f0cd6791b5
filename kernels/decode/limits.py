"""The largest batch that decode is made for, and how batches of up to that are cut."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

from ..runtime import HOPPER_SHARED_MEMORY
from .tuning import DecodeTuning, decode_tuning

MIN_SPAN = 64
"""Tokens that are read together at least where smaller blocks are drawn."""

MASS_BYTES = 64 << 20
"""The most memory for the masses of blocks. Of a batch whose requests have more together, which
share pages many times over then, the last ones are read in full."""

INVARIANT_BLOCKS = 64
"""Spans of a work item where a request is cut alike in every batch."""
INVARIANT_ITEMS = 32
"""The most items of a request there; longer requests have larger items."""


@triton.constexpr_function
def list_numbers(span, block_size, query_len):
    """Numbers by which a program lists what it reads of a span by share: the weights of each block,
    and three for each run of 16 tokens at least."""
    return span // block_size * query_len + 3 * (span // 16)


def code_lag(query_len: int) -> int:
    """Of a request's tokens that no later step takes back, codes of keys stand for those that end
    so many before the last one, where requests have up to `query_len` tokens a step: it may have so
    many more than in the step before, and one more, for another request can get hold of a page in
    the step that completes it."""
    return query_len + 1


@dataclass(frozen=True)
class DecodeLimits:
    """The largest batch that a plan and its scratch are made for.

    Args:
        num_reqs, seq_len: the most requests of a batch, the most tokens of a request.
        num_heads, num_kv_heads, head_size: of the model, on this rank.
        block_size: tokens that are kept or skipped together: 16, 32, 64 or 128.
        num_processors: multiprocessors of the device.
        query_len: the most query tokens of a request.
        batch_invariant: cut every request as its length alone says, so that its output is the
            same, bit for bit, in every batch.
        rule: how blocks to skip are found: none, threshold or share.
        key_bytes, value_bytes: of an element of K's base and of V.
        capability, shared_memory: compute capability of the device, and the bytes of shared memory
            that a program can have there.
        tuning: launch parameters; None: those that `decode_tuning` has for each batch.
    """

    num_reqs: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    num_processors: int = 8
    query_len: int = 1
    batch_invariant: bool = False
    rule: str = "threshold"
    key_bytes: int = 1
    value_bytes: int = 2
    capability: tuple[int, int] = (9, 0)
    shared_memory: int = HOPPER_SHARED_MEMORY
    tuning: DecodeTuning | None = None

    @classmethod
    def on_device(
        cls,
        device: torch.device,
        *,
        key_dtype: torch.dtype = torch.float8_e4m3fn,
        value_dtype: torch.dtype = torch.bfloat16,
        **batch: int | bool,
    ) -> "DecodeLimits":
        """Limits with what the device has; `batch`: the other arguments of the class."""
        found: dict[str, Any] = {}
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            found = {
                "num_processors": properties.multi_processor_count,
                "capability": (properties.major, properties.minor),
                "shared_memory": properties.shared_memory_per_block_optin,
            }
        sizes = {"key_bytes": key_dtype.itemsize, "value_bytes": value_dtype.itemsize}
        return cls(**found, **sizes, **batch)

    @property
    def code_lag(self) -> int:
        return code_lag(self.query_len)

    @property
    def prunes(self) -> bool:
        """Whether blocks are skipped."""
        return self.rule != "none"

    @property
    def span(self) -> int:
        """Tokens that are dealt out to work items together, one or more blocks."""
        return max(self.block_size, MIN_SPAN) if self.rule == "share" else self.block_size

    def tuning_of(self, num_reqs: int) -> DecodeTuning:
        """Launch parameters of a batch of `num_reqs` requests."""
        return self.tuning or decode_tuning(
            self.num_reqs if self.batch_invariant else num_reqs,
            self.head_size,
            self.span,
            self.key_bytes,
            self.value_bytes,
            self.capability,
            self.shared_memory,
        )

    def slots(self, num_reqs: int) -> int:
        """Items that run at the same time, each with a program a KV head."""
        tuning = self.tuning_of(num_reqs)
        programs = tuning.dense_programs_per_processor
        if self.prunes:
            programs = tuning.programs_per_processor
        return max(1, programs * self.num_processors // self.num_kv_heads)

    def num_items(self, num_reqs: int) -> int:
        """The most items of a batch of `num_reqs` requests."""
        if self.batch_invariant:
            return num_reqs * self.max_request_items
        return num_reqs + self.slots(num_reqs) * self.tuning_of(num_reqs).waves

    @property
    def max_items(self) -> int:
        """The most items of any batch."""
        return _max_items(self)

    @property
    def max_sums(self) -> int:
        """The most programs, of a KV head, that weigh the blocks of a batch."""
        return _max_sums(self)

    @property
    def max_request_items(self) -> int:
        """The most items of one request."""
        if self.batch_invariant:
            blocks = -(-self.seq_len // self.span)
            return max(1, min(-(-blocks // INVARIANT_BLOCKS), INVARIANT_ITEMS))
        return self.max_items

    def tile_blocks(self, num_reqs: int) -> int:
        """Spans of one step of the scan."""
        rows = triton.next_power_of_2(self.query_len * self.num_heads // self.num_kv_heads)
        tokens = self.tuning_of(num_reqs).scan_tokens * 8 // max(8, rows)
        return max(1, tokens // self.span)

    def chunk_blocks(self, num_reqs: int) -> int:
        """Spans that a program scans before it attends to those it keeps, a power of two."""
        tuning, tile_blocks = self.tuning_of(num_reqs), self.tile_blocks(num_reqs)
        num_reqs = self.num_reqs if self.batch_invariant else num_reqs
        block_bytes = self.span_numbers * self.num_kv_heads * torch.float32.itemsize
        fit = tuning.score_bytes // (block_bytes * self.num_items(num_reqs))
        return max(tile_blocks, min(tuning.chunk_blocks, 1 << fit.bit_length() >> 1))

    @property
    def span_numbers(self) -> int:
        """Numbers that a program keeps of a span that it goes through: the scores of its tokens, or
        a list of what is read."""
        if self.rule == "share":
            return list_numbers(self.span, self.block_size, self.query_len)
        return self.span * self.query_len * self.num_heads // self.num_kv_heads

    @property
    def span_masses(self) -> int:
        """Masses of a span, of all KV heads."""
        if self.rule != "share":
            return 0
        return self.span // self.block_size * self.query_len * self.num_heads

    @property
    def mass_spans(self) -> int:
        """Spans of a batch, at most, whose blocks are weighed."""
        if self.rule != "share":
            return 0
        most = self.num_reqs * -(-self.seq_len // self.span) + self.max_items
        if self.batch_invariant:
            return most  # whatever else is in the batch
        return min(most, MASS_BYTES // (self.span_masses * torch.float32.itemsize))

    def batch_classes(self) -> list[int]:
        """One number of requests of each kind for which other code is compiled, ascending."""
        classes: dict[tuple, int] = {}
        for n in range(1, self.num_reqs + 1):
            scan = (self.tile_blocks(n), self.chunk_blocks(n))
            classes.setdefault((self.tuning_of(n), *scan, padded_reqs(n)), n)
        return list(classes.values())

    @property
    def num_scores(self) -> int:
        """The most numbers that the programs of a batch keep of spans."""
        return _max_chunk_blocks(self) * self.span_numbers * self.num_kv_heads

    @property
    def scratch_shapes(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shapes and dtypes of the scratch tensors, in the order of `DecodeScratch`."""
        rows = (self.max_items, self.query_len * self.num_heads)
        sums = (self.max_sums, 2 if self.rule == "share" else 0, self.query_len * self.num_heads)
        return (
            ((*rows, self.head_size), torch.float32),
            (rows, torch.float32),
            ((self.num_scores,), torch.float32),
            ((self.num_reqs * self.query_len, self.num_heads), torch.float32),
            ((self.mass_spans * self.span_masses,), torch.float32),
            (sums, torch.float32),
        )


def padded_reqs(num_reqs: int) -> int:
    """Rows of the plan kernel: few numbers, so that few kernels are compiled."""
    return max(16, triton.next_power_of_2(num_reqs))


@lru_cache  # layers have equal limits
def _max_items(limits: DecodeLimits) -> int:
    return max(map(limits.num_items, range(1, limits.num_reqs + 1)))


@lru_cache
def _max_sums(limits: DecodeLimits) -> int:
    batches = range(1, limits.num_reqs + 1)
    return max(limits.num_items(n) * limits.tuning_of(n).code_parts for n in batches)


@lru_cache
def _max_chunk_blocks(limits: DecodeLimits) -> int:
    """The most blocks that all programs of a KV head scan before they attend to some."""
    batches = range(1, limits.num_reqs + 1)
    return max(limits.num_items(n) * limits.chunk_blocks(n) for n in batches)
