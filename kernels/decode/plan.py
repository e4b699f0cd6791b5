"""Cuts a decode batch into work items of equal size, on the device, once a step for all layers."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import launch
from .limits import INVARIANT_BLOCKS, DecodeLimits, padded_reqs


class DecodeScratch(NamedTuple):
    """What the decode programs hand to one another; uninitialised memory will do.

    A program is one of a work item and KV head; its rows are the group's heads, query token after
    query token. All float32: `partial_output` `[max_items, num_kv_heads * rows, head_size]`,
    `partial_lse` `[max_items, num_kv_heads * rows]`, log2 units; `scores`, flat: program, token of
    the chunk, row, log2 units, or by share program, what it reads of the chunk (`choose_blocks`);
    `threshold` `[num_reqs * query_len, num_heads]`, log2 units. By share only: `masses`, flat:
    item, as `DecodePlan.mass_places` has it, KV head, row, block; `sums` `[max_sums, 2,
    num_kv_heads * rows]`: of the masses of an item, or of each part of it, and the score that they
    are relative to, log2 units.
    """

    partial_output: torch.Tensor
    partial_lse: torch.Tensor
    scores: torch.Tensor
    threshold: torch.Tensor
    masses: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def allocate(cls, limits: DecodeLimits, device: torch.device) -> "DecodeScratch":
        return cls(*(torch.empty(s, dtype=d, device=device) for s, d in limits.scratch_shapes))


@triton.jit(do_not_specialize=["num_reqs", "num_items"])  # batches share compilations
def _decode_plan_kernel(
    work_ptr,
    mass_places_ptr,
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
    MASS_SPANS: tl.constexpr,
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
    if MASS_SPANS > 0:
        item_blocks = (blocks + counts - 1) // tl.maximum(counts, 1)
        mass_ends = tl.cumsum(counts * item_blocks, axis=0)
        places = mass_ends - counts * item_blocks
        first_place = tl.sum(tl.where(mine, places[None, :], 0), axis=1)
        item_blocks = tl.sum(tl.where(mine, item_blocks[None, :], 0), axis=1)
        place = first_place + (items - first_item) * item_blocks
        fits = tl.max(tl.where(mine, mass_ends[None, :], 0), axis=1) <= MASS_SPANS
        tl.store(mass_places_ptr + items, tl.where(fits, place, -1), mask=stored)


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
    another. `mass_places`, int32 `[num_items]`: how many spans of `DecodeScratch.masses` lie before
    the item's; -1: its blocks are not weighed, but all read. `arrivals` is int32
    `[num_reqs, num_kv_heads]`, zeros between launches: how many programs are done. The buffers keep
    their addresses when the plan is updated, so that a CUDA graph may hold them.
    """

    limits: DecodeLimits
    work: torch.Tensor
    mass_places: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(cls, limits: DecodeLimits, device: torch.device) -> "DecodePlan":
        shape = (limits.max_items, 4)
        return cls(
            limits,
            torch.full(shape, -1, dtype=torch.int32, device=device),
            torch.full(shape[:1], -1, dtype=torch.int32, device=device),
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
        item_tokens = {
            "none": tuning.dense_item_tokens,
            "threshold": tuning.item_tokens,
            "share": tuning.share_item_tokens,
        }[limits.rule]
        items = 32
        launch(
            _decode_plan_kernel, (triton.cdiv(num_items, items),),
            self.work,
            self.mass_places,
            seq_lens,
            num_reqs,
            num_items,
            BLOCK_SIZE=limits.span,
            SLOTS=limits.slots(num_reqs),
            WAVES=tuning.waves,
            MIN_BLOCKS=tuning.min_blocks,
            ITEM_BLOCKS=max(1, item_tokens // limits.span),
            ITEM_OVERHEAD=tuning.item_overhead,
            REQS_PADDED=padded_reqs(num_reqs),
            ITEMS=items,
            INVARIANT_BLOCKS=INVARIANT_BLOCKS,
            INVARIANT_ITEMS=limits.max_request_items if limits.batch_invariant else 0,
            MASS_SPANS=limits.mass_spans,
            num_warps=4,
        )
        return replace(
            self, work=self.work[:num_items], mass_places=self.mass_places[:num_items]
        )
