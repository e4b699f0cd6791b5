"""Decode, step 2: attends to the kept blocks of a chunk."""

import triton
import triton.language as tl

from ..cache.paged_rows import (
    load_columns,
    load_rows,
    load_unit_exponents,
    pick_units,
    tile_scales,
    unit_pointers,
)
from .query import dot_query
from .soft_cap import cap_scores


@triton.jit
def first_kept(kept, kept_late):
    """The first block of the bits of `scan_blocks`, and the bits without it; 0 if there is none."""
    bits = tl.where(kept == 0, kept_late, kept)
    power = (bits & -bits).to(tl.float32)
    block = tl.maximum((power.to(tl.int32, bitcast=True) >> 23 & 255) - 127, 0)
    late = (kept == 0) & (kept_late != 0)
    kept_late = tl.where(kept == 0, kept_late & (kept_late - 1), kept_late)
    return tl.where(late, block + 64, block), kept & (kept - 1), kept_late


@triton.jit
def num_kept(kept, kept_late):
    """How many blocks the bits of `scan_blocks` keep."""
    places = tl.arange(0, 32)
    ones = (kept >> places & 1) + (kept >> places + 32 & 1)
    ones += (kept_late >> places & 1) + (kept_late >> places + 32 & 1)
    return tl.sum(ones.to(tl.int32), axis=0)


@triton.jit
def widen(values, FIRST: tl.constexpr, ROWS_PADDED: tl.constexpr):
    """`[FIRST, ROWS_PADDED]` with zeros up to 16 columns, the least of the matrix unit."""
    if ROWS_PADDED < 16:
        HALVES: tl.constexpr = 16 // ROWS_PADDED
        halves = tl.arange(0, HALVES)[None, :, None]
        values = tl.where(halves == 0, values[:, None, :], 0.0)
        values = tl.reshape(values, (FIRST, 16))
    return values


@triton.jit
def narrow(values, FIRST: tl.constexpr, ROWS_PADDED: tl.constexpr):
    """Takes `widen` back."""
    if ROWS_PADDED < 16:
        HALVES: tl.constexpr = 16 // ROWS_PADDED
        values = tl.sum(tl.reshape(values, (FIRST, HALVES, ROWS_PADDED)), axis=1)
    return values


@triton.jit
def begin_softmax(
    sinks, is_first, HAS_SINKS: tl.constexpr, TOKENS: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr
):
    """The state of `softmax_update` before any token: nothing, and in the first item of a request
    the `sinks`, log2 units, `[ROWS_PADDED]`, which are like a token whose value is 0."""
    ROWS_PADDED: tl.constexpr = sinks.shape[0]
    accumulator = tl.zeros([HEAD_SIZE_PADDED, max(16, ROWS_PADDED)], tl.float32)
    weight_sums = tl.zeros([TOKENS, ROWS_PADDED], tl.float32)
    reference = tl.full([ROWS_PADDED], float("-inf"), tl.float32)
    if HAS_SINKS:
        sinks = tl.where(is_first, sinks, float("-inf"))
        reference = tl.ceil(sinks)
        weights = tl.exp2(sinks - tl.where(reference == float("-inf"), 0.0, reference))
        is_first_token = (tl.arange(0, TOKENS) == 0)[:, None]
        weight_sums += tl.where(is_first_token, weights[None, :], 0.0)
    return accumulator, weight_sums, reference


@triton.jit
def raise_reference(accumulator, weight_sums, reference, largest):
    """Moves a running softmax to a reference of at least `largest`, `[ROWS_PADDED]`.

    Weights are `exp2(score - reference)`. The reference is whole, so that moving it rounds nothing.
    """
    raised = tl.maximum(reference, tl.ceil(largest))
    ROWS_PADDED: tl.constexpr = reference.shape[0]
    factor = tl.exp2(reference - tl.where(raised == float("-inf"), 0.0, raised))
    accumulator *= widen(factor[None, :], 1, ROWS_PADDED)
    return accumulator, weight_sums * factor[None, :], raised


