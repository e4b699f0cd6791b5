"""Steps of an engine without a model: requests come, grow, are verified, end, and leave their pages
to others; every request of every step is checked on its own."""

import math
from dataclasses import dataclass, field

import torch
from layer import CPU, HEAD_SIZE, MAX_LEN, MAX_REQS, NUM_PAGES, Shape, make_layer
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ffa_fp8fp8.kernels.cache_reference import gather_kv_reference
from vllm_ffa_fp8fp8.kernels.code_reference import encode_keys_reference, num_coded_tokens
from vllm_ffa_fp8fp8.kernels.counters import new_counters
from vllm_ffa_fp8fp8.kernels.decode.attention import dealt
from vllm_ffa_fp8fp8.kernels.reference import (
    decode_attention_reference,
    prefill_attention_reference,
)

ROUNDING = 1e-3
"""Log2 units: a request of which a block lies as near to its threshold may keep it or not."""
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9}
"""Of an output, in typical lengths of a value; interpreted casts truncate."""


@dataclass(frozen=True)
class Arrival:
    """A new request: its first tokens, and how many pages it shares with another's start."""

    num_tokens: int
    shared_pages: int


@dataclass(frozen=True)
class Step:
    """`ends`: live requests that leave before it. `growth`: new tokens of each that stays (0: it
    is not scheduled). `refused`: drafts of each that are refused after it. `padding`: rows that a
    graph has beyond the batch."""

    ends: frozenset[int]
    arrivals: tuple[Arrival, ...]
    growth: tuple[int, ...]
    refused: tuple[int, ...]
    padding: int


@dataclass(eq=False)
class Request:
    """Its pages, and all keys and values that it should find in them."""

    direction: torch.Tensor  # [num_kv_heads, head_size], in which its queries look
    pages: list[int] = field(default_factory=list)
    key: torch.Tensor | None = None  # [length, num_kv_heads, head_size]
    value: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return len(self.key)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = torch.cat([self.key, key]), torch.cat([self.value, value])

    def cut(self, length: int) -> None:
        self.key, self.value = self.key[:length], self.value[:length]


