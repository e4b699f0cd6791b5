"""Decode by share, step 1: weighs every block by the FP8 base alone, and draws those to read."""

import triton
import triton.language as tl

from .scan import score_tile, tile_tokens_of
from .soft_cap import cap_scores

LOG2_CHANCES: tl.constexpr = tl.constexpr(20)
CHANCES: tl.constexpr = tl.constexpr(1 << 20)
"""Probabilities are multiples of 1 / CHANCES, and at least that: a weight is at most CHANCES."""

MOST_MASS: tl.constexpr = tl.constexpr(2.0**100)
"""Blocks of this mass or more are read for sure, as are those whose mass is no number; it leaves
room for the sum of all blocks."""


@triton.jit
def weigh_blocks(
    query, factor, soft_cap, limits, reference,
    first_span, step, num_spans, seq_len, seen_by_all, places, masses_ptr, masses_stride, cache,
    PAGE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, QUERY: tl.constexpr,
    TUNING: tl.constexpr, DTYPE: tl.constexpr,
):
    """Adds up `exp2(score - reference)` over the tokens of every block of a chunk, into
    `masses[row, block]`, those of every WEIGH_PARTS-th span, and returns the sums over its blocks,
    float32 `[ROWS_PADDED]`, to which none adds more than MOST_MASS.

    The chunk is `num_spans` spans of blocks, `first_span` and every `step`-th of the request after
    it, read in tiles of TILE_BLOCKS spans.

    `query, factor`: of `split_query`, `soft_cap`: of `cap_scores`. `limits`, int32
    `[ROWS_PADDED]`: how many tokens of the request a query row sees, `seen_by_all` the least of
    them. `reference`, float32 `[ROWS_PADDED]`, log2 units. `cache`: of `cache_of_head`.
    """
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    SPAN_SIZE: tl.constexpr = SPAN.BLOCK_SIZE
    TILE_SPANS: tl.constexpr = TUNING.TILE_BLOCKS
    RUNS: tl.constexpr = BLOCK.BLOCK_SIZE // 16
    BLOCKS: tl.constexpr = SPAN_SIZE // BLOCK.BLOCK_SIZE
    tile_tokens, tile_positions = tile_tokens_of(step, SPAN, TILE_SPANS)
    rows = tl.arange(0, ROWS_PADDED)[None, None, :]
    STRIDE: tl.constexpr = TUNING.WEIGH_PARTS * BLOCKS
    tile_spans = tl.arange(0, TILE_SPANS)[None, :]
    places_in_row = tile_spans * STRIDE + tl.arange(0, BLOCKS)[:, None]
    masses_ptr += places_in_row[:, :, None] + rows * masses_stride
    sums = tl.zeros([BLOCKS, TILE_SPANS, ROWS_PADDED], tl.float32)
    for index in tl.range(0, num_spans, TILE_SPANS, num_stages=TUNING.SCAN_STAGES):
        scores = score_tile(
            query, limits, first_span, step, index, seq_len, seen_by_all, places,
            tile_tokens, tile_positions, cache, PAGE, SPAN, QUERY, DTYPE, TILE_SPANS,
        )
        scores = cap_scores(scores * factor[None, :], soft_cap)
        masses = tl.exp2(scores - reference[None, :])
        masses = tl.reshape(masses, (BLOCKS, RUNS, TILE_SPANS, 16, ROWS_PADDED))
        masses = tl.sum(tl.sum(masses, axis=1), axis=2)
        exists = (index + tile_spans < num_spans)[:, :, None]
        tl.store(masses_ptr + index * STRIDE, masses, mask=exists & (rows < QUERY.ROWS))
        sums += tl.where(masses < MOST_MASS, masses, MOST_MASS)  # what is no number, too
    return tl.sum(tl.sum(sums, axis=0), axis=0)


@triton.jit
def _mixed(bits):
    """The finaliser of MurmurHash3 (Appleby, 2011), uint32."""
    bits ^= bits >> 16
    bits *= 0x85EBCA6B
    bits ^= bits >> 13
    bits *= 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def draw_offset(layer, kv_head, position, first_span):
    """A hash of what tells one draw from another, int32 in [0, CHANCES)."""
    bits = _mixed(layer.to(tl.uint32) + 0x9E3779B9)
    bits = _mixed(bits ^ kv_head.to(tl.uint32))
    bits = _mixed(bits ^ position.to(tl.uint32))
    bits = _mixed(bits ^ first_span.to(tl.uint32))
    return (bits % CHANCES).to(tl.int32)


