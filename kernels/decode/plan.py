"""Cuts a decode batch into work items of equal size, on the device, once a step for all layers."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import HOPPER_SHARED_MEMORY, launch
from .tuning import DecodeTuning, decode_tuning

INVARIANT_BLOCKS = 64
"""Blocks of a work item where a request is cut alike in every batch."""
INVARIANT_ITEMS = 32
"""The most items of a request there; longer requests have larger items."""


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
        prunes: whether blocks are skipped.
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
    prunes: bool = True
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

    def tuning_of(self, num_reqs: int) -> DecodeTuning:
        """Launch parameters of a batch of `num_reqs` requests."""
        return self.tuning or decode_tuning(
            self.num_reqs if self.batch_invariant else num_reqs,
            self.head_size,
            self.block_size,
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
    def max_request_items(self) -> int:
        """The most items of one request."""
        if self.batch_invariant:
            blocks = -(-self.seq_len // self.block_size)
            return max(1, min(-(-blocks // INVARIANT_BLOCKS), INVARIANT_ITEMS))
        return self.max_items

    def tile_blocks(self, num_reqs: int) -> int:
        """Blocks of one step of the scan."""
        rows = triton.next_power_of_2(self.query_len * self.num_heads // self.num_kv_heads)
        tokens = self.tuning_of(num_reqs).scan_tokens * 8 // max(8, rows)
        return max(1, tokens // self.block_size)

    def chunk_blocks(self, num_reqs: int) -> int:
        """Blocks that a program scans before it attends to those it keeps, a power of two."""
        tuning, tile_blocks = self.tuning_of(num_reqs), self.tile_blocks(num_reqs)
        num_reqs = self.num_reqs if self.batch_invariant else num_reqs
        block_bytes = self.query_len * self.num_heads * self.block_size * torch.float32.itemsize
        fit = tuning.score_bytes // (block_bytes * self.num_items(num_reqs))
        return max(tile_blocks, min(tuning.chunk_blocks, 1 << fit.bit_length() >> 1))

    def batch_classes(self) -> list[int]:
        """One number of requests of each kind for which other code is compiled, ascending."""
        classes: dict[tuple, int] = {}
        for n in range(1, self.num_reqs + 1):
            scan = (self.tile_blocks(n), self.chunk_blocks(n))
            classes.setdefault((self.tuning_of(n), *scan, _padded_reqs(n)), n)
        return list(classes.values())

    @property
    def num_scores(self) -> int:
        """The most scores that the programs of a batch hand on."""
        return _max_chunk_blocks(self) * self.block_size * self.query_len * self.num_heads

    @property
    def scratch_shapes(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shapes and dtypes of the scratch tensors, in the order of `DecodeScratch`."""
        rows = (self.max_items, self.query_len * self.num_heads)
        return (
            ((*rows, self.head_size), torch.float32),
            (rows, torch.float32),
            ((self.num_scores,), torch.float32),
            ((self.num_reqs * self.query_len, self.num_heads), torch.float32),
        )


def _padded_reqs(num_reqs: int) -> int:
    """Rows of the plan kernel: few numbers, so that few kernels are compiled."""
    return max(16, triton.next_power_of_2(num_reqs))


@lru_cache  # layers have equal limits
def _max_items(limits: DecodeLimits) -> int:
    return max(map(limits.num_items, range(1, limits.num_reqs + 1)))


@lru_cache
def _max_chunk_blocks(limits: DecodeLimits) -> int:
    """The most blocks that all programs of a KV head scan before they attend to some."""
    batches = range(1, limits.num_reqs + 1)
    return max(limits.num_items(n) * limits.chunk_blocks(n) for n in batches)


class DecodeScratch(NamedTuple):
    """What the decode programs hand to one another; uninitialised memory will do.

    A program is one of a work item and KV head; its rows are the group's heads, query token after
    query token. All float32: `partial_output` `[max_items, num_kv_heads * rows, head_size]`,
    `partial_lse` `[max_items, num_kv_heads * rows]` and `scores` (flat: program, token of the
    chunk, row) in log2 units, `threshold` `[num_reqs * query_len, num_heads]`, log2 units.
    """

    partial_output: torch.Tensor
    partial_lse: torch.Tensor
    scores: torch.Tensor
    threshold: torch.Tensor

    @classmethod
    def allocate(cls, limits: DecodeLimits, device: torch.device) -> "DecodeScratch":
        return cls(*(torch.empty(s, dtype=d, device=device) for s, d in limits.scratch_shapes))