class Engine:
    """`cases`: requests that were checked in a step; `unsure`: those among them of which rounding
    decides what is kept; `coded`: tokens that were scanned by their codes."""

    def __init__(self, shape: Shape, seed: int):
        self.shape = shape
        self.generator = torch.Generator().manual_seed(seed)
        self.impl, self.builder = make_layer(shape)
        layout = self.impl.layout
        size = (NUM_PAGES, shape.num_kv_heads, shape.page_size, layout.bytes_per_token)
        self.cache = torch.full(size, 0xFF, dtype=torch.uint8)
        self.planes = self.impl.planes(self.cache)
        self.users = [0] * NUM_PAGES
        self.live: list[Request] = []
        self.cases = self.unsure = self.coded = 0

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def run(self, step: Step) -> None:
        for request in [r for place, r in enumerate(self.live) if place in step.ends]:
            self.end(request)
        batch = [(r, n) for r, n in zip(self.live, step.growth, strict=False) if n]
        for arrival in step.arrivals:
            batch += self.admit(arrival)
        batch = [(r, min(n, MAX_LEN - r.length)) for r, n in batch]
        batch = [(r, n) for r, n in batch if n and self.find_pages(r, r.length + n)]
        if batch:
            self.forward(sorted(batch, key=self.place_in_step), step.padding)
        for (request, n), refused in zip(batch, step.refused, strict=False):
            if 1 < n <= 1 + self.shape.drafts:
                request.cut(request.length - min(refused, n - 1))

    def place_in_step(self, scheduled: tuple[Request, int]) -> int:
        """vLLM puts decodes first, then those that go on, then those that begin."""
        request, n = scheduled
        if request.length == 0:
            return 2
        return int(n > self.builder.reorder_batch_threshold)

    def admit(self, arrival: Arrival) -> list[tuple[Request, int]]:
        if len(self.live) == MAX_REQS - 1:
            return []
        shape = (0, self.shape.num_kv_heads, HEAD_SIZE)
        new = Request(self.normal(*shape[1:]))
        new.key = new.value = torch.zeros(shape, dtype=self.shape.dtype)
        size = self.shape.page_size
        shared = 0
        if self.live:
            other = self.live[-1]
            shared = min(arrival.shared_pages, other.length // size)
            new.pages = other.pages[:shared]
            new.key, new.value = other.key[: shared * size], other.value[: shared * size]
        for page in new.pages:
            self.users[page] += 1
        self.live.append(new)
        return [(new, arrival.num_tokens)]

    def end(self, request: Request) -> None:
        for page in request.pages:
            self.users[page] -= 1
        self.live.remove(request)

    def find_pages(self, request: Request, length: int) -> bool:
        """Gives it pages at random places, whatever others left in them."""
        missing = -(-length // self.shape.page_size) - len(request.pages)
        free = [page for page, users in enumerate(self.users) if not users]
        if missing > len(free):
            return False
        for place in torch.randperm(len(free), generator=self.generator)[: max(0, missing)]:
            request.pages.append(free[place])
            self.users[free[place]] += 1
        return True

    def new_rows(self, request: Request, n: int) -> tuple[torch.Tensor, ...]:
        """Query, key and value of its newest tokens; some keys lie where its queries look."""
        shape, heads = self.shape, self.shape.num_kv_heads
        hot = (self.normal(n, heads, 1) > 1.3).float()
        key = self.normal(n, heads, HEAD_SIZE) + 0.5 * hot * request.direction
        query = 0.5 * self.normal(n, shape.num_heads, HEAD_SIZE)
        query = query + request.direction.repeat_interleave(shape.group, 0)
        rows = (query, key, self.normal(n, heads, HEAD_SIZE))
        return tuple(part.to(shape.dtype) for part in rows)

    def forward(self, batch: list[tuple[Request, int]], padding: int) -> None:
        """One layer's step: writes the cache, attends, and checks all that it did."""
        rows = [self.new_rows(request, n) for request, n in batch]
        query, key, value = map(torch.cat, zip(*rows, strict=True))
        slots = []
        for (request, n), (_, new_key, new_value) in zip(batch, rows, strict=True):
            request.append(new_key, new_value)
            slots += self.slots(request)[-n:]
        is_graph = all(self.place_in_step(scheduled) == 0 for scheduled in batch)
        padding = min(padding, MAX_REQS - len(batch)) if is_graph else 0
        common = self.common_metadata(batch, slots, padding)
        metadata = self.builder.build(0, common)
        padded = query.new_zeros(max(0, metadata.num_decode_tokens - len(query)), *query.shape[1:])
        query = torch.cat([query, padded])
        slots = torch.tensor(slots + [-1] * padding)
        self.impl.do_kv_cache_update(None, key, value, self.cache, slots)
        self.check_cache()
        output = torch.full(query.shape, math.nan)
        self.impl.counters.zero_()
        self.impl.forward(None, query, key, value, self.cache, metadata, output)
        if metadata.plan is not None:
            assert not metadata.plan.arrivals.any()
        self.check_decodes(metadata, query, output)
        self.check_prefills(batch, metadata, rows, output)
        assert (output[len(key) :] == 0).all()
        self.cases += len(batch)

    def slots(self, request: Request) -> list[int]:
        size = self.shape.page_size
        return [request.pages[t // size] * size + t % size for t in range(request.length)]

    def common_metadata(self, batch, slots, padding: int) -> CommonAttentionMetadata:
        """What a model runner tells the builder; rows of the block table end in stale pages."""
        counts = [n for _, n in batch] + [0] * padding
        lengths = [request.length for request, _ in batch] + [0] * padding
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        width = -(-MAX_LEN // self.shape.page_size)
        table = torch.randint(NUM_PAGES, (len(counts), width), generator=self.generator)
        for row, (request, _) in zip(table, batch, strict=False):
            row[: len(request.pages)] = torch.tensor(request.pages)
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(counts),
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            max_seq_len=max(lengths),
            block_table_tensor=table.to(torch.int32),
            slot_mapping=torch.tensor(slots),
        )

    def check_cache(self) -> None:
        """Every live request finds what it wrote, up to the rounding of its planes."""
        for place, request in enumerate(self.live):
            pages = torch.tensor(request.pages)
            key, value = gather_kv_reference(self.planes, pages, request.length, torch.float32)
            for name, found, given, is_split in (
                ("key", key, request.key, self.planes.key_residual is not None),
                ("value", value, request.value, self.planes.value_exponent is None),
            ):
                bound = (2**-8 if is_split else 2**-4) * given.float().abs() + 1e-3
                wrong = ((found - given.float()).abs() > bound).any(-1).any(-1)
                assert not wrong.any(), f"{name} of request {place}: tokens {wrong.nonzero()}"

    def check_decodes(self, metadata, query: torch.Tensor, output: torch.Tensor) -> None:
        """Each decode beside the oracle, and the counters of all whose decisions are sure."""
        if not metadata.num_decodes:
            return
        self.check_codes(metadata)
        oracles = [self.oracle(metadata, query, shift) for shift in (-ROUNDING, ROUNDING)]
        (fewer, kept, counters), (more, kept_more, counted_more) = oracles
        starts = metadata.query_start_loc
        starts = range(len(kept) + 1) if starts is None else starts.tolist()
        sure = [torch.equal(*both) for both in zip(kept, kept_more, strict=True)]
        for request, rows in enumerate(zip(starts, starts[1:], strict=False)):
            rows = slice(*rows)
            self.unsure += not sure[request]
            errors = [self.error(output[rows], truth[rows]) for truth in (fewer, more)]
            assert min(errors) <= TOLERANCE[self.shape.dtype], f"decode {request}: {errors}"
        # a block at the edge is read either way, and drawn or not
        if all(sure) and counters[:, :4].equal(counted_more[:, :4]):
            assert self.impl.counters[:, :4].equal(counters[:, :4])

    def check_codes(self, metadata) -> None:
        """What each decode scanned are the codes of the keys that it has."""
        if self.planes.key_code is None:
            return
        starts = metadata.query_start_loc
        counts = [1] * metadata.num_decodes if starts is None else starts.diff().tolist()
        for request, seq_len in enumerate(metadata.seq_lens.tolist()):
            coded = num_coded_tokens(seq_len, counts[request], metadata.code_lag)
            row = metadata.block_table[request, : -(-coded // self.planes.page_size)].long()
            planes = self.planes.key_code, self.planes.code_range.view(torch.int16)
            found = [plane[row].clone() for plane in planes]
            encode_keys_reference(self.planes, row, 0, coded)
            for before, plane in zip(found, planes, strict=True):
                assert before.equal(plane[row]), f"codes of request {request}"
            self.coded += coded

    def oracle(self, metadata, query: torch.Tensor, shift: float):
        """Output in float64, blocks kept, and counters, with limits that are so much larger: in
        log2 units, or, by share, as a fraction."""
        config, limit = self.impl.config, {"delta": None}
        if metadata.limit is not None and config.rule == "share":
            shared = dealt(metadata.plan, self.planes, self.shape.dtype)
            limit = {"tau": metadata.limit * (1 + shift), "dealt": shared}
        elif metadata.limit is not None:
            limit = {"delta": metadata.limit + shift}
        counters = new_counters(self.shape.num_kv_heads, CPU)
        output, kept = decode_attention_reference(
            query[: metadata.num_decode_tokens], self.planes, metadata.block_table,
            metadata.seq_lens, block_size=metadata.block_size, scale=self.impl.scale,
            query_start_loc=metadata.query_start_loc, min_context=config.min_context,
            counters=counters, code_lag=metadata.code_lag, dtype=torch.float64, **limit,
        )  # fmt: skip
        return output, kept, counters

    def error(self, output: torch.Tensor, truth: torch.Tensor) -> float:
        """The largest of a head's output, in typical lengths of a value."""
        lengths = (output.double() - truth).norm(dim=-1)
        return float(lengths.max()) / HEAD_SIZE**0.5 if len(lengths) else 0.0

    def check_prefills(self, batch, metadata, rows, output: torch.Tensor) -> None:
        """Attention to all keys: those of the cache where any prefill has some there."""
        prefills = batch[metadata.num_decodes :]
        start = metadata.num_decode_tokens
        for (request, n), (query, key, value) in zip(
            prefills, rows[metadata.num_decodes :], strict=True
        ):
            if metadata.prefill.has_context:
                pages = torch.tensor(request.pages)
                key, value = gather_kv_reference(self.planes, pages, request.length, torch.float64)
            truth = prefill_attention_reference(
                query.double(), key.double(), value.double(), self.impl.scale
            )
            assert self.error(output[start : start + n], truth) < 1e-5, f"prefill of {n}"
            start += n
