"""Addresses of a request's tokens in the paged cache, shared by the kernels that read it."""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from .fp8_split import exponent_to_scale
from .paged_cache import plane_of_words, row_tile


class BlockShape(NamedTuple):
    """How blocks of BLOCK_SIZE tokens lie in pages: UNIT, the greatest common divisor of the two,
    is what lies together."""

    BLOCK_SIZE: int
    UNIT: int
    PER_BLOCK: int
    PER_PAGE: int


def block_shape(block_size: int, page_size: int) -> BlockShape:
    unit = math.gcd(block_size, page_size)
    return BlockShape(block_size, unit, block_size // unit, page_size // unit)


@triton.jit
def token_pages(block_table_row_ptr, positions, valid, PAGE_SIZE: tl.constexpr):
    """Pages of arbitrary `positions`, int64; page 0 where not `valid`."""
    return tl.load(block_table_row_ptr + positions // PAGE_SIZE, mask=valid, other=0).to(tl.int64)


@triton.jit
def token_pointers(
    plane, pages, positions, STRIDE_TOKEN: tl.constexpr, PAGE_SIZE: tl.constexpr
):
    """Pointers to the rows of tokens at `positions`, whose pages are known; `plane` is that of a
    head (see `plane_of_head`)."""
    return plane.pointer + pages * plane.stride_page + (positions % PAGE_SIZE) * STRIDE_TOKEN


@triton.jit
def _load_run_places(
    block_table_row_ptr, first_block, step, seq_len, first_run,
    BLOCK: tl.constexpr, RUNS: tl.constexpr,
):
    runs = first_run + tl.arange(0, RUNS)
    runs = (first_block + runs // BLOCK.PER_BLOCK * step) * BLOCK.PER_BLOCK + runs % BLOCK.PER_BLOCK
    exists = runs * BLOCK.UNIT < seq_len
    pages = tl.load(block_table_row_ptr + runs // BLOCK.PER_PAGE, mask=exists, other=0)
    return pages * BLOCK.PER_PAGE + runs % BLOCK.PER_PAGE


@triton.jit
def load_places(
    block_table_row_ptr, first_block, step, seq_len, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """Where BLOCKS blocks lie, `first_block` and every `step`-th after it, for `pick`: of each run
    of UNIT tokens `page * runs a page + place in it`; 0 from `seq_len` on.

    Kernels hold the places of what they are about to read, since a load whose address waits for
    another load of the same iteration is not pipelined. They come as a tuple of tensors of at most
    32, because every warp can hold such a tensor, an element a thread.
    """
    RUNS: tl.constexpr = BLOCKS * BLOCK.PER_BLOCK
    SIZE: tl.constexpr = min(RUNS, 32)
    row, first = block_table_row_ptr, first_block
    places = (_load_run_places(row, first, step, seq_len, 0, BLOCK, SIZE),)
    for begin in tl.static_range(32, RUNS, 32):
        places += (_load_run_places(row, first, step, seq_len, begin, BLOCK, SIZE),)
    return places


@triton.jit
def pick(places, index):
    """Element `index` of `load_places`; 0 for an index outside."""
    indices = tl.arange(0, places[0].shape[0])
    chosen = tl.where(indices == index, places[0], 0)
    for part in tl.static_range(1, len(places)):
        chosen = tl.where(indices + part * 32 == index, places[part], chosen)
    return tl.max(chosen, axis=0)


@triton.jit
def pick_units(places, first_unit, UNITS: tl.constexpr):
    """UNITS elements of `load_places` from `first_unit` on, as a tuple of scalars."""
    units = (pick(places, first_unit),)
    for unit in tl.static_range(1, UNITS):
        units += (pick(places, first_unit + unit),)
    return units


@triton.jit
def unit_pointers(
    plane, units, tokens, STRIDE_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr = 1,
):
    """Pointers to the rows of `tokens`, int32 `[ROWS]`: all of those at `units` (see
    `pick_units`), in any order. PACKED tokens share an element of the plane."""
    pointers = plane.pointer + tokens * 0
    for unit in tl.static_range(len(units)):
        place = units[unit]
        unit_ptr = plane.pointer + (place // BLOCK.PER_PAGE).to(tl.int64) * plane.stride_page
        unit_ptr += place % BLOCK.PER_PAGE * (BLOCK.UNIT // PACKED * STRIDE_TOKEN)
        pointers = tl.where(tokens // BLOCK.UNIT == unit, unit_ptr, pointers)
    return pointers + tokens % BLOCK.UNIT // PACKED * STRIDE_TOKEN


@triton.jit
def tile_pointers(
    plane, places, index, tokens, STRIDE_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PACKED: tl.constexpr = 1,
):
    """Pointers to the rows of `tokens`, int32 `[ROWS]`: all of ROWS tokens, in any order, counted
    from block `index` of `places` on (see `load_places`). PACKED: see `unit_pointers`."""
    units = pick_units(places, index * BLOCK.PER_BLOCK, ROWS // BLOCK.UNIT)
    return unit_pointers(plane, units, tokens, STRIDE_TOKEN, BLOCK, PACKED)


@triton.jit
def prefetch(pointers, wanted):
    """Asks for the lines of 128 bytes at `pointers` where `wanted`; they come to the L2 cache."""
    wanted = tl.broadcast_to(wanted, pointers.shape).to(tl.int32)
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0;}",
        "=r,l,r", [pointers.to(tl.int64), wanted], dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def prefetch_rows(pointers, wanted, HEAD_SIZE: tl.constexpr):
    """The same for rows of a plane, `[ROWS]`: the lines that every 128 bytes of them begin in."""
    BYTES: tl.constexpr = HEAD_SIZE * (pointers.dtype.element_ty.primitive_bitwidth // 8)
    for begin in tl.static_range(0, BYTES, 128):
        prefetch(pointers + begin * HEAD_SIZE // BYTES, wanted)


@triton.jit
def load_rows(pointers, columns, valid, MASKED: tl.constexpr, PAGE: tl.constexpr):
    """Loads rows of a plane, `[ROWS, HEAD_SIZE_PADDED]`; if MASKED, zero where not `valid`."""
    pointers = row_tile(pointers, columns)
    if MASKED:
        mask = valid[:, None] & (columns < PAGE.HEAD_SIZE)[None, :]
        rows = tl.load(pointers, mask=mask, other=0.0)
    elif PAGE.HEAD_SIZE == PAGE.HEAD_SIZE_PADDED:
        rows = tl.load(pointers)
    else:
        inside = tl.broadcast_to((columns < PAGE.HEAD_SIZE)[None, :], pointers.shape)
        rows = tl.load(pointers, mask=inside, other=0.0)
    return rows


@triton.jit
def load_columns(pointers, columns, valid, HEAD_SIZE: tl.constexpr):
    """The rows of `load_rows` as columns, `[HEAD_SIZE_PADDED, ROWS]`."""
    return tl.load(
        tl.trans(row_tile(pointers, columns)),
        mask=valid[None, :] & (columns < HEAD_SIZE)[:, None],
        other=0.0,
    )


@triton.jit
def load_scales(pointers, valid):
    """The powers of two that rows are stored without, float32 `[ROWS]`."""
    return exponent_to_scale(tl.load(pointers, mask=valid, other=127))


@triton.jit
def load_unit_exponents(plane, units, tokens, valid, BLOCK: tl.constexpr):
    """Exponents of the rows at `unit_pointers`, for `tile_scales`: of each row the four bytes
    that its own is one of, int32 `[ROWS]`; zeros where there is no such plane.

    Whole registers, so that a kernel can carry them to its next iteration without waiting for
    them in this one.
    """
    words = tl.zeros(tokens.shape, tl.int32)
    if plane.pointer is not None:
        pointers = unit_pointers(plane_of_words(plane), units, tokens, 1, BLOCK, 4)
        words = tl.load(pointers, mask=valid, other=0)
    return words


@triton.jit
def load_tile_exponents(
    plane, places, index, tokens, valid, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """`load_unit_exponents` of the tile at `tile_pointers`."""
    units = pick_units(places, index * BLOCK.PER_BLOCK, ROWS // BLOCK.UNIT)
    return load_unit_exponents(plane, units, tokens, valid, BLOCK)


@triton.jit
def tile_scales(words, tokens, HAS_EXPONENT: tl.constexpr):
    """The powers of two that a tile's rows are stored without, float32 `[ROWS]`."""
    scales = tl.full(tokens.shape, 1.0, tl.float32)
    if HAS_EXPONENT:
        scales = exponent_to_scale(words >> tokens % 4 * 8 & 255)
    return scales
