"""Decode batches in a paged cache, built on the CPU, where the oracles run."""

import dataclasses
import math
from dataclasses import dataclass

import torch

from vllm_ffa_fp8fp8.kernels import (
    DecodeLimits,
    DecodePlan,
    DecodeScratch,
    KVPlanes,
    PageLayout,
    decode_attention,
)
from vllm_ffa_fp8fp8.kernels.cache_reference import write_kv_reference
from vllm_ffa_fp8fp8.kernels.code_reference import encode_keys_reference, num_coded_tokens
from vllm_ffa_fp8fp8.kernels.counters import new_counters

POISON = 0xFF  # NaN in E4M3, float16 and bfloat16, infinity as an exponent
ANCHOR_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """Shapes of a batch. `interleaved` puts the layers of the cache inside its pages. The last
    `query_len` tokens of every request are its query."""

    lengths: tuple[int, ...] = (130, 1, 300, 63)
    head_size: int = 64
    group: int = 4
    num_kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 64
    block_size: int = 64
    fp8_key: bool = True
    residual: bool = True
    fp8_value: bool = False
    interleaved: bool = False
    key_scale: float = 1.0
    query_len: int = 1
    seed: int = 0
    key_code: bool = False

    @property
    def layout(self) -> PageLayout:
        return PageLayout(
            self.head_size, self.dtype, self.fp8_key, self.residual, self.fp8_value, self.key_code
        )

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    def limits(self, num_processors: int = 2) -> DecodeLimits:
        return DecodeLimits(
            len(self.lengths),
            max(1, *self.lengths),
            self.num_kv_heads * self.group,
            self.num_kv_heads,
            self.head_size,
            self.block_size,
            num_processors,
            self.query_len,
        )