@triton.jit
def softmax_update(accumulator, weight_sums, reference, scores, value, value_scales):
    """Adds a tile to a running softmax; scores are log2 units, -inf where masked.

    `accumulator` `[HEAD_SIZE_PADDED, ROWS_PADDED]` after `widen`, `reference` `[ROWS_PADDED]`,
    `weight_sums` and `scores` `[TOKENS, ROWS_PADDED]`, `value` `[HEAD_SIZE_PADDED, TOKENS]` to be
    multiplied by `value_scales` `[TOKENS]`. Sums of weights stay apart by token until the end,
    because a sum over tokens crosses warps; they are of the weights that V meets, rounded.
    """
    weights = tl.exp2(scores - tl.where(reference == float("-inf"), 0.0, reference)[None, :])
    weights = weights.to(value.dtype).to(tl.float32)
    weighted = widen(weights * value_scales[:, None], scores.shape[0], scores.shape[1])
    accumulator = tl.dot(value, weighted.to(value.dtype), accumulator)
    return accumulator, weight_sums + weights


@triton.jit
def attend_tile(
    accumulator, weight_sums, reference,
    query, factor, soft_cap, limits, units, positions, added, seq_len, cache,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, QUERY: tl.constexpr,
    HAS_SCORES: tl.constexpr, RAISE: tl.constexpr, MASKED: tl.constexpr,
    DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr,
):
    """Adds the tokens at `units` (see `pick_units`), which stand at `positions`, int32 `[TOKENS]`,
    to a running softmax. Those from `seq_len` on do not exist.

    `added`, float32 `[TOKENS, ROWS_PADDED]`, log2 units, is added to the scores, which are under
    the cap then; HAS_SCORES: it holds their dot with the base, which is not read, and they come
    under the cap together. See `attend_blocks` for the other arguments.
    """
    HAS_RESIDUAL: tl.constexpr = cache.key_residual.pointer is not None
    HAS_EXPONENT: tl.constexpr = cache.key_exponent.pointer is not None
    HAS_VALUE_EXPONENT: tl.constexpr = cache.value_exponent.pointer is not None
    tokens = tl.arange(0, positions.shape[0])
    columns = tl.arange(0, PAGE.HEAD_SIZE_PADDED)
    valid = positions < seq_len
    rows = unit_pointers(cache.value, units, tokens, PAGE.VALUE_STRIDE, BLOCK)
    value = load_columns(rows, columns, valid, PAGE.HEAD_SIZE).to(VALUE_DTYPE)
    value_exponents = load_unit_exponents(cache.value_exponent, units, tokens, valid, BLOCK)
    key_exponents = load_unit_exponents(cache.key_exponent, units, tokens, valid, BLOCK)
    scores = tl.zeros(added.shape, tl.float32)
    if not HAS_SCORES:
        rows = unit_pointers(cache.key, units, tokens, PAGE.KEY_STRIDE, BLOCK)
        key = load_rows(rows, columns, valid, MASKED, PAGE).to(DTYPE)
        scores += dot_query(key, query, QUERY)
    if HAS_RESIDUAL:
        rows = unit_pointers(cache.key_residual, units, tokens, PAGE.RESIDUAL_STRIDE, BLOCK)
        residual = load_rows(rows, columns, valid, MASKED, PAGE).to(DTYPE)
        scores += dot_query(residual, query, QUERY) * (1.0 / PAGE.RESIDUAL_SCALE)
    if (not HAS_SCORES) or HAS_RESIDUAL:
        scores *= factor[None, :] * tile_scales(key_exponents, tokens, HAS_EXPONENT)[:, None]
    seen = positions[:, None] < limits[None, :]
    if HAS_SCORES:
        scores = cap_scores(scores + added, soft_cap)
    else:
        scores = cap_scores(scores, soft_cap) + added
    scores = tl.where(seen, scores, float("-inf"))
    if RAISE:
        accumulator, weight_sums, reference = raise_reference(
            accumulator, weight_sums, reference, tl.max(scores, axis=0)
        )
    accumulator, weight_sums = softmax_update(
        accumulator, weight_sums, reference, scores, value,
        tile_scales(value_exponents, tokens, HAS_VALUE_EXPONENT),
    )
    return accumulator, weight_sums, reference