@triton.jit
def _of_row(values, row):
    """Element `row` of float32 `[ROWS_PADDED]`."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == row, values, 0.0), axis=0)


@triton.jit
def load_chunk(
    first_span, step, num_spans, seq_len, block_table_row_ptr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, TUNING: tl.constexpr,
):
    """The blocks of a chunk of up to `num_spans` spans, for `choose_blocks`: their numbers in the
    request, int32 `[SLOTS]`, whether they exist, and a tuple of the places of their runs (see
    `load_places`)."""
    PER_SPAN: tl.constexpr = SPAN.BLOCK_SIZE // BLOCK.BLOCK_SIZE
    SLOTS: tl.constexpr = TUNING.CHUNK_BLOCKS * PER_SPAN
    PER_BLOCK: tl.constexpr = BLOCK.PER_BLOCK
    slots = tl.arange(0, SLOTS)  # up to 32, every warp has all, and no sum crosses warps
    spans = slots // PER_SPAN
    blocks = (first_span + spans * step) * PER_SPAN + slots % PER_SPAN
    exists = (spans < num_spans) & (blocks * BLOCK.BLOCK_SIZE < seq_len)
    places = ()
    for part in tl.static_range(PER_BLOCK):
        runs = blocks * PER_BLOCK + part
        page = tl.load(
            block_table_row_ptr + runs // BLOCK.PER_PAGE,
            mask=exists & (runs * BLOCK.UNIT < seq_len), other=0,
        )
        places += (page * BLOCK.PER_PAGE + runs % BLOCK.PER_PAGE,)
    return blocks, exists, places


@triton.jit
def choose_blocks(
    masses_ptr, masses_stride, weights_ptr, runs_ptr, denominators, query_len, tau,
    layer, kv_head, first_span, seq_len, blocks, exists, places,
    BLOCK: tl.constexpr, QUERY: tl.constexpr,
):
    """Which blocks of a chunk are read, and what each of them counts.

    A block's share is its part of `denominators`, float32 `[ROWS_PADDED]`, the largest over the
    rows of a query token. For each query token a block is read with probability
    `p = min(1, share / tau)`, and counts 1 / p times if it is; the request's first block, those of
    the token and newer, and those of MOST_MASS are read for sure, and with tau 0 all, whose masses
    are not asked for. Draws are systematic: with the running sum of `p` over the chunk, a block is
    read where the sum crosses a whole number, less an offset that `draw_offset` gives. A block is
    read if a token wants it. `blocks, exists, places`: of `load_chunk`; `first_span`: its first.

    Writes, in the order of blocks, the runs of UNIT tokens that are read to `runs[rank]`, int32:
    place (see `load_places`), position, slot of the block in the chunk; and `log2(1 / p)`, -inf
    for blocks that a token does not want, to `weights[slot, token]`.
    Returns the number of runs, whether blocks of MOST_MASS are among those that are read, and what
    became of the blocks: how many there are, how many are read, how many of these were drawn, and
    the share of the softmax that was left to the draw, the mean of the rows.
    """
    BLOCK_SIZE: tl.constexpr = BLOCK.BLOCK_SIZE
    SLOTS: tl.constexpr = blocks.shape[0]
    UNIT: tl.constexpr = BLOCK.UNIT
    PER_BLOCK: tl.constexpr = BLOCK.PER_BLOCK
    GROUP: tl.constexpr = QUERY.GROUP
    slots = tl.arange(0, SLOTS)
    is_weighed = exists & (slots < tl.where(tau > 0, SLOTS, 0))
    inverses = 1.0 / denominators
    chances_of_share = CHANCES / tau
    wanted = exists & (slots < 0)
    sure = wanted
    is_most = wanted
    left = 0.0
    for token in range(query_len):
        share = tl.zeros([SLOTS], tl.float32)
        shares = share
        is_least = exists
        for head in tl.static_range(GROUP):
            row = token * GROUP + head
            mass = tl.load(
                masses_ptr + row * masses_stride + slots,
                mask=is_weighed, other=float("inf"), cache_modifier=".cg",
            )
            is_least &= mass < MOST_MASS  # false where it is no number
            head_share = tl.where(mass < MOST_MASS, mass, 0.0) * _of_row(inverses, row)
            share = tl.maximum(share, head_share)
            shares += head_share
        position = seq_len - query_len + token
        is_small = is_least & (blocks > 0) & (blocks < position // BLOCK_SIZE) & (share < tau)
        is_most |= exists & (is_least == 0)
        chances = tl.maximum(tl.ceil(share * chances_of_share), 1.0)
        chances = tl.where(is_small, chances, 0.0).to(tl.int32)
        drawn = tl.cumsum(chances, axis=0) + draw_offset(layer, kv_head, position, first_span)
        is_hit = drawn // CHANCES != (drawn - chances) // CHANCES
        weights = LOG2_CHANCES - tl.log2(chances.to(tl.float32))
        weights = tl.where(is_small, tl.where(is_hit, weights, float("-inf")), 0.0)
        tl.store(weights_ptr + slots * QUERY.QUERY_LEN + token, weights, mask=exists)
        sure |= exists & (is_small == 0)
        wanted |= is_hit
        left += tl.sum(tl.where(is_small, shares, 0.0), axis=0) / GROUP
    wanted |= sure
    ranks = tl.cumsum(wanted.to(tl.int32), axis=0)
    for part in tl.static_range(PER_BLOCK):
        entry_ptr = runs_ptr + ((ranks - 1) * PER_BLOCK + part) * 3
        tl.store(entry_ptr, places[part], mask=wanted)
        tl.store(entry_ptr + 1, (blocks * PER_BLOCK + part) * UNIT, mask=wanted)
        tl.store(entry_ptr + 2, slots, mask=wanted)
    num_wanted = tl.sum(wanted.to(tl.int32), axis=0)
    num_drawn = tl.sum((wanted & (sure == 0)).to(tl.int32), axis=0)
    num_blocks = tl.sum(exists.to(tl.int32), axis=0)
    counts = (num_blocks, num_wanted, num_drawn, left)
    has_most = tl.max(is_most.to(tl.int32), axis=0) > 0
    return num_wanted * PER_BLOCK, has_most, counts