@dataclass
class Batch:
    """A batch whose tokens lie in shuffled pages of layer 1 of three; the rest is poison."""

    case: Case
    qkv: torch.Tensor  # [num_reqs * query_len, (num_heads + 2 * num_kv_heads) * head_size]
    key: torch.Tensor  # [num_tokens, num_kv_heads, head_size]
    value: torch.Tensor
    storage: torch.Tensor
    block_table: torch.Tensor  # entries beyond a request's pages name a page of poison
    seq_lens: torch.Tensor

    def query(self, device: str = "cpu") -> torch.Tensor:
        """`[num_reqs * query_len, num_heads, head_size]`, a slice of the packed projections."""
        case = self.case
        width = case.num_kv_heads * case.group * case.head_size
        return self.qkv.to(device)[:, :width].unflatten(1, (-1, case.head_size))

    def planes(self, device: str = "cpu") -> KVPlanes:
        return self.case.layout.split(own_layer(self.storage.to(device), self.case.interleaved))

    def write(self) -> None:
        """Puts `key` and `value` into the cache, with codes of the keys that the steps before would
        have written codes of."""
        planes, case = self.planes(), self.case
        write_kv_reference(self.key, self.value, planes, self.slots())
        for row, length in zip(self.block_table, case.lengths, strict=True):
            coded = num_coded_tokens(length, case.query_len, case.limits().code_lag)
            encode_keys_reference(planes, row, 0, coded)

    def slots(self) -> torch.Tensor:
        """Slots of all tokens, request after request."""
        size, slots = self.case.page_size, [torch.zeros(0, dtype=torch.int64)]
        for pages, length in zip(self.block_table.long(), self.case.lengths, strict=True):
            tokens = torch.arange(length)
            slots.append(pages[tokens // size] * size + tokens % size)
        return torch.cat(slots)


def own_layer(storage: torch.Tensor, interleaved: bool) -> torch.Tensor:
    return storage[:, 1] if interleaved else storage[1]


def shuffled_pages(lengths, page_size: int, generator) -> tuple[torch.Tensor, int]:
    """A block table of distinct pages in random order, and the number of pages."""
    counts = [-(-length // page_size) for length in lengths]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages, generator=generator).to(torch.int32)
    table = torch.full((len(lengths), max(counts) + 2), int(order[-1]), dtype=torch.int32)
    for row, pages in zip(table, order[: sum(counts)].split(counts), strict=True):
        row[: len(pages)] = pages
    return table, num_pages


def empty_cache(case: Case, num_pages: int) -> torch.Tensor:
    page = (case.num_kv_heads, case.page_size, case.layout.bytes_per_token)
    shape = (num_pages, 3, *page) if case.interleaved else (3, num_pages, *page)
    return torch.full(shape, POISON, dtype=torch.uint8)


def make_batch(case: Case) -> Batch:
    """Random keys; the heads of a group look in like directions, and first tokens score high."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    num_reqs, size = len(case.lengths), case.head_size
    num_queries = num_reqs * case.query_len
    shared = normal(num_reqs, case.num_kv_heads, 1, size)
    query = shared.repeat_interleave(case.query_len, dim=0)
    query = query + 0.5 * normal(num_queries, case.num_kv_heads, case.group, size)
    qkv = torch.cat([query.flatten(1), normal(num_queries, 2 * case.num_kv_heads * size)], dim=1)
    num_tokens = sum(case.lengths)
    key = case.key_scale * normal(num_tokens, case.num_kv_heads, size)
    first = 0
    for request, length in enumerate(case.lengths):
        if length:
            key[first] = shared[request, :, 0] * (case.key_scale * 3 * size**-0.5)
        first += length
    block_table, num_pages = shuffled_pages(case.lengths, case.page_size, generator)
    batch = Batch(
        case,
        qkv.to(case.dtype),
        key.to(case.dtype),
        normal(num_tokens, case.num_kv_heads, size).to(case.dtype),
        empty_cache(case, num_pages),
        block_table,
        torch.tensor(case.lengths, dtype=torch.int32),
    )
    batch.write()
    return batch


def poisoned_scratch(limits: DecodeLimits, device: str) -> DecodeScratch:
    scratch = DecodeScratch.allocate(limits, torch.device(device))
    for tensor in scratch:
        tensor.fill_(math.nan if tensor.is_floating_point() else -7)
    return scratch


def run_decode(
    batch: Batch,
    device: str,
    delta: torch.Tensor | None,
    limits=None,
    tau=None,
    counters=None,
    **options,
) -> tuple[torch.Tensor, list[list[int]]]:
    """Runs the kernels on the batch; what they may not rely on is poison.

    Returns the output and the first three counters of each KV head. The plan's arrivals must be
    zeros again.
    """
    case = batch.case
    limits = limits or case.limits(132 if device == "cuda" else 2)
    seq_lens = batch.seq_lens.to(device)
    query = batch.query(device)
    dtype = query.dtype if device == "cuda" else torch.float32  # interpreted casts truncate
    output = torch.full(query.shape, math.nan, dtype=dtype, device=device)
    plan = DecodePlan.allocate(limits, torch.device(device)).update(seq_lens)
    if counters is None:
        counters = new_counters(case.num_kv_heads, device)
    decode_attention(
        query,
        batch.planes(device),
        batch.block_table.to(device),
        seq_lens,
        plan,
        poisoned_scratch(limits, device),
        output,
        scale=case.scale,
        delta=None if delta is None else delta.to(device),
        tau=None if tau is None else tau.to(device),
        counters=counters,
        **options,
    )
    assert not plan.arrivals.any()
    return output.to("cpu", case.dtype), counters[:, :3].tolist()


def count_kept(batch: Batch, kept: list[torch.Tensor], min_context: int = 0) -> list[list[int]]:
    """The counters of a run that kept such blocks, by request bool `[num_kv_heads, num_blocks]`."""
    counts = torch.zeros(batch.case.num_kv_heads, 3, dtype=torch.int64)
    for flags, seq_len in zip(kept, batch.seq_lens.tolist(), strict=True):
        if seq_len < min_context:
            counts[:, 2] += flags.shape[1]
        else:
            counts[:, 0] += flags.sum(1)
            counts[:, 1] += flags.shape[1]
    return counts.tolist()


def probe_kept(batch: Batch, device: str, delta, **options) -> list[torch.Tensor]:
    """Which blocks decode attends to, by request bool `[num_kv_heads, num_blocks]`.

    Seen from outside: every value is an indicator of its token's block.
    """
    case = batch.case
    probe = dataclasses.replace(
        batch, value=torch.zeros_like(batch.value), storage=batch.storage.clone()
    )
    counts = [-(-length // case.block_size) for length in case.lengths]
    blocks = torch.cat([torch.arange(length) // case.block_size for length in case.lengths])
    seen = []
    for first in range(0, max(counts), case.head_size):
        columns = first + torch.arange(case.head_size)
        # 64 keeps small weights above the least number of float16
        probe.value[:] = 64.0 * (blocks[:, None] == columns)[:, None]
        probe.write()
        output, _ = run_decode(probe, device, delta, **options)
        rows = output.unflatten(1, (case.num_kv_heads, -1)).unflatten(0, (-1, case.query_len))
        seen.append((rows != 0).any(3).any(1))
    kept = torch.cat(seen, dim=-1)
    return [flags[:, :count] for flags, count in zip(kept, counts, strict=True)]
