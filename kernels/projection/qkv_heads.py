"""How a packed QKV row is cut into heads, and what happens to each head before attention."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


class QKVShape(NamedTuple):
    """Constants of `QKVHeads`."""

    NUM_HEADS: int
    NUM_KV_HEADS: int
    HEAD_SIZE: int
    HEAD_SIZE_PADDED: int
    ROTARY_DIM: int
    IS_NEOX_STYLE: bool


@dataclass(frozen=True)
class QKVHeads:
    """The heads of a row `[(num_heads + 2 * num_kv_heads) * head_size]`: Q, then K, then V.

    Heads of Q and K pass an RMS norm, where there is one, and are rotated by their position.

    Args:
        cos_sin_cache: `[max_position, rotary_dim]`, any float dtype, contiguous rows: the cosines
            of a position in the first half of its row, the sines in the second.
        is_neox_style: element i is rotated with i + rotary_dim / 2; otherwise 2i with 2i + 1.
            Elements from rotary_dim on are left as they are.
        query_norm, key_norm: weights `[head_size]` of the norms, both or neither.
        epsilon: added to the mean square.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    cos_sin_cache: torch.Tensor
    is_neox_style: bool = True
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        assert (self.query_norm is None) == (self.key_norm is None)
        assert self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_size
        assert self.cos_sin_cache.stride(-1) == 1

    @property
    def rotary_dim(self) -> int:
        return self.cos_sin_cache.shape[-1]

    @property
    def num_all_heads(self) -> int:
        return self.num_heads + 2 * self.num_kv_heads

    @property
    def query_size(self) -> int:
        """Elements of Q in a row."""
        return self.num_heads * self.head_size

    @property
    def key_value_size(self) -> int:
        """Elements of K in a row, which are as many as V's."""
        return self.num_kv_heads * self.head_size

    @property
    def shape(self) -> QKVShape:
        """What the compiler is to know of the heads."""
        return QKVShape(
            self.num_heads, self.num_kv_heads, self.head_size,
            triton.next_power_of_2(self.head_size), self.rotary_dim, self.is_neox_style,
        )


@triton.jit
def rotation_partners(columns, QKV: tl.constexpr):
    """The element that each of `columns` is rotated with; itself where there is no rotation."""
    if QKV.IS_NEOX_STYLE:
        HALF: tl.constexpr = QKV.ROTARY_DIM // 2
        partners = tl.where(columns < HALF, columns + HALF, columns - HALF)
    else:
        partners = columns ^ 1
    return tl.where(columns < QKV.ROTARY_DIM, partners, columns)


@triton.jit
def load_rotation(cos_sin_ptr, cos_sin_stride, positions, columns, mask, QKV: tl.constexpr):
    """Cosine and sine of each element, `[ROWS, HEAD_SIZE_PADDED]` in the dtype of the cache: 1
    and 0 where nothing rotates, and outside of `mask`.

    `positions` is int64 `[ROWS]`.
    """
    HALF: tl.constexpr = QKV.ROTARY_DIM // 2
    if QKV.IS_NEOX_STYLE:
        frequency = tl.where(columns < HALF, columns, columns - HALF)
    else:
        frequency = columns // 2
    rotated = mask & (columns < QKV.ROTARY_DIM)[None, :]
    angles = cos_sin_ptr + (positions * cos_sin_stride)[:, None] + frequency[None, :]
    cos = tl.load(angles, mask=rotated, other=1.0)
    sin = tl.load(angles + HALF, mask=rotated, other=0.0)
    return cos, sin


@triton.jit
def norm_and_rotate(
    x, partner, cos, sin, columns, norm_ptr, epsilon, QKV: tl.constexpr
):
    """Rows of heads, float32 `[ROWS, HEAD_SIZE_PADDED]`, after norm and rotation.

    `partner` holds the same rows with their columns in the order of `rotation_partners`; both are
    0 in rows and columns that do not exist. `cos, sin`: of `load_rotation`. No norm where
    `norm_ptr` is None.
    """
    if norm_ptr is not None:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / QKV.HEAD_SIZE + epsilon)
        others = rotation_partners(columns, QKV)
        is_column = columns < QKV.HEAD_SIZE
        weight = tl.load(norm_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
        others_weight = tl.load(norm_ptr + others, mask=is_column, other=0.0).to(tl.float32)
        x *= inverse[:, None] * weight[None, :]
        partner *= inverse[:, None] * others_weight[None, :]
    is_first = columns < QKV.ROTARY_DIM // 2 if QKV.IS_NEOX_STYLE else columns % 2 == 0
    sin = sin.to(tl.float32)
    return x * cos.to(tl.float32) + partner * tl.where(is_first[None, :], -sin, sin)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 `x` rounded to `dtype`, half to even, and still float32.

    The interpreter's cast to bfloat16 truncates; after this it has nothing to cut off.
    """
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        rounded = (bits & -65536).to(tl.float32, bitcast=True)
    else:
        rounded = x.to(dtype).to(tl.float32)
    return rounded
