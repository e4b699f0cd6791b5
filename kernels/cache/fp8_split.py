"""Rounds rows to E4M3 with a power-of-two exponent each, and splits keys into base and residual."""

import triton
import triton.language as tl


@triton.jit
def round_to_e4m3(x):
    """Rounds float32 to the E4M3 grid, half to even, and stays in float32; |x| <= 448.

    Adding 1.5 * 2^(e + 20) to a number of exponent e leaves 4 significant bits. Below 2^-6 the
    E4M3 grid is uniform. The cast that follows is then exact, whoever does it.
    """
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.maximum(exponent, 0x3C800000).to(tl.float32, bitcast=True)  # at least 2^-6
    magic = power * 1572864.0
    return (x + magic) - magic


@triton.jit
def scale_rows(x):
    """Brings the largest element of each row of `x`, float32 `[ROWS, D]`, into [2^7, 2^8).

    Returns the scaled rows and their E8M0 exponents, int32 `[ROWS]`.
    """
    largest = tl.max(tl.abs(x), axis=1)
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 7, 1)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return x * inverse[:, None], exponent


@triton.jit
def split_e4m3(x, RESIDUAL_SCALE: tl.constexpr):
    """Splits the rows of `x`, float32 `[ROWS, D]`.

    Returns base and residual, float32 on the E4M3 grid `[ROWS, D]`, and the exponents of
    `scale_rows`.
    """
    scaled, exponent = scale_rows(x)
    base = round_to_e4m3(scaled)
    residual = round_to_e4m3((scaled - base) * RESIDUAL_SCALE)
    return base, residual, exponent


@triton.jit
def exponent_to_scale(exponent):
    """2^(exponent - 127) for E8M0 bytes of at least 1, float32."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