@triton.jit(do_not_specialize=["num_reqs", "num_items"])  # batches share compilations
def _decode_plan_kernel(
    work_ptr,
    seq_lens_ptr,
    num_reqs,
    num_items,
    BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    WAVES: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    ITEM_BLOCKS: tl.constexpr,
    ITEM_OVERHEAD: tl.constexpr,
    REQS_PADDED: tl.constexpr,
    ITEMS: tl.constexpr,
    INVARIANT_BLOCKS: tl.constexpr,
    INVARIANT_ITEMS: tl.constexpr,
):
    requests = tl.arange(0, REQS_PADDED)
    seq_lens = tl.load(seq_lens_ptr + requests, mask=requests < num_reqs, other=0)
    blocks = (seq_lens + BLOCK_SIZE - 1) // BLOCK_SIZE
    total = tl.sum(blocks, axis=0)
    longest = tl.max(blocks, axis=0)
    size = longest
    least = tl.full([], 1 << 30, tl.int32)
    waves = tl.minimum(tl.maximum(tl.cdiv(total, SLOTS * ITEM_BLOCKS), 1), WAVES)
    for candidate in tl.static_range(2):
        places = SLOTS * waves
        if candidate == 1:  # rounding up adds about an item to every request that is cut
            cut = tl.sum((blocks * places > total).to(tl.int32), axis=0)
            places = tl.maximum(places - cut, (places + 1) // 2)
        wanted = tl.maximum((total + places - 1) // places, MIN_BLOCKS)
        items = tl.sum((blocks + wanted - 1) // wanted, axis=0)
        pieces = tl.maximum((longest + wanted - 1) // wanted, 1)
        cost = (longest + pieces - 1) // pieces + ITEM_OVERHEAD
        cost *= (items + SLOTS - 1) // SLOTS
        size = tl.where(cost < least, wanted, size)
        least = tl.minimum(cost, least)
    if INVARIANT_ITEMS > 0:
        size = tl.maximum((blocks + INVARIANT_ITEMS - 1) // INVARIANT_ITEMS, INVARIANT_BLOCKS)
    # padding rows have an item, too, so that somebody clears their output
    size = tl.maximum(size, 1)
    counts = tl.where(requests < num_reqs, tl.maximum((blocks + size - 1) // size, 1), 0)
    ends = tl.cumsum(counts, axis=0)

    items = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    owner = tl.sum((ends[None, :] <= items[:, None]).to(tl.int32), axis=1)  # [ITEMS]
    mine = requests[None, :] == owner[:, None]  # [ITEMS, REQS_PADDED]
    first_item = tl.sum(tl.where(mine, (ends - counts)[None, :], 0), axis=1)
    row_ptr = work_ptr + items * 4
    stored = items < num_items
    tl.store(row_ptr, tl.where(owner < num_reqs, owner, -1), mask=stored)
    tl.store(row_ptr + 1, items - first_item, mask=stored)
    tl.store(row_ptr + 2, tl.sum(tl.where(mine, counts[None, :], 0), axis=1), mask=stored)
    tl.store(row_ptr + 3, tl.sum(tl.where(mine, seq_lens[None, :], 0), axis=1), mask=stored)


@triton.jit
def load_item(work_ptr, item):
    """Request, index in it, number of its items and its length, of a row of `DecodePlan.work`."""
    row_ptr = work_ptr + item * 4
    return tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3)


@dataclass
class DecodePlan:
    """Which program of the decode kernel works on what.

    `work` is int32 `[num_items, 4]`: request (-1: no work), index of the item in the request,
    number of the request's items, its length. Item `i` of `n` covers blocks `i`, `i + n`,
    `i + 2n`, ..., so that kept blocks that lie together are shared; a request's items follow one
    another. `arrivals` is int32 `[num_reqs, num_kv_heads]`, zeros between launches: how many
    programs are done. The buffers keep their addresses when the plan is updated, so that a CUDA
    graph may hold them.
    """

    limits: DecodeLimits
    work: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(cls, limits: DecodeLimits, device: torch.device) -> "DecodePlan":
        shape = (limits.max_items, 4)
        return cls(
            limits,
            torch.full(shape, -1, dtype=torch.int32, device=device),
            torch.zeros(limits.num_reqs, limits.num_kv_heads, dtype=torch.int32, device=device),
        )

    @property
    def num_items(self) -> int:
        return self.work.shape[0]

    def update(self, seq_lens: torch.Tensor) -> "DecodePlan":
        """Plans a batch on the device and returns the plan cut to its size.

        The blocks of every request are dealt out to so many items that all items of the batch are
        of about one size, unless the limits are batch invariant. Rows of length 0 are padding and
        get one item without blocks.

        Args:
            seq_lens: int32 `[num_reqs]`, contiguous, within the limits.
        """
        limits, num_reqs = self.limits, seq_lens.shape[0]
        assert num_reqs <= limits.num_reqs
        assert self.num_items == limits.max_items, "this is a plan that was cut to a batch"
        tuning = limits.tuning_of(num_reqs)
        num_items = limits.num_items(num_reqs)
        item_tokens = tuning.item_tokens if limits.prunes else tuning.dense_item_tokens
        items = 32
        launch(
            _decode_plan_kernel, (triton.cdiv(num_items, items),),
            self.work,
            seq_lens,
            num_reqs,
            num_items,
            BLOCK_SIZE=limits.block_size,
            SLOTS=limits.slots(num_reqs),
            WAVES=tuning.waves,
            MIN_BLOCKS=tuning.min_blocks,
            ITEM_BLOCKS=max(1, item_tokens // limits.block_size),
            ITEM_OVERHEAD=tuning.item_overhead,
            REQS_PADDED=_padded_reqs(num_reqs),
            ITEMS=items,
            INVARIANT_BLOCKS=INVARIANT_BLOCKS,
            INVARIANT_ITEMS=limits.max_request_items if limits.batch_invariant else 0,
            num_warps=4,
        )
        return replace(self, work=self.work[:num_items])
