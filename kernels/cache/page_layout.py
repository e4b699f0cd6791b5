"""The page of the KV cache: which planes it has, how wide they are and where they start."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

RESIDUAL_SCALE = 32.0
"""Factor on the residual before it is rounded to E4M3. A base element of at most 2^8 has a
rounding error of at most 2^3, so the scaled residual is at most 2^8 and never saturates."""

CODE_TOKENS = 64
"""Tokens of a run whose 4-bit codes share a step and an offset for each channel."""


class KVPlanes(NamedTuple):
    """Typed views of a paged cache, each `[num_blocks, num_kv_heads, page_size, width]`.

    `key` is E4M3 (or the model's dtype where FP8 is not available), `key_residual` E4M3,
    `key_exponent` uint8 of width 1 (E8M0: the key is `(key + key_residual / residual_scale) *
    2^(key_exponent - 127)`). `value` is the model's dtype, or E4M3 with a `value_exponent` like
    the key's: the value is `value * 2^(value_exponent - 127)`. The optional planes are None when
    the page has none. Only the last dimension needs to be contiguous. Without `whole_pages` the
    memory of a page may end with its last token in use.

    `key_code`, int16 of width head_size / 4, and `code_range`, float16 `[num_blocks, num_kv_heads,
    page_size / CODE_TOKENS, 2 * head_size]`, hold keys as the scan reads them: see `encode_words`.
    """

    key: torch.Tensor
    key_residual: torch.Tensor | None
    key_exponent: torch.Tensor | None
    value: torch.Tensor
    page_size: int
    value_exponent: torch.Tensor | None = None
    residual_scale: float = RESIDUAL_SCALE
    whole_pages: bool = True
    key_code: torch.Tensor | None = None
    code_range: torch.Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def head_size(self) -> int:
        return self.key.shape[3]


@dataclass(frozen=True)
class Plane:
    """One plane of a page: a row of `width` elements for every `tokens` tokens, contiguous."""

    name: str
    dtype: torch.dtype
    width: int
    tokens: int = 1

    @property
    def bytes_per_token(self) -> int:
        return self.width * self.dtype.itemsize // self.tokens


@dataclass(frozen=True)
class PageLayout:
    """The planes of one (page, KV head): K base | K residual | V | codes of K | their ranges |
    K exponent | V exponent.

    A (page, KV head) is one contiguous run of `page_size * bytes_per_token` bytes. Every plane
    starts at a multiple of 16 bytes because `page_size` is a multiple of 16, and of 64 with
    codes; the exponents come last so that the wide planes start at multiples of `page_size * 8`.

    Args:
        head_size: elements of a key or value, a multiple of 16.
        dtype: the model's dtype, float16 or bfloat16.
        fp8_key: store K as E4M3 with an exponent per token; otherwise in `dtype`.
        residual: store the E4M3 residual of K as well.
        fp8_value: store V as E4M3 with an exponent per token; otherwise in `dtype`.
        key_code: store K once more in 4 bits, for the scan.
    """

    head_size: int
    dtype: torch.dtype
    fp8_key: bool = True
    residual: bool = True
    fp8_value: bool = False
    key_code: bool = False

    def __post_init__(self) -> None:
        assert self.head_size % 16 == 0
        assert self.dtype in (torch.float16, torch.bfloat16)
        assert self.fp8_key or not self.residual

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes in the order in which they lie in a page."""
        fp8 = torch.float8_e4m3fn
        planes = [Plane("key", fp8 if self.fp8_key else self.dtype, self.head_size)]
        if self.residual:
            planes.append(Plane("key_residual", fp8, self.head_size))
        planes.append(Plane("value", fp8 if self.fp8_value else self.dtype, self.head_size))
        if self.key_code:
            planes.append(Plane("key_code", torch.int16, self.head_size // 4))
            planes.append(Plane("code_range", torch.float16, 2 * self.head_size, CODE_TOKENS))
        if self.fp8_key:
            planes.append(Plane("key_exponent", torch.uint8, 1))
        if self.fp8_value:
            planes.append(Plane("value_exponent", torch.uint8, 1))
        return tuple(planes)

    def plane(self, name: str) -> Plane:
        """The plane of that name."""
        return next(plane for plane in self.planes if plane.name == name)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one KV head."""
        return sum(plane.bytes_per_token for plane in self.planes)

    def split(self, kv_cache: torch.Tensor) -> KVPlanes:
        """Views the cache as its planes.

        Args:
            kv_cache: uint8 `[num_blocks, num_kv_heads, page_size, bytes_per_token]`, each
                (block, head) contiguous; offset and strides are multiples of 16 bytes.

        Raises:
            ValueError: the tensor is not such a cache.
        """
        num_blocks, num_kv_heads, page_size, width = kv_cache.shape
        if kv_cache.dtype != torch.uint8 or width != self.bytes_per_token:
            raise ValueError(
                f"expected a uint8 cache with {self.bytes_per_token} bytes per token, got "
                f"{kv_cache.dtype} with {width}"
            )
        if page_size % 16 or kv_cache.stride()[2:] != (width, 1):
            raise ValueError(
                "expected pages of a multiple of 16 tokens, contiguous per (block, head), got "
                f"shape {tuple(kv_cache.shape)}, strides {kv_cache.stride()}"
            )
        if self.key_code and page_size % CODE_TOKENS:
            raise ValueError(
                f"expected pages of a multiple of {CODE_TOKENS} tokens, which 4-bit codes of keys "
                f"need, got {page_size}"
            )
        if any(n % 16 for n in (kv_cache.storage_offset(), *kv_cache.stride()[:2])):
            raise ValueError(
                "expected pages and heads that begin at multiples of 16 bytes, got offset "
                f"{kv_cache.storage_offset()}, strides {kv_cache.stride()}"
            )
        views: dict[str, Any] = {"page_size": page_size, "key_residual": None, "key_exponent": None}
        offset = kv_cache.storage_offset()
        for plane in self.planes:
            itemsize = plane.dtype.itemsize
            views[plane.name] = torch.empty(0, dtype=plane.dtype, device=kv_cache.device).set_(
                kv_cache.untyped_storage(),
                offset // itemsize,
                (num_blocks, num_kv_heads, page_size // plane.tokens, plane.width),
                (
                    kv_cache.stride(0) // itemsize,
                    kv_cache.stride(1) // itemsize,
                    plane.width,
                    1,
                ),
            )
            offset += page_size * plane.bytes_per_token
        return KVPlanes(**views)
