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
def load_places(
    block_table_row_ptr, first_block, end_block,
    PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):
    """Where BLOCKS blocks from `first_block` on lie, int32: `page * blocks a page + place in it`;
    0 from `end_block` on.

    Kernels hold the places of what they are about to read, since a load whose address waits for
    another load of the same iteration is not pipelined. All 0 where pages do not hold whole
    blocks.
    """
    blocks = first_block + tl.arange(0, BLOCKS)
    places = tl.zeros([BLOCKS], tl.int32)
    if PAGE_SIZE % BLOCK_SIZE == 0:
        PER_PAGE: tl.constexpr = PAGE_SIZE // BLOCK_SIZE
        pages = tl.load(block_table_row_ptr + blocks // PER_PAGE, mask=blocks < end_block, other=0)
        places = pages * PER_PAGE + blocks % PER_PAGE
    return places


@triton.jit
def pick(values, index, SIZE: tl.constexpr):
    """`values[index]` of an int32 tensor `[SIZE]`, none negative; 0 for an index outside."""
    return tl.max(tl.where(tl.arange(0, SIZE) == index, values, 0), axis=0)


@triton.jit
def tile_order(ROWS: tl.constexpr):
    """Which token of a tile each row of it holds, `[ROWS]`.

    The matrix unit hands rows to four warps by sixteens. In this order a warp's rows are a run of
    tokens, so that what is reduced over a block stays within a warp, or few of them.
    """
    rows = tl.arange(0, ROWS)
    if ROWS % 64 == 0:
        rows = rows // 16 % 4 * (ROWS // 4) + rows // 64 * 16 + rows % 16
    return rows


@triton.jit
def by_block(values, BLOCK_SIZE: tl.constexpr):
    """What belongs to a tile's rows, `[ROWS, COLUMNS]`, as `[blocks, BLOCK_SIZE * COLUMNS]`; see
    `tile_order`."""
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    if ROWS % 64 == 0:
        values = tl.reshape(values, (ROWS // 64, 4, 16, COLUMNS))
        values = tl.permute(values, (1, 0, 2, 3))
    return tl.reshape(values, (ROWS // BLOCK_SIZE, BLOCK_SIZE * COLUMNS))


@triton.jit
def tile_pointers(
    plane_ptr, block_table_row_ptr, places, index, first_position, seq_len,
    stride_page, STRIDE_TOKEN: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):
    """Pointers `[ROWS]` to the rows of whole blocks in `tile_order`; the first block is at
    `first_position` and at `index` of `places` (see `load_places`)."""
    tokens = tile_order(ROWS)
    if PAGE_SIZE % BLOCK_SIZE == 0:
        PER_PAGE: tl.constexpr = PAGE_SIZE // BLOCK_SIZE
        pointers = plane_ptr + tokens * 0
        for block in tl.static_range(ROWS // BLOCK_SIZE):
            place = pick(places, index + block, BLOCKS)
            block_ptr = plane_ptr + (place // PER_PAGE).to(tl.int64) * stride_page
            block_ptr += place % PER_PAGE * (BLOCK_SIZE * STRIDE_TOKEN)
            pointers = tl.where(tokens // BLOCK_SIZE == block, block_ptr, pointers)
        pointers += tokens % BLOCK_SIZE * STRIDE_TOKEN
    else:
        positions = first_position + tokens
        pages = token_pages(block_table_row_ptr, positions, positions < seq_len, PAGE_SIZE)
        pointers = token_pointers(
            plane_ptr, pages, positions, stride_page, STRIDE_TOKEN, PAGE_SIZE
        )
    return pointers


@triton.jit
def load_rows(
    pointers, columns, valid, HEAD_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr
):
    """Loads rows of a plane, `[ROWS, HEAD_SIZE_PADDED]`, zero where not `valid`; None: all are."""
    pointers = pointers[:, None] + columns[None, :]
    if valid is not None:
        rows = tl.load(
            pointers, mask=valid[:, None] & (columns < HEAD_SIZE)[None, :], other=0.0
        )
    elif HEAD_SIZE == HEAD_SIZE_PADDED:
        rows = tl.load(pointers)
    else:
        inside = tl.broadcast_to((columns < HEAD_SIZE)[None, :], pointers.shape)
        rows = tl.load(pointers, mask=inside, other=0.0)
    return rows


@triton.jit
def load_scales(pointers, valid):
    """The powers of two that rows are stored without, float32 `[ROWS]`."""
    return exponent_to_scale(tl.load(pointers, mask=valid, other=127))


@triton.jit
def load_tile_scales(
    exponent_ptr, block_table_row_ptr, places, index, first_position, seq_len, stride_page,
    PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    HAS_EXPONENT: tl.constexpr,
):
    """`load_scales` of the tile at `tile_pointers`; ones if there are no exponents."""
    scales = tl.full([ROWS], 1.0, tl.float32)
    if HAS_EXPONENT:
        pointers = tile_pointers(
            exponent_ptr, block_table_row_ptr, places, index, first_position, seq_len,
            stride_page, 1, PAGE_SIZE, BLOCK_SIZE, BLOCKS, ROWS,
        )
        scales = load_scales(pointers, first_position + tile_order(ROWS) < seq_len)
    return scales