@triton.jit
def load_scores(
    scores_ptr, index, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """The scan's scores of a block of the chunk, float32 `[BLOCK_SIZE, ROWS_PADDED]`."""
    tokens = index * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    rows = tl.arange(0, ROWS_PADDED)
    return tl.load(
        scores_ptr + tokens[:, None] * ROWS + rows[None, :],
        mask=(rows < ROWS)[None, :],
        other=0.0,
    )


@triton.jit
def attend_blocks(
    accumulator, weight_sums, reference,
    query, factor, soft_cap, limits, kept, kept_late, num_blocks,
    first_block, step, seq_len, places, scores_ptr, cache,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, QUERY: tl.constexpr, TUNING: tl.constexpr,
    FROM_SCORES: tl.constexpr, RAISE: tl.constexpr,
    DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr,
):
    """Adds the blocks of a chunk that are `kept` (of `scan_blocks`) to a running softmax.

    FROM_SCORES: the scan's scores stand for the dot with the base, which is not read again.
    Otherwise the blocks are the first `num_blocks` ones. RAISE: `reference` rises with the scores;
    otherwise it is near their maximum, as the residual does not move it beyond what bfloat16
    weights hold. `soft_cap`: of `cap_scores`. See `scan_blocks` for the other arguments and
    `softmax_update` for the state, which is returned.
    """
    SIZE: tl.constexpr = BLOCK.BLOCK_SIZE
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    tokens = tl.arange(0, SIZE)
    for rank in tl.range(0, num_blocks, num_stages=TUNING.ATTEND_STAGES):
        index = rank
        added = tl.zeros([SIZE, ROWS_PADDED], tl.float32)
        if FROM_SCORES:
            index, kept, kept_late = first_kept(kept, kept_late)
            added = load_scores(scores_ptr, index, QUERY.ROWS, ROWS_PADDED, SIZE)
        units = pick_units(places, index * BLOCK.PER_BLOCK, BLOCK.PER_BLOCK)
        positions = (first_block + index * step) * SIZE + tokens
        accumulator, weight_sums, reference = attend_tile(
            accumulator, weight_sums, reference,
            query, factor, soft_cap, limits, units, positions, added, seq_len, cache,
            PAGE, BLOCK, QUERY, FROM_SCORES, RAISE, not PAGE.WHOLE_PAGES, DTYPE, VALUE_DTYPE,
        )
    return accumulator, weight_sums, reference


@triton.constexpr_function
def run_tile(BLOCK):
    """Tokens that `attend_runs` takes at a time: the rows of the matrix unit, a run at least."""
    return max(64, BLOCK.UNIT)


@triton.jit
def load_runs(runs_ptr, rank, num_runs, RUNS: tl.constexpr):
    """RUNS entries of the list of `choose_blocks` from `rank` on, as tuples of scalars: places,
    positions, slots. Positions beyond any length stand for entries that do not exist."""
    places, positions, slots = (), (), ()
    for part in tl.static_range(RUNS):
        exists = rank + part < num_runs
        entry_ptr = runs_ptr + (rank + part) * 3
        places += (tl.load(entry_ptr, mask=exists, other=0),)
        positions += (tl.load(entry_ptr + 1, mask=exists, other=1 << 30),)
        slots += (tl.load(entry_ptr + 2, mask=exists, other=0),)
    return places, positions, slots


@triton.jit
def of_runs(values, tokens, RUN: tl.constexpr):
    """For each of `tokens` the one of `values`, a tuple of scalars, that its run has."""
    chosen = tokens * 0
    for part in tl.static_range(len(values)):
        chosen = tl.where(tokens // RUN == part, values[part], chosen)
    return chosen


@triton.jit
def largest_scores(
    query, factor, limits, num_runs, seq_len, runs_ptr, cache,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, QUERY: tl.constexpr, TUNING: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The largest base score, not capped, of the tokens that `attend_runs` takes, log2 units,
    float32 `[ROWS_PADDED]`. See there for the arguments."""
    RUN: tl.constexpr = BLOCK.UNIT
    TOKENS: tl.constexpr = run_tile(BLOCK)
    RUNS: tl.constexpr = TOKENS // RUN
    HAS_EXPONENT: tl.constexpr = cache.key_exponent.pointer is not None
    tokens = tl.arange(0, TOKENS)
    columns = tl.arange(0, PAGE.HEAD_SIZE_PADDED)
    largest = tl.full([QUERY.ROWS_PADDED], float("-inf"), tl.float32)
    entries = load_runs(runs_ptr, 0, num_runs, RUNS)
    for rank in tl.range(0, num_runs, RUNS, num_stages=TUNING.ATTEND_STAGES):
        units, begins, _ = entries
        entries = load_runs(runs_ptr, rank + RUNS, num_runs, RUNS)
        positions = of_runs(begins, tokens, RUN) + tokens % RUN
        valid = positions < seq_len
        exponents = load_unit_exponents(cache.key_exponent, units, tokens, valid, BLOCK)
        rows = unit_pointers(cache.key, units, tokens, PAGE.KEY_STRIDE, BLOCK)
        key = load_rows(rows, columns, valid, True, PAGE).to(DTYPE)
        scores = dot_query(key, query, QUERY) * factor[None, :]
        scores *= tile_scales(exponents, tokens, HAS_EXPONENT)[:, None]
        scores = tl.where(positions[:, None] < limits[None, :], scores, float("-inf"))
        largest = tl.maximum(largest, tl.max(scores, axis=0))
    return largest


@triton.jit
def attend_runs(
    accumulator, weight_sums, reference,
    query, factor, soft_cap, limits, row_tokens, num_runs, seq_len, runs_ptr, weights_ptr, cache,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, QUERY: tl.constexpr, TUNING: tl.constexpr,
    RAISE: tl.constexpr, DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr,
):
    """Adds the `num_runs` runs of tokens in the list of `choose_blocks` to a running softmax, with
    their weights, `run_tile` tokens at a time: blocks of 16 fill a tile together.

    `row_tokens`, int32 `[ROWS_PADDED]`: of `query_rows`. See `attend_blocks` for the others.
    """
    RUN: tl.constexpr = BLOCK.UNIT
    TOKENS: tl.constexpr = run_tile(BLOCK)
    RUNS: tl.constexpr = TOKENS // RUN
    ROWS_PADDED: tl.constexpr = QUERY.ROWS_PADDED
    tokens = tl.arange(0, TOKENS)
    entries = load_runs(runs_ptr, 0, num_runs, RUNS)
    for rank in tl.range(0, num_runs, RUNS, num_stages=TUNING.ATTEND_STAGES):
        places, begins, slots = entries
        entries = load_runs(runs_ptr, rank + RUNS, num_runs, RUNS)  # before they are waited for
        positions = of_runs(begins, tokens, RUN) + tokens % RUN
        weights = of_runs(slots, tokens, RUN) * QUERY.QUERY_LEN
        if QUERY.QUERY_LEN > 1:
            weights = weights[:, None] + row_tokens[None, :]
        else:
            weights = weights[:, None]
        added = tl.load(weights_ptr + weights) + tl.zeros([TOKENS, ROWS_PADDED], tl.float32)
        accumulator, weight_sums, reference = attend_tile(
            accumulator, weight_sums, reference,
            query, factor, soft_cap, limits, places, positions, added, seq_len, cache,
            PAGE, BLOCK, QUERY, False, RAISE, RUNS > 1 or not PAGE.WHOLE_PAGES,
            DTYPE, VALUE_DTYPE,
        )
    return accumulator, weight_sums, reference
