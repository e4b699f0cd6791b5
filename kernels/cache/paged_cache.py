"""The paged cache as kernels take it: a tuple of planes, and the constants that go with them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .page_layout import KVPlanes


class PagedPlane(NamedTuple):
    """One plane: its first element, None where the cache has no such plane, and how many elements
    lie from page to page and from head to head."""

    pointer: torch.Tensor | None
    stride_page: int
    stride_head: int


class PagedCache(NamedTuple):
    """The planes of `KVPlanes`."""

    key: PagedPlane
    key_residual: PagedPlane
    key_exponent: PagedPlane
    value: PagedPlane
    value_exponent: PagedPlane
    key_code: PagedPlane
    code_range: PagedPlane


class PageShape(NamedTuple):
    """Constants of a cache; strides are elements from token to token."""

    HEAD_SIZE: int
    HEAD_SIZE_PADDED: int
    PAGE_SIZE: int
    KEY_STRIDE: int
    RESIDUAL_STRIDE: int
    VALUE_STRIDE: int
    RESIDUAL_SCALE: float
    WHOLE_PAGES: bool


def paged_plane(plane: torch.Tensor | None) -> PagedPlane:
    """A plane `[num_blocks, num_kv_heads, page_size, width]` as kernels take it."""
    return PagedPlane(None, 0, 0) if plane is None else PagedPlane(plane, *plane.stride()[:2])


def paged_cache(planes: KVPlanes | None) -> PagedCache:
    """The planes as kernels take them; None, for a launch that writes no cache: no plane."""
    if planes is None:
        return PagedCache(*[paged_plane(None)] * len(PagedCache._fields))
    return PagedCache(*(paged_plane(getattr(planes, name)) for name in PagedCache._fields))


def page_shape(planes: KVPlanes | None) -> PageShape:
    """The constants that go with `paged_cache`."""
    if planes is None:
        return PageShape(16, 16, 16, 0, 0, 0, 1.0, True)
    wide = (planes.key, planes.key_residual, planes.value)
    return PageShape(
        planes.head_size, triton.next_power_of_2(planes.head_size), planes.page_size,
        *(0 if plane is None else plane.stride(2) for plane in wide),
        planes.residual_scale, planes.whole_pages,
    )


@triton.jit
def plane_of_head(plane, head):
    """`plane` with its first element that of KV head `head`, an int64 scalar."""
    pointer = plane.pointer
    if pointer is not None:
        pointer += head * plane.stride_head
    return PagedPlane(pointer, plane.stride_page, plane.stride_head)


@triton.jit
def cache_of_head(cache, head):
    """`cache` with its planes beginning at KV head `head`, an int64 scalar."""
    return PagedCache(
        plane_of_head(cache.key, head),
        plane_of_head(cache.key_residual, head),
        plane_of_head(cache.key_exponent, head),
        plane_of_head(cache.value, head),
        plane_of_head(cache.value_exponent, head),
        plane_of_head(cache.key_code, head),
        plane_of_head(cache.code_range, head),
    )


@triton.jit
def plane_of_words(plane):
    """A plane of bytes as one of 32-bit words, each of four tokens."""
    pointer = plane.pointer.to(tl.pointer_type(tl.int32))
    return PagedPlane(pointer, plane.stride_page // 4, plane.stride_head // 4)


@triton.jit
def row_tile(rows, columns):
    """Pointers to `columns` of `rows`, `[ROWS, COLUMNS]`, for rows that begin at multiples of 16
    bytes, as those of a page do (see `PageLayout`).

    Says so, because compilers forget it on the way (Triton 3.8 where `tl.where` selects pointers),
    and then move 16 bytes one by one.
    """
    tile = rows[:, None] + columns[None, :]
    return tl.max_contiguous(tl.multiple_of(tile, [1, 16]), [1, 16])
