"""The query heads of one KV group, as the decode kernels take them."""

import triton
import triton.language as tl

from .fp8_split import exponent_to_scale


@triton.jit
def load_query(
    query_ptr, row_stride, group, columns, scale_log2,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, NORMALISE: tl.constexpr, DTYPE: tl.constexpr,
):
    """Query rows `[GROUP_PADDED, HEAD_SIZE_PADDED]` in DTYPE and the factor on their scores.

    E4M3 keys meet the query in float16: one conversion instruction makes two elements of it.
    Each row is brought below 2^8 by a power of two, which the factor (float32 `[GROUP_PADDED]`,
    log2 units) takes back; only elements below 2^-22 of the row's largest lose bits.
    """
    query = tl.load(
        query_ptr + group[:, None] * row_stride + columns[None, :],
        mask=(group < GROUP)[:, None] & (columns < HEAD_SIZE)[None, :],
        other=0.0,
    )
    factor = tl.zeros_like(group).to(tl.float32) + scale_log2
    if NORMALISE:
        query = query.to(tl.float32)
        largest = tl.max(tl.abs(query), axis=1)
        exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 7, 1)
        query *= exponent_to_scale(254 - exponent)[:, None]
        factor *= exponent_to_scale(exponent)
    return query.to(DTYPE), factor
