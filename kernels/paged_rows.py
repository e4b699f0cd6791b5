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
    STRIDE_TOKEN: tl.constexpr, PAGE_SIZE: tl.constexpr, PACKED: tl.constexpr = 1,
):
    """Pointers to the rows of tokens at `positions`, whose pages are known.

    `plane_ptr` points at the head's first row of page 0.
    """
    return plane_ptr + pages * stride_page + (positions % PAGE_SIZE // PACKED) * STRIDE_TOKEN


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
def tile_pointers(
    plane_ptr, block_table_row_ptr, places, index, first_position, seq_len,
    stride_page, STRIDE_TOKEN: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    PACKED: tl.constexpr = 1,
):
    """Pointers `[ROWS]` to the rows of whole blocks, the first of which is at `first_position`
    and at `index` of `places` (see `load_places`).

    PACKED tokens share an element of the plane.
    """
    tokens = tl.arange(0, ROWS)
    if PAGE_SIZE % BLOCK_SIZE == 0:
        PER_PAGE: tl.constexpr = PAGE_SIZE // BLOCK_SIZE
        pointers = plane_ptr + tokens * 0
        for block in tl.static_range(ROWS // BLOCK_SIZE):
            place = pick(places, index + block, BLOCKS)
            block_ptr = plane_ptr + (place // PER_PAGE).to(tl.int64) * stride_page
            block_ptr += place % PER_PAGE * (BLOCK_SIZE // PACKED * STRIDE_TOKEN)
            pointers = tl.where(tokens // BLOCK_SIZE == block, block_ptr, pointers)
        pointers += tokens % BLOCK_SIZE // PACKED * STRIDE_TOKEN
    else:
        positions = first_position + tokens
        pages = token_pages(block_table_row_ptr, positions, positions < seq_len, PAGE_SIZE)
        pointers = token_pointers(
            plane_ptr, pages, positions, stride_page, STRIDE_TOKEN, PAGE_SIZE, PACKED
        )
    return pointers


@triton.jit
def load_rows(
    pointers, columns, valid,
    MASKED: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
):
    """Loads rows of a plane, `[ROWS, HEAD_SIZE_PADDED]`; if MASKED, zero where not `valid`."""
    pointers = pointers[:, None] + columns[None, :]
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
        pointers[None, :] + columns[:, None],
        mask=valid[None, :] & (columns < HEAD_SIZE)[:, None],
        other=0.0,
    )


@triton.jit
def load_scales(pointers, valid):
    """The powers of two that rows are stored without, float32 `[ROWS]`."""
    return exponent_to_scale(tl.load(pointers, mask=valid, other=127))


@triton.jit
def load_tile_exponents(
    exponent_ptr, block_table_row_ptr, places, index, first_position, seq_len, stride_page,
    PAGE_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    HAS_EXPONENT: tl.constexpr,
):
    """Exponents of the tile at `tile_pointers`, for `tile_scales`: of each row the four bytes
    that its own is one of, int32 `[ROWS]`.

    Whole registers, so that a kernel can carry them to its next iteration without waiting for
    them in this one.
    """
    words = tl.zeros([ROWS], tl.int32)
    if HAS_EXPONENT:
        pointers = tile_pointers(
            exponent_ptr.to(tl.pointer_type(tl.int32)), block_table_row_ptr, places, index,
            first_position, seq_len, stride_page // 4, 1, PAGE_SIZE, BLOCK_SIZE, BLOCKS, ROWS, 4,
        )
        words = tl.load(pointers, mask=first_position + tl.arange(0, ROWS) < seq_len, other=0)
    return words


@triton.jit
def tile_scales(words, ROWS: tl.constexpr, HAS_EXPONENT: tl.constexpr):
    """The powers of two that a tile's rows are stored without, float32 `[ROWS]`."""
    scales = tl.full([ROWS], 1.0, tl.float32)
    if HAS_EXPONENT:
        scales = exponent_to_scale(words >> tl.arange(0, ROWS) % 4 * 8 & 255)
    return scales
