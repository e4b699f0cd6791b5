"""Addresses of a request's tokens in the paged cache, shared by the kernels that read it."""

import triton
import triton.language as tl

from .fp8_split import exponent_to_scale


@triton.jit
def token_pages(block_table_row_ptr, positions, valid, PAGE_SIZE: tl.constexpr):
    """Pages of arbitrary `positions`, int64; page 0 where not `valid`."""
    return tl.load(block_table_row_ptr + positions // PAGE_SIZE, mask=valid, other=0).to(tl.int64)


@triton.jit
def token_pointers(
    plane_ptr, pages, positions, stride_page,
    STRIDE_TOKEN: tl.constexpr, PAGE_SIZE: tl.constexpr,
):
    """Pointers to the rows of tokens at `positions`, whose pages are known.

    `plane_ptr` points at the head's first row of page 0.
    """
    return plane_ptr + pages * stride_page + (positions % PAGE_SIZE) * STRIDE_TOKEN


@triton.jit
def _load_run_places(
    block_table_row_ptr, first_block, step, seq_len, first_run,
    PER_PAGE: tl.constexpr, PER_BLOCK: tl.constexpr, UNIT: tl.constexpr, RUNS: tl.constexpr,
):
    runs = first_run + tl.arange(0, RUNS)
    runs = (first_block + runs // PER_BLOCK * step) * PER_BLOCK + runs % PER_BLOCK
    pages = tl.load(block_table_row_ptr + runs // PER_PAGE, mask=runs * UNIT < seq_len, other=0)
    return pages * PER_PAGE + runs % PER_PAGE


@triton.jit
def load_places(
    block_table_row_ptr, first_block, step, seq_len,
    PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, BLOCKS: tl.constexpr,
):
    """Where BLOCKS blocks lie, `first_block` and every `step`-th after it, for `pick`: of each run
    of UNIT tokens `page * runs a page + place in it`; 0 from `seq_len` on.

    UNIT, the greatest common divisor of page and block, is what lies together. Kernels hold the
    places of what they are about to read, since a load whose address waits for another load of
    the same iteration is not pipelined. They come as a tuple of tensors of at most 32, because
    every warp can hold such a tensor, an element a thread.
    """
    PER_PAGE: tl.constexpr = PAGE_SIZE // UNIT
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // UNIT
    RUNS: tl.constexpr = BLOCKS * PER_BLOCK
    SIZE: tl.constexpr = min(RUNS, 32)
    row, first = block_table_row_ptr, first_block
    places = (_load_run_places(row, first, step, seq_len, 0, PER_PAGE, PER_BLOCK, UNIT, SIZE),)
    for begin in tl.static_range(32, RUNS, 32):
        places += (
            _load_run_places(row, first, step, seq_len, begin, PER_PAGE, PER_BLOCK, UNIT, SIZE),
        )
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
def tile_pointers(
    plane_ptr, places, index, tokens, stride_page, STRIDE_TOKEN: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, PACKED: tl.constexpr = 1,
):
    """Pointers to the rows of `tokens`, int32 `[ROWS]`: all of ROWS tokens, in any order, counted
    from block `index` of `places` on (see `load_places`). PACKED tokens share an element of the
    plane."""
    PER_PAGE: tl.constexpr = PAGE_SIZE // UNIT
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // UNIT
    pointers = plane_ptr + tokens * 0
    for unit in tl.static_range(ROWS // UNIT):
        place = pick(places, index * PER_BLOCK + unit)
        unit_ptr = plane_ptr + (place // PER_PAGE).to(tl.int64) * stride_page
        unit_ptr += place % PER_PAGE * (UNIT // PACKED * STRIDE_TOKEN)
        pointers = tl.where(tokens // UNIT == unit, unit_ptr, pointers)
    return pointers + tokens % UNIT // PACKED * STRIDE_TOKEN


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
def row_tile(rows, columns):
    """Pointers to `columns` of `rows`, `[ROWS, COLUMNS]`, for rows that begin at multiples of 16
    bytes, as those of a page do (see `PageLayout`).

    Says so, because compilers forget it on the way (Triton 3.8 where `tl.where` selects pointers),
    and then move 16 bytes one by one.
    """
    tile = rows[:, None] + columns[None, :]
    return tl.max_contiguous(tl.multiple_of(tile, [1, 16]), [1, 16])


@triton.jit
def load_rows(
    pointers, columns, valid,
    MASKED: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
):
    """Loads rows of a plane, `[ROWS, HEAD_SIZE_PADDED]`; if MASKED, zero where not `valid`."""
    pointers = row_tile(pointers, columns)
    if MASKED:
        mask = valid[:, None] & (columns < HEAD_SIZE)[None, :]
        rows = tl.load(pointers, mask=mask, other=0.0)
    elif HEAD_SIZE == HEAD_SIZE_PADDED:
        rows = tl.load(pointers)
    else:
        inside = tl.broadcast_to((columns < HEAD_SIZE)[None, :], pointers.shape)
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
def load_tile_exponents(
    exponent_ptr, places, index, tokens, valid, stride_page,
    PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, HAS_EXPONENT: tl.constexpr,
):
    """Exponents of the tile at `tile_pointers`, for `tile_scales`: of each row the four bytes
    that its own is one of, int32 `[ROWS]`.

    Whole registers, so that a kernel can carry them to its next iteration without waiting for
    them in this one.
    """
    words = tl.zeros([ROWS], tl.int32)
    if HAS_EXPONENT:
        pointers = tile_pointers(
            exponent_ptr.to(tl.pointer_type(tl.int32)), places, index, tokens, stride_page // 4, 1,
            PAGE_SIZE, BLOCK_SIZE, UNIT, ROWS, 4,
        )
        words = tl.load(pointers, mask=valid, other=0)
    return words


@triton.jit
def tile_scales(words, tokens, HAS_EXPONENT: tl.constexpr):
    """The powers of two that a tile's rows are stored without, float32 `[ROWS]`."""
    scales = tl.full(tokens.shape, 1.0, tl.float32)
    if HAS_EXPONENT:
        scales = exponent_to_scale(words >> tokens % 4 * 8 & 255)
    return scales
